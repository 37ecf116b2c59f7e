"""The whole way of a call on a machine without a GPU, up to launches that do nothing."""

import contextlib
from collections.abc import Iterator

from ..backends import triton
from . import plans, registry, trust


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """CPU tensors take the way of a GPU's: compiled Triton kernels, never launched, serve in `auto`.

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
        with stub.stubbed():
            yield
    finally:
        registry._UNAVAILABLE["triton"], registry._AUTO_DEVICES, trust.refused = before
        plans.forget()
