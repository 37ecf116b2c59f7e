"""The whole way of a call on a machine without a GPU, up to launches that do nothing."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ..backends import triton
from . import plans, registry, trust


@contextlib.contextmanager
def stubbed(listener: Callable[[str, dict[str, Any], dict[str, Any]], None] | None = None) -> Iterator[None]:
    """CPU tensors take the way of a GPU's: compiled Triton kernels, never launched, serve in `auto`.

    listener: is told every launch: the kernel's name, its tensors by parameter, each with whether it is read and
        written, and its constants; then nothing is compiled, and tensors need no memory.

    Raises:
        RuntimeError: Triton is missing, or runs its interpreter.
    """
    if triton.IMPORT_ERROR is not None or triton.INTERPRETED:
        raise RuntimeError("launches can be stubbed where Triton is installed and TRITON_INTERPRET is not set")
    from ..backends.triton import stub

    before = registry._UNAVAILABLE["triton"], registry._AUTO_DEVICES, trust.refused
    registry._UNAVAILABLE["triton"], registry._AUTO_DEVICES = lambda *device: None, ("cpu",)
    trust.refused = lambda *args: None
    plans.forget()
    try:
        with stub.stubbed(), stub.recorded(listener) if listener else contextlib.nullcontext():
            yield
    finally:
        registry._UNAVAILABLE["triton"], registry._AUTO_DEVICES, trust.refused = before
        plans.forget()


@contextlib.contextmanager
def unlaunched(listener: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside `stubbed`: launches are not even prepared; the listener is told each."""
    from ..backends.triton import stub

    with stub.replaced(lambda *args, **kwargs: listener()):
        yield
