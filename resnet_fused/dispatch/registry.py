"""Which backends there are, in what order, what the user forced; which one serves a call, and why not a faster one."""

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

BACKENDS = ("cuda", "triton", "cudnn", "onednn", "eager")  # a folder of `backends` each
_NAMES = ", ".join(("auto", *BACKENDS))
_ROCM = torch.version.hip is not None
_AUTO_DEVICES = ("cuda",)  # eager everywhere else
# Shape class -> backends, best first; not measured on any GPU yet: cuDNN's kernels for all but 1x1 and the stem, whose
# 3 channels leave cuDNN a single engine.
_ORDER = {
    "batch_norm": ("cuda", "triton"),
    "conv 1x1": ("triton", "cudnn", "cuda"),
    "conv stem": ("triton", "cudnn", "cuda"),
    "conv": ("cudnn", "triton", "cuda"),
    "stem": ("triton", "cuda"),
}
PLAIN = "eager"  # PyTorch's own operators: chosen before the dispatcher where no other could serve
SPLITS_IN_AUTO = ("triton",)  # where one kernel can't, PyTorch's convolution and one fused pass are still the best
_MODULES = {name: importlib.import_module(f"..backends.{name}", __package__) for name in BACKENDS}
_UNAVAILABLE = {name: module.unavailable for name, module in _MODULES.items()}
_implementations: dict[tuple[str, str], ModuleType] = {}  # (backend, operator) -> its four functions

listener: Callable[[str, "Choice", Any], None] | None = None  # set by explain and tune while they run a model
_forced = os.environ.get("RESNET_FUSED_BACKEND", "auto")  # a plain global: a ContextVar would break compiled graphs
_asked: dict[object, str] = {None: _forced}  # by set_backend and every open `with` block, the last in force
_asking = threading.Lock()


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and can't serve: the message names op or module, the reason and the remedy."""

    module: Any = None  # that stands in the way


class Choice(NamedTuple):
    backend: str
    rejected: tuple[tuple[str, str], ...]  # (backend, reason) of every faster one
    gain: float | None = None  # how many times as fast as eager it was when the layer's class was timed


def set_backend(name: str) -> None:
    """Force one backend for every later call, or `"auto"` for the default choice.

    Raises:
        ValueError: `name` is not "auto", "cuda", "triton", "cudnn", "onednn" or "eager".
    """
    global _forced
    _check_name(name)
    with _asking:
        _asked[next(reversed(_asked))] = _forced = name


def get_backend() -> str:
    """The forced backend, or "auto"."""
    return _forced


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend inside a `with` block, and leave what was forced before.

    The choice is the process's: the threads in which autograd and DataParallel run have to see it. Of blocks that
    overlap in several threads the one entered last decides, for all of them, until it ends.

    Raises:
        ValueError: as `set_backend`.
    """
    global _forced
    _check_name(name)
    if torch.compiler.is_compiling():  # one thread, no lock
        previous, _forced = _forced, name
        try:
            yield
        finally:
            _forced = previous
        return
    block = object()
    with _asking:
        _asked[block] = _forced = name
    try:
        yield
    finally:
        with _asking:
            del _asked[block]
            _forced = _asked[next(reversed(_asked))]


def _check_name(name: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {_NAMES}; got {name!r}")


def forced() -> bool:
    """Whether a fused backend was asked for by name."""
    return _forced not in ("auto", PLAIN)


def not_served(what: str, reason: str) -> BackendUnavailable:
    """The error of a forced backend."""
    return BackendUnavailable(
        f"{what}: backend {_forced!r} was asked for and can't serve this: {reason}. "
        'Use backend("auto"), which leaves it to PyTorch, on the command line neither --backend nor '
        "RESNET_FUSED_BACKEND, or mend that."
    )


def fuses(device: torch.device) -> bool:
    """Whether any backend but eager is to be tried on this device."""
    return fuses_by_default(device) if _forced == "auto" else _forced != "eager"


def fuses_by_default(device: torch.device) -> bool:
    """Whether `auto` tries any backend but eager on this device, whatever is forced now."""
    return device.type in _AUTO_DEVICES and not _ROCM


@functools.cache
def add_operator(op: str) -> None:
    """Find the backends that serve an operator: those whose folder has a module of its name."""
    for name, module in _MODULES.items():
        if module.IMPORT_ERROR is None and importlib.util.find_spec(f"{module.__name__}.{op}") is not None:
            _implementations[name, op] = importlib.import_module(f"{module.__name__}.{op}")


def serves(name: str, op: str) -> bool:
    """Whether a backend has the operator at all."""
    return (name, op) in _implementations


def apart_from_auto(device: torch.device) -> list[str]:
    """The backends that are there and worth measuring beside `auto`, which is eager on the CPU."""
    same = ("eager", "triton") if device.type == "cpu" else ()
    return [name for name in BACKENDS if name not in same and unavailable(name, device) is None]


def extension() -> dict[str, Any]:
    """How the compiled extension was built, or the reason why it isn't there."""
    return _MODULES["cuda"].build_info()


