"""Trust is earned on the user's own device: a class of kernels is compared with eager once, before its first use."""

import warnings
from collections.abc import Callable

import torch

from . import plans
from .store import Store

_stores: dict[torch.device, Store] = {}  # verdicts: "" where the kernels passed, else what was wrong
_warned: set[str] = set()


def refused(key: str, device: torch.device, compare: Callable[[], str | None]) -> str | None:
    """Why the kernels of this class must not serve, or None where they gave eager's numbers on this device.

    Args:
        key: names op, backend, dtype and every switch that gives another compiled kernel.
        compare: runs the kernel and eager on inputs of its own; what is wrong with the kernel's numbers, or None.
    """
    store = _stores.get(device)
    if store is None:
        store = _stores[device] = Store("verdicts", device)
    if key not in store.entries:
        if capturing(device):
            reason = f"{key} was not checked before a CUDA graph was captured; run the model once before capture"
            _warn_once(f"resnet_fused: {reason}. This capture holds eager's kernels instead.")
            return reason
        store[key] = _verdict(compare)
    wrong = store.entries[key]
    if not wrong:
        return None
    _warn_once(f"resnet_fused: {key} is disabled on this device: {wrong}. Eager serves instead.")
    return f"{key} is disabled on this device: {wrong}"


def forget() -> None:
    """Drop the verdicts in memory; those on disk are read anew."""
    plans.forget()
    _stores.clear()
    _warned.clear()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, inside which nothing can be checked."""
    return _on_gpu(device) and torch.cuda.is_current_stream_capturing()


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _verdict(compare: Callable[[], str | None]) -> str:
    try:
        with torch.no_grad():
            return compare() or ""
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # nothing about the kernel; a lost device is not kept
        raise
    except Exception as error:  # a kernel that does not compile or launch here is as unfit as a wrong one
        return f"it raised {type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)
