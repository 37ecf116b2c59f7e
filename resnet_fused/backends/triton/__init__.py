"""Triton's kernels. An operator's module has the four functions; beside it lie its kernels and what launches them."""

import torch

try:
    import triton
    from triton import knobs
    from triton.runtime.errors import OutOfResources

    IMPORT_ERROR = None
    UNFIT = (OutOfResources,)
except ImportError as error:  # no Triton on this platform
    triton = None
    IMPORT_ERROR = str(error)
    _MISSING = (error.name or "triton").partition(".")[0]  # its interpreter needs NumPy

INTERPRETED = triton is not None and knobs.runtime.interpret  # read once: kernels are decorated at import


def unavailable(device_type: str, index: int | None = None) -> str | None:
    """Why Triton kernels can't run on this device, with the remedy, or None where they can."""
    if triton is None:
        return f"Triton can't be imported ({IMPORT_ERROR}); pip install {_MISSING}"
    if INTERPRETED:
        return None if device_type in ("cpu", "cuda") else f"Triton's interpreter does not take {device_type} tensors"
    if device_type != "cuda":
        return (
            f"Triton's kernels run on CUDA devices, the tensor is on {device_type}; move it, "
            "or set TRITON_INTERPRET=1 before Python starts to run them in Triton's interpreter"
        )
    if torch.version.hip is not None:
        return "ROCm runs eager: the kernels were never tried there"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device; check the driver with nvidia-smi"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the kernels need compute capability 8.0 or later, this device has {major}.{minor}"
    return None


def lacks(op: str) -> str:
    return f"triton has no kernels for {op}"