def implementation(name: str, op: str) -> ModuleType:
    """The four functions with which a backend serves an operator: unsupported, configs, plan and kernel_class."""
    return _implementations[name, op]


def unsupported(name: str, call: Any) -> str | None:
    """Why a backend that is there can't serve a call, or None; from metadata alone."""
    module = _implementations.get((name, call.op))
    return _MODULES[name].lacks(call.op) if module is None else module.unsupported(call)


def splits(name: str, call: Any) -> str | None:
    """Why a backend needs several kernels for what is one in its others, or None."""
    split = getattr(implementation(name, call.op), "split", None)
    return split and split(call)


def unfit(name: str) -> tuple[type[Exception], ...]:
    """The exceptions with which a backend says that a kernel does not fit a device."""
    return getattr(_MODULES[name], "UNFIT", ())


def unknown(name: str) -> str | None:
    """Why there is no backend of this name, which only the environment can give, or None where there is."""
    if name in ("auto", *BACKENDS):
        return None
    return f"there is no backend {name!r}, RESNET_FUSED_BACKEND must be one of {_NAMES}"


def _unavailable(name: str, device_type: str, index: int | None) -> str | None:
    if name not in _UNAVAILABLE:
        return unknown(name)
    return _UNAVAILABLE[name](device_type, index)


vars(_unavailable)["_dynamo_marked_constant"] = True  # assume_constant_result, without its seconds of imports


def unavailable(name: str, device: torch.device) -> str | None:
    """Why a backend can't run on this device, with the remedy, or None where it can."""
    return _unavailable(name, device.type, device.index)


def choose(
    op: str, device: torch.device, against: Callable[[str], str | None], order: str, preferred: str | None = None
) -> Choice:
    """The backend for one call: the first candidate that is there and that nothing speaks against.

    Args:
        against: of a backend's name, why it can't or should not serve, or None.
        order: the call's shape class in the table of defaults.
        preferred: a backend to try before these, the fastest on this device where that is known.

    Raises:
        BackendUnavailable: the forced backend can't serve the call.
    """
    rejected: tuple[tuple[str, str], ...] = ()
    for name in candidates(device, order, preferred):
        reason = unavailable(name, device) or against(name)
        if reason is None:
            return Choice(name, rejected)
        rejected = (*rejected, (name, reason))
    if forced():
        raise not_served(op, rejected[0][1])
    return Choice("eager", rejected)


def candidates(device: torch.device, order: str, preferred: str | None = None) -> tuple[str, ...]:
    """The fused backends to try, best first."""
    names = _ORDER[order]  # looked up for eager too: a class without a line fails on the CPU
    if not fuses(device):
        return ()
    if _forced != "auto":
        return (_forced,)
    return names if preferred not in names else (preferred, *names)


@contextlib.contextmanager
def heard_by(listen: Callable[[str, Choice, Any], None] | None) -> Iterator[None]:
    """What serves every call inside the block is told to this listener alone, or to none."""
    global listener
    before, listener = listener, listen
    try:
        yield
    finally:
        listener = before


def record(op: str, choice: Choice, call: Any = ()) -> None:
    """Tell a listening `explain` or `tune` what serves a call."""
    if listener is not None:
        listener(op, choice, call)
