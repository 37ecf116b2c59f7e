"""The stand-in for CUDA in host_cuda: what it runs, and what it catches."""

import ctypes
import shutil
from pathlib import Path

import host_cuda
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(host_cuda.unavailable() is not None, reason=str(host_cuda.unavailable()))

THREADS = 64
THREAD = torch.arange(THREADS)


def run(what: int, seed: int) -> Tensor:
    """Two blocks of the kernel in primitives.cpp."""
    kernels = host_cuda.library("primitives")
    kernels.run.restype = ctypes.c_char_p
    out = host_cuda.Guarded((2, THREADS), torch.float32)
    fault = kernels.run(what, seed, ctypes.c_void_p(out.tensor.data_ptr()))
    if fault is not None:
        raise host_cuda.KernelFault(fault.decode())
    return out.check()


@pytest.mark.parametrize("seed", range(5))
def test_barriers_and_exchanges(seed):
    assert torch.equal(run(0, seed), torch.stack([63.0 - THREAD, 127.0 - THREAD]))
    warp, lane = THREAD // 32 * 32, THREAD % 32
    down = torch.where(lane < 16, THREAD + 16, THREAD)
    expected = (THREAD ^ 1) + 100 * (warp + 5) + 10000 * down + 0.5 * (THREAD % 3 == 0)
    assert torch.equal(run(1, seed), expected.expand(2, -1))


def test_shared_memory_is_nan_in_every_block():
    assert run(2, 0).isnan().all()


@pytest.mark.parametrize(
    "what, message",
    [
        (3, "not every thread reaches the same barrier"),
        (4, "not every thread reaches the same barrier"),
        (5, "only exchanges of whole warps"),
        (6, "thread 63: an index is beyond the end"),
        (7, "block 1, thread .* no access to address"),
    ],
)
def test_faults(what, message):
    with pytest.raises(host_cuda.KernelFault, match=message):
        run(what, 1)
    run(0, 1)  # the next launch is sound


def test_the_guards_see_a_stray_write():
    output = host_cuda.Guarded((1, 2, 3, 4), torch.float32)
    output.tensor.zero_()
    output.check()
    output.bits[output.begin - 1] = 0
    with pytest.raises(AssertionError, match="outside"):
        output.check()


def planted(folder: Path, before: str, after: str) -> Path:
    """The kernels with one edit of csrc/batch_norm_statistics.cuh."""
    for header in host_cuda.CSRC.glob("*.cuh"):
        shutil.copy(header, folder)
    edited = folder / "batch_norm_statistics.cuh"
    source = edited.read_text()
    assert source.count(before) == 1
    edited.write_text(source.replace(before, after))
    return folder


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 64, 9, 9).contiguous(memory_format=torch.channels_last)


def test_a_missing_barrier_is_caught(x, tmp_path):
    right = host_cuda.statistics(x)
    csrc = planted(tmp_path, "  __syncthreads();\n", "")
    for seed in range(5):
        for wrong, value in zip(host_cuda.statistics(x, seed=seed, csrc=csrc)[:2], right[:2], strict=True):
            assert not torch.allclose(wrong, value)


def test_an_off_by_one_is_caught(x, tmp_path):
    csrc = planted(tmp_path, "x[u] = load_x(row);", "x[u] = load_x(row + 1);")
    with pytest.raises(host_cuda.KernelFault, match="no access to address"):
        host_cuda.statistics(x, csrc=csrc)
