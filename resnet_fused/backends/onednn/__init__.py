"""oneDNN's convolutions on packed weights, as PyTorch carries them for the CPU."""

import torch

from .. import CONVOLUTIONS_ONLY

IMPORT_ERROR = None


def unavailable(device_type: str, index: int | None = None) -> str | None:
    """Why oneDNN can't run on this device, with the remedy, or None where it can."""
    if device_type != "cpu":
        return f"oneDNN serves the CPU, the tensor is on {device_type}"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN (MKL-DNN); install one from PyPI"
    return None


def lacks(op: str) -> str:
    return CONVOLUTIONS_ONLY.format(name="onednn")
