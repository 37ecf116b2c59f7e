"""cuDNN's fused convolutions, as PyTorch carries them."""

import torch

from .. import CONVOLUTIONS_ONLY, triton

IMPORT_ERROR = triton.IMPORT_ERROR  # BN is folded by a Triton kernel


def unavailable(device_type: str, index: int | None = None) -> str | None:
    """Why cuDNN's fused convolutions can't run on this device, with the remedy, or None where they can."""
    if device_type != "cuda":
        return f"cuDNN serves CUDA devices, the tensor is on {device_type}; move it"
    if not torch.backends.cudnn.is_available():
        return "this PyTorch was built without cuDNN; install a CUDA build from PyPI"
    if not torch.backends.cudnn.enabled:
        return "torch.backends.cudnn.enabled is False"
    if torch.backends.cudnn.deterministic or torch.get_deterministic_debug_mode() == 2:
        return (
            "cuDNN's fused convolutions pay no heed to torch.backends.cudnn.deterministic and "
            "torch.use_deterministic_algorithms(True), of which one is set"
        )
    reason = triton.unavailable(device_type, index)
    return reason and f"BN is folded by a Triton kernel, and {reason}"


def lacks(op: str) -> str:
    return CONVOLUTIONS_ONLY.format(name="cudnn")
