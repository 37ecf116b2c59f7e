"""Our own CUDA C++ kernels, in the compiled module `_C`."""

from .extension import build_info, unavailable

__all__ = ["IMPORT_ERROR", "build_info", "lacks", "unavailable"]

IMPORT_ERROR = None  # `unavailable` says where `_C` is missing


def lacks(op: str) -> str:
    return f"cuda has no kernels for {op}"
