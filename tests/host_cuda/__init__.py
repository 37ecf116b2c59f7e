"""The CUDA kernels' own source, compiled for the CPU and run as a loop over blocks and threads."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import backend
import torch
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp"), *(HERE.parents[1] / "csrc").glob("*.cuh")])
FLAGS = ["-shared", "-fPIC", "-O1", "-std=c++17", "-fno-strict-aliasing"]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
BITS = {
    torch.float32: (torch.int32, 0x7FC0DEAD),
    torch.float16: (torch.int16, 0x7EAB),
    torch.bfloat16: (torch.int16, 0x7FEB),
}
GUARD = 64  # elements before and after an output


def unavailable() -> str | None:
    """Why the kernels can't be compiled here, or None."""
    if shutil.which("g++") is None:
        return "g++ is needed to compile the CUDA kernels for the CPU"
    if include_dir() is None:
        return "cuda_bf16.h is needed: from a CUDA toolkit or a CUDA build of PyTorch"
    return None


def include_dir() -> Path | None:
    """CUDA's headers, of the toolkit or of the wheels that PyTorch depends on."""
    toolkit = backend.find_toolkit(os.environ)
    folders = [toolkit / "include"] if toolkit else []
    folders += sorted(Path(torch.__file__).parents[1].glob("nvidia/cu*/include"))
    return next((folder for folder in folders if (folder / "cuda_bf16.h").exists()), None)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, kept in the temporary folder by a hash of what they are made of."""
    key = hashlib.sha256(" ".join([*FLAGS, str(include_dir())]).encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"resnet_fused-host_cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{key.hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as built:
            source = HERE / "batch_norm_act.cpp"
            subprocess.run(["g++", *FLAGS, "-isystem", include_dir(), source, "-o", built.name], check=True)
        os.replace(built.name, path)
    library = ctypes.CDLL(str(path))
    library.host_batch_norm_act.restype = ctypes.c_int64
    return library


class Output:
    """A channels_last tensor between guard zones, all of it filled with one pattern of NaN bits."""

    def __init__(self, x: Tensor, offset: int = 0):
        N, C, H, W = x.shape
        integer, self.pattern = BITS[x.dtype]
        self.bits = torch.full((x.numel() + 2 * GUARD + offset,), self.pattern, dtype=integer)
        self.begin, self.end = GUARD + offset, GUARD + offset + x.numel()
        self.tensor = self.bits[self.begin : self.end].view(x.dtype).view(N, H, W, C).permute(0, 3, 1, 2)

    def check(self) -> Tensor:
        """The tensor, all of it written and nothing beside it."""
        guards = torch.cat([self.bits[: self.begin], self.bits[self.end :]])
        assert (guards == self.pattern).all(), "written outside of the output"
        assert (self.bits[self.begin : self.end] != self.pattern).all(), "part of the output was not written"
        return self.tensor


def host_batch_norm_act(x: Tensor, *args, **options: int) -> tuple[Tensor, Tensor]:
    """`resnet_fused_cuda::batch_norm_act` on CPU tensors, with its arguments and the options of `run`."""
    return run(x, *args, **options)[:2]


def run(x: Tensor, *args, max_threads: int = 132 * 2048, offset: int = 0) -> tuple[Tensor, Tensor, int]:
    """y, the sum and the number of blocks; an offset moves the outputs off their 64-byte alignment, in elements."""
    weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, pre_add, relu = args
    inputs = (x, weight, bias, mean, var, residual, weight2, bias2, mean2, var2, pre_add)
    for t in (x, residual, pre_add):
        assert t is None or t.is_contiguous(memory_format=torch.channels_last)
    stats = mean if mean is not None else mean2
    y, total = Output(x, offset), None if pre_add is None else Output(x, offset)
    blocks = 0
    if x.numel():
        blocks = library().host_batch_norm_act(
            (ctypes.c_void_p * len(inputs))(*(None if t is None else t.data_ptr() for t in inputs)),
            ctypes.c_void_p(y.tensor.data_ptr()),
            ctypes.c_void_p(None if total is None else total.tensor.data_ptr()),
            ctypes.c_int64(x.numel() // x.shape[1]),
            ctypes.c_int64(x.shape[1]),
            ctypes.c_float(eps),
            ctypes.c_bool(relu),
            DTYPES[x.dtype],
            DTYPES[torch.float32 if stats is None else stats.dtype],
            ctypes.c_int64(max_threads),
        )
    return y.check(), x.new_empty(0) if total is None else total.check(), blocks
