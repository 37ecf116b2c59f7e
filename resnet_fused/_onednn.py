"""Fused convolutions that PyTorch already carries for the CPU: oneDNN's, as Inductor calls them."""

import torch


def unavailable(device_type: str, index: int | None = None) -> str | None:
    """Why oneDNN can't run on this device, with the remedy, or None where it can."""
    if device_type != "cpu":
        return f"oneDNN serves the CPU, the tensor is on {device_type}"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN (MKL-DNN); install one from PyPI"
    return None
