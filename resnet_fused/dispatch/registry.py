"""Which backend serves a call, and why: the only policy in the package."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from . import _cuda, _cudnn, _onednn, _triton

BACKENDS = ("cuda", "triton", "cudnn", "onednn", "eager")
_NAMES = ", ".join(("auto", *BACKENDS))
_AUTO_DEVICES = ("cuda",)  # eager everywhere else
_ORDER = {  # shape class -> backends, best first; not measured on any GPU yet: cuDNN's kernels for all but 1x1
    "batch_norm": ("cuda", "triton"),
    "conv 1x1": ("triton", "cudnn", "cuda"),
    "conv": ("cudnn", "triton", "cuda"),
}
_UNAVAILABLE = {
    "cuda": _cuda.unavailable,
    "triton": _triton.unavailable,
    "cudnn": _cudnn.unavailable,
    "onednn": _onednn.unavailable,
}

listener: Callable[[str, "Choice", tuple], None] | None = None  # set by explain and tune while they run a model
_forced = os.environ.get("RESNET_FUSED_BACKEND", "auto")  # a plain global: a ContextVar would break compiled graphs


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and can't serve the call; the message names the op, the reason and the remedy."""


class Choice(NamedTuple):
    backend: str
    rejected: tuple[tuple[str, str], ...]  # (backend, reason) of every faster one


def set_backend(name: str) -> None:
    """Force one backend for every later call, or `"auto"` for the default choice.

    Raises:
        ValueError: `name` is not "auto", "cuda", "triton", "cudnn", "onednn" or "eager".
    """
    global _forced
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {_NAMES}; got {name!r}")
    _forced = name


def get_backend() -> str:
    """The forced backend, or "auto"."""
    return _forced


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend inside a `with` block, as `set_backend` does; the choice is the process's, not the thread's."""
    global _forced
    previous = _forced
    set_backend(name)
    try:
        yield
    finally:
        _forced = previous


def fuses(device: torch.device) -> bool:
    """Whether any backend but eager is to be tried on this device."""
    if _forced == "auto":
        return device.type in _AUTO_DEVICES and torch.version.hip is None
    return _forced != "eager"


def unknown(name: str) -> str | None:
    """Why there is no backend of this name, which only the environment can give, or None where there is."""
    if name in ("auto", *BACKENDS):
        return None
    return f"there is no backend {name!r}, RESNET_FUSED_BACKEND must be one of {_NAMES}"


def _unavailable(name: str, device_type: str, index: int | None) -> str | None:
    if name == "eager":
        return None
    if name not in _UNAVAILABLE:
        return unknown(name)
    return _UNAVAILABLE[name](device_type, index)


_unavailable._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without its seconds of imports


def unavailable(name: str, device: torch.device) -> str | None:
    """Why a backend can't run on this device, with the remedy, or None where it can."""
    return _unavailable(name, device.type, device.index)


def choose(
    op: str, device: torch.device, supported: Callable[[str], str | None], order: str, first: str | None = None
) -> Choice:
    """The backend for one call: the first candidate that is there and whose `supported(name)` gives no reason against.

    Args:
        order: the call's shape class in the table of defaults.
        first: a backend to try before these, the winner of `tune`.

    Raises:
        BackendUnavailable: the forced backend can't serve the call.
    """
    rejected: tuple[tuple[str, str], ...] = ()
    for name in candidates(device, order, first):
        reason = unavailable(name, device) or supported(name)
        if reason is None:
            return Choice(name, rejected)
        rejected = (*rejected, (name, reason))
    if _forced not in ("auto", "eager"):
        raise BackendUnavailable(
            f"{op}: backend {_forced!r} was asked for and can't serve this call: {rejected[0][1]}. "
            f'Use backend "auto" or "eager", or mend that.'
        )
    return Choice("eager", rejected)


def candidates(device: torch.device, order: str, first: str | None = None) -> tuple[str, ...]:
    """The fused backends to try, best first."""
    if not fuses(device):
        return ()
    if _forced != "auto":
        return (_forced,)
    return _ORDER[order] if first not in _ORDER[order] else (first, *_ORDER[order])


def record(op: str, choice: Choice, args: tuple = ()) -> None:
    """Tell a listening `explain` or `tune` what serves a call, and the registered operator's arguments."""
    if listener is not None:
        listener(op, choice, args)
