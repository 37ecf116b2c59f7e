"""A driver that compiles kernels and never launches them: what Triton costs the host, without a GPU."""

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver

from . import conv

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
    before = driver._active, CUDABackend.make_cubin, conv._device
    driver.set_active(_Driver())
    CUDABackend.make_cubin = lambda self, src, *args: src.encode()
    conv._device = lru_cache(lambda index: (CAPABILITY, MULTIPROCESSORS))
    try:
        yield
    finally:
        driver._active, CUDABackend.make_cubin, conv._device = before
