"""A driver that compiles kernels and never launches them: what Triton costs the host, without a GPU."""

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver

from . import conv, launch

# What each kernel writes, of its parameters; all others are read. Of `PEEKED` a row, of `UPDATED` both.
WRITTEN: dict[str, tuple[str, ...]] = {
    "conv_kernel": ("y",),
    "pointwise_kernel": ("y",),
    "stem_kernel": ("y",),
    "conv_pool_kernel": ("y",),
    "fold_kernel": ("folded_weight", "folded_bias"),
    "apply_kernel": ("y", "total"),
    "apply_with_mask_kernel": ("y", "relu_mask"),
    "statistics_kernel": ("total", "partial"),
    "batch_norm_train.forward.merge_kernel": ("mean", "m2", "var", "running_mean", "running_var"),
    "merge_ranks_kernel": ("mean", "var", "count", "running_mean", "running_var"),
    "sums_kernel": ("partial",),
    "batch_norm_train.backward.merge_kernel": ("sum_dz", "sum_xhat", "sum_rhat"),
    "dx_kernel": ("dx", "dresidual"),
}
UPDATED = ("running_mean", "running_var")
PEEKED = {"batch_norm_train.forward.merge_kernel": ("z",)}

Listener = Callable[[str, dict[str, tuple[Any, bool, bool]], dict[str, Any]], None]

CAPABILITY, MULTIPROCESSORS, SHARED = (9, 0), 132, 227 * 1024  # an H100's


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED, "multiprocessor_count": MULTIPROCESSORS, "warpSize": 32}

    def load_binary(self, *args: Any) -> tuple[Any, ...]:
        return None, 0, 255, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: Any) -> None:
        pass


class _Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


class _Driver:
    utils, launcher_cls = _Utils(), _Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Launches inside the block do nothing; PTX is made and stands for the binary."""
    before = driver._active, CUDABackend.make_cubin, conv.device
    driver.set_active(_Driver())
    CUDABackend.make_cubin = lambda self, src, *args: src.encode()
    conv.device = lru_cache(lambda index: (CAPABILITY, MULTIPROCESSORS))
    try:
        yield
    finally:
        driver._active, CUDABackend.make_cubin, conv.device = before


def key(kernel: Any) -> str:
    """A kernel's name in `WRITTEN`, with its module's where two have the same."""
    module = kernel.fn.__module__.partition(".triton.")[2]
    name = kernel.fn.__name__
    return f"{module}.{name}" if f"{module}.{name}" in WRITTEN else name


@contextlib.contextmanager
def recorded(listener: Listener) -> Iterator[None]:
    """Launches inside the block are told and not made: tensors need no memory.

    listener: of a kernel's name, its tensors by parameter, each with whether it is read and written, and its constants.
    """
    before = launch.Launch.__call__

    def record(self: launch.Launch, *tensors: Any, numbers: tuple[float, ...] = ()) -> None:
        if getattr(launch._written_down, "forms", None) is not None:
            return before(self, *tensors, numbers=numbers)
        name = key(self._kernel)
        written, peeked = WRITTEN[name], PEEKED.get(name, ())
        uses = {}
        for parameter, t in zip(self._kernel.arg_names, tensors, strict=False):
            if t is not None:
                t = getattr(t, "base", t)  # a descriptor's
                t = t[:1, :, :1, :1] if parameter in peeked else t
                uses[parameter] = (t, parameter not in written or parameter in UPDATED, parameter in written)
        listener(name, uses, self._names)

    with replaced(record):
        yield


@contextlib.contextmanager
def replaced(call: Callable[..., None]) -> Iterator[None]:
    """What stands for every launch inside the block."""
    before = launch.Launch.__call__
    launch.Launch.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        launch.Launch.__call__ = before  # type: ignore[method-assign]
