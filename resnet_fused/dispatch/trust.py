"""Trust is earned on the user's own device: a class of kernels is compared with eager once, before its first use."""

import warnings
from collections.abc import Callable

import torch

from . import plans
from .store import Store

_stores: dict[torch.device, Store] = {}  # verdicts: "" where the kernels passed, else what was wrong
_warned: set[str] = set()
_raised: dict[tuple[str, torch.device], str] = {}  # what a check raised that says nothing about the kernel


class Passing(str):
    """A reason that may be gone at the next call: what was decided for it is not kept."""


def refused(
    key: str, device: torch.device, compare: Callable[[], str | None], unfit: tuple[type[Exception], ...] = ()
) -> str | None:
    """Why the kernels of this class must not serve, or None where they gave eager's numbers on this device.

    What is kept on disk: that they did, that their numbers were wrong, and that they don't fit the device.

    Args:
        key: names op, backend and all that makes another compiled kernel.
        compare: runs the kernel and eager on inputs of its own; what is wrong with the kernel's numbers, or None.
        unfit: the exceptions that say that a kernel does not fit the device.
    """
    store = _stores.get(device)
    if store is None:
        store = _stores[device] = Store("verdicts", device)
    if (key, device) in _raised:
        return _raised[key, device]
    if key not in store.entries:
        if capturing(device):
            reason = f"{key} was not checked before a CUDA graph was captured; run the model once before capture"
            _warn_once(f"resnet_fused: {reason}. This capture holds eager's kernels instead.")
            return Passing(reason)
        try:
            with torch.no_grad():
                verdict = compare() or ""
        except torch.OutOfMemoryError:
            reason = "there was no memory left to check it"
            _warn_once(f"resnet_fused: {key} does not serve yet: {reason}.", reason)
            return Passing(reason)
        except unfit as error:
            verdict = f"it raised {described(error)}"
        except Exception as error:  # no compiler, no space on disk, a lost device: nothing about the kernel
            reason = f"its check raised {described(error)}"
            _warn_once(f"resnet_fused: {key} does not serve in this process: {reason}.", reason)
            _raised[key, device] = reason
            return reason
        store[key] = verdict
    wrong = store.entries[key]
    if not wrong:
        return None
    _warn_once(f"resnet_fused: {key} is disabled on this device: {wrong}. Eager serves instead.")
    return f"{key} is disabled on this device: {wrong}"


def failed(name: str, error: Exception) -> str:
    """The reason of a backend whose first launch for a kind of calls failed, told once."""
    reason = f"its launch raised {described(error)}"
    _warn_once(f"resnet_fused: {name} does not serve calls like this one: {reason}. The next backend does.")
    return reason


def described(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def forget() -> None:
    """Drop the verdicts in memory; those on disk are read anew."""
    plans.forget()
    _stores.clear()
    _warned.clear()
    _raised.clear()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, inside which nothing can be checked."""
    return _on_gpu(device) and torch.cuda.is_current_stream_capturing()


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _warn_once(message: str, about: str | None = None) -> None:
    """about: what was told before, in this message or another."""
    about = message if about is None else about
    if about not in _warned:
        _warned.add(about)
        warnings.warn(message, stacklevel=2)
