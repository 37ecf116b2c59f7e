"""Keeps torch quiet where NumPy is missing, of which it warns when it is imported: nothing here needs it."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch  # noqa: F401
