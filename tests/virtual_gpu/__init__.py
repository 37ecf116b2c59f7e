"""A CUDA device made of the CPU: see README.md."""

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from .build import HERE, build

CAPABILITIES = (80, 86, 89, 90, 100, 120)

_library: ctypes.CDLL | None = None


def install(capability: int) -> None:
    """From here on this process has CUDA devices of that compute capability; call it before torch is imported.

    Raises:
        ValueError: the capability is not one of CAPABILITIES.
        RuntimeError: torch was imported before, or the device does not build.
    """
    global _library
    if capability not in CAPABILITIES:
        raise ValueError(f"capability must be one of {CAPABILITIES}, got {capability}")
    if "torch" in sys.modules:
        raise RuntimeError("the virtual GPU has to be installed before torch is imported")
    folder = build()
    os.environ["VIRTUAL_GPU_CAPABILITY"] = str(capability)
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # every tensor ends at the edge of its own allocation
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")  # what it caches is no cubin: kept apart from the user's
    os.environ["VIRTUAL_GPU_PTXAS"] = str(Path(find_spec("triton").origin).parent / "backends/nvidia/bin/ptxas")
    os.environ["TRITON_PTXAS_PATH"] = os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = str(HERE / "ptxas")
    os.environ.pop("TRITON_INTERPRET", None)
    _library = ctypes.CDLL(str(folder / "libcuda.so.1"), ctypes.RTLD_GLOBAL)  # its symbols come before libcudart's
    _library.vgpu_message.restype = _library.vgpu_launches_by_name.restype = ctypes.c_char_p
    _library.vgpu_launches.restype = _library.vgpu_planted.restype = ctypes.c_long
    if planted := os.environ.get("VIRTUAL_GPU_PLANT"):  # "original=>defect"
        plant(*planted.split("=>"))
    from . import torch_operators

    torch_operators.install(_library)


def message() -> str:
    """Of the last thing that the device refused."""
    return _library.vgpu_message().decode()


def forget_errors() -> None:
    """Run what is pending, and be a device again that never failed."""
    _library.vgpu_forget_errors()


def launches() -> int:
    """Kernels launched since the start; PyTorch's own operators are none."""
    return _library.vgpu_launches()


def launches_by_name() -> dict[str, int]:
    lines = _library.vgpu_launches_by_name().decode().splitlines()
    return {name: int(count) for name, count in (line.rsplit(" ", 1) for line in lines)}


def seed(value: int) -> None:
    """The schedule of warps, asynchronous copies and streams in every later launch."""
    _library.vgpu_seed(ctypes.c_uint64(value))


def plant(original: str, defect: str) -> None:
    """Replace a text in the PTX of every module that is loaded from now on."""
    _library.vgpu_plant(original.encode(), defect.encode())


def planted() -> int:
    """How many places `plant` has changed."""
    return _library.vgpu_planted()


def read_only(address: int, value: bool = True) -> None:
    """Whether a kernel's write into the allocation around this address is an error."""
    if not _library.vgpu_read_only(ctypes.c_void_p(address), int(value)):
        raise ValueError(f"{address:#x} is no device memory")
