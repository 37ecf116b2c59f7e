"""Which backend serves a call, and why: the only policy in the package."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from . import _cuda, _onednn, _triton

BACKENDS = ("cuda", "triton", "cudnn", "onednn", "eager")
_NAMES = ", ".join(("auto", *BACKENDS))
_AUTO = {"cuda": ("cuda", "triton", "cudnn")}  # device type -> order of preference; eager everywhere else
_UNAVAILABLE = {"cuda": _cuda.unavailable, "triton": _triton.unavailable, "onednn": _onednn.unavailable}

listener: Callable[[str, "Choice"], None] | None = None  # set by explain while it runs a model
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
    previous = _forced
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def candidates(device: torch.device) -> tuple[str, ...]:
    """The fused backends to try on this device, best first."""
    if _forced == "auto":
        return _AUTO.get(device.type, ()) if torch.version.hip is None else ()
    return () if _forced == "eager" else (_forced,)


def _unavailable(name: str, device_type: str, index: int | None) -> str | None:
    if name == "eager":
        return None
    if name == "cudnn":
        return "no operator is served by cuDNN's fused kernels yet"
    if name not in _UNAVAILABLE:  # from the environment, which set_backend did not see
        return f"there is no such backend, RESNET_FUSED_BACKEND must be one of {_NAMES}"
    return _UNAVAILABLE[name](device_type, index)


_unavailable._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without its seconds of imports


def unavailable(name: str, device: torch.device) -> str | None:
    """Why a backend can't run on this device, with the remedy, or None where it can."""
    return _unavailable(name, device.type, device.index)


def choose(op: str, device: torch.device, supported: Callable[[str], str | None]) -> Choice:
    """The backend for one call: the first candidate that is there and whose `supported(name)` gives no reason against.

    Raises:
        BackendUnavailable: the forced backend can't serve the call.
    """
    rejected: tuple[tuple[str, str], ...] = ()
    for name in candidates(device):
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


def record(op: str, choice: Choice) -> None:
    """Tell a listening `explain` what served a call."""
    if listener is not None:
        listener(op, choice)
