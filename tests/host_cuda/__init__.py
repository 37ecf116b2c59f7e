"""The CUDA kernels' own source, compiled for the CPU: every thread a fiber, every tensor before a page that faults.

The operators have the signatures of `resnet_fused.backends.cuda.kernels`, and options for how they run: `seed` of the
threads' order, `max_blocks` to sweep over more rows a thread, `max_threads` of the device, `offset` in elements
by which the outputs leave their alignment.
"""

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import backend
import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = "-shared -fPIC -O1 -std=c++17 -fvisibility=hidden -fno-strict-aliasing -fno-gnu-unique -U_FORTIFY_SOURCE"
CHECKS = "-fsanitize=bounds -fsanitize-undefined-trap-on-error"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
BITS = {
    torch.float32: (torch.int32, 0x7FC0DEAD),
    torch.float16: (torch.int16, 0x7EAB),
    torch.bfloat16: (torch.int16, 0x7FEB),
    torch.uint8: (torch.uint8, 0xA5),
}
GUARD = 1024  # bytes before a tensor


class KernelFault(Exception):
    """What a kernel did wrong, and in which block and thread."""


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
def library(name: str, csrc: Path = CSRC) -> ctypes.CDLL:
    """The compiled `name`.cpp, kept in the temporary folder by a hash of what it is made of."""
    flags = [*FLAGS.split(), *CHECKS.split(), "-isystem", str(include_dir())]
    key = hashlib.sha256(" ".join(flags).encode())
    for source in sorted([*HERE.glob("*.h"), HERE / f"{name}.cpp", *csrc.glob("*.cuh")]):
        key.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"resnet_fused-host_cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{name}-{key.hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as built:
            subprocess.run(["g++", *flags, "-I", csrc, HERE / f"{name}.cpp", "-o", built.name], check=True)
        os.replace(built.name, path)
    return ctypes.CDLL(str(path))


class Guarded:
    """A tensor between a zone of one pattern of NaN bits, which fills it too, and a page that faults."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0):
        integer, self.pattern = BITS[dtype]
        numel = torch.Size(shape).numel()
        size = -(-(numel * dtype.itemsize + GUARD) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.bits = torch.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), dtype=integer)[: size // dtype.itemsize]
        self.bits.fill_(self.pattern)
        self.end = len(self.bits) - offset
        self.begin = self.end - numel
        tensor = self.bits[self.begin : self.end].view(dtype)
        if len(shape) == 4:
            N, C, H, W = shape
            self.tensor = tensor.view(N, H, W, C).permute(0, 3, 1, 2)
        else:
            self.tensor = tensor.view(shape)
        self._protect(self.bits.data_ptr() + size, mmap.PAGESIZE, 0)

    @classmethod
    def copy(cls, t: Tensor) -> "Guarded":
        """A copy that can't be written."""
        copy = cls(t.shape, t.dtype)
        copy.tensor.copy_(t)
        copy._protect(copy.bits.data_ptr(), copy.bits.nbytes, mmap.PROT_READ)
        return copy

    def check(self) -> Tensor:
        """The tensor, all of it written and nothing beside it."""
        guards = torch.cat([self.bits[: self.begin], self.bits[self.end :]])
        assert (guards == self.pattern).all(), "written outside of the output"
        if self.tensor.is_floating_point():
            assert (self.bits[self.begin : self.end] != self.pattern).all(), "part of the output was not written"
        return self.tensor

    @staticmethod
    def _protect(address: int, size: int, protection: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")


class _Inputs(ctypes.Structure):
    _fields_ = [("data", ctypes.POINTER(ctypes.c_void_p)), ("is_float", ctypes.POINTER(ctypes.c_bool))]

    @classmethod
    def of(cls, tensors: list[Tensor | None]) -> "_Inputs":
        data = (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
        flags = (ctypes.c_bool * len(tensors))(*(t is not None and t.dtype == torch.float32 for t in tensors))
        return cls(data, flags)


class Run(ctypes.Structure):
    """How a kernel runs: `max_blocks` in place of the plan's where positive, from which block, the order's seed."""

    _fields_ = [("max_blocks", ctypes.c_int64), ("first_block", ctypes.c_int64), ("seed", ctypes.c_uint)]


def call(library: ctypes.CDLL, name: str, inputs: tuple[Tensor | None, ...], run: Run, *args: object) -> None:
    """One function of a library on tensors and C values; the first input is the activation.

    Raises:
        KernelFault: a kernel left its memory, or its threads wait in vain.
    """
    x = inputs[0]
    arguments = [_pointer(a) if a is None or isinstance(a, Tensor) else a for a in args]
    function = library[name]
    function.restype = ctypes.c_char_p
    shape = ctypes.c_int64(x.numel() // x.shape[1]), ctypes.c_int64(x.shape[1])
    fault = function(_Inputs.of(inputs), run, DTYPES[x.dtype], *shape, *arguments)
    if fault is not None:
        raise KernelFault(f"{name}: {fault.decode()}")


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def _guard(*tensors: Tensor | None) -> list[Tensor | None]:
    for t in tensors:
        assert t is None or t.dim() != 4 or t.is_contiguous(memory_format=torch.channels_last)
    return [None if t is None else Guarded.copy(t).tensor for t in tensors]


def _image(x: Tensor, offset: int = 0) -> Guarded:
    return Guarded(x.shape, x.dtype, offset)


def _vector(size: int) -> Guarded:
    return Guarded((size,), torch.float32)


def _tensor(output: Guarded | None) -> Tensor | None:
    return None if output is None else output.tensor


def _checked(x: Tensor, output: Guarded | None) -> Tensor:
    return x.new_empty(0) if output is None else output.check()


def batch_norm_act(x: Tensor, *args: object, **options: int) -> tuple[Tensor, Tensor]:
    return batch_norm_act_and_blocks(x, *args, **options)[:2]


def batch_norm_act_and_blocks(
    x: Tensor, *args: object, max_threads: int = 132 * 2048, offset: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor, int]:
    """y, the sum, and the number of blocks."""
    weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, pre_add, relu = args
    inputs = _guard(x, weight, bias, mean, var, residual, weight2, bias2, mean2, var2, pre_add)
    y, total = _image(x, offset), None if pre_add is None else _image(x, offset)
    blocks = ctypes.c_int64(0)
    if x.numel():
        outputs = y.tensor, _tensor(total), ctypes.c_int64(max_threads), ctypes.byref(blocks)
        scalars = ctypes.c_float(eps), ctypes.c_bool(relu)
        call(library("batch_norm_act"), "batch_norm_act", inputs, Run(0, 0, seed), *scalars, *outputs)
    return y.check(), _checked(x, total), blocks.value


def apply_with_mask(x, weight, bias, mean, var, eps, residual, max_blocks=0, seed=0) -> tuple[Tensor, Tensor]:
    N, C, H, W = x.shape
    y, mask = _image(x), Guarded((N * H * W, -(-C // 8)), torch.uint8)
    if x.numel():
        inputs = _guard(x, weight, bias, mean, var, residual)
        run, outputs = Run(max_blocks, 0, seed), (ctypes.c_float(eps), y.tensor, mask.tensor)
        call(library("batch_norm_act"), "batch_norm_mask", inputs, run, *outputs)
    return y.check(), mask.check()


def statistics(x, pre_add=None, max_blocks=0, seed=0, csrc=CSRC) -> tuple[Tensor, Tensor, Tensor]:
    return _statistics(x, pre_add, None, None, 0.0, max_blocks, seed, csrc)


def batch_statistics(
    x, pre_add, running_mean, running_var, momentum, max_blocks=0, seed=0
) -> tuple[Tensor, Tensor, Tensor]:
    return _statistics(x, pre_add, running_mean, running_var, momentum, max_blocks, seed, CSRC, var=True)


def _statistics(x, pre_add, running_mean, running_var, momentum, max_blocks, seed, csrc, var=False):
    """mean, M2 or var, and x + pre_add."""
    kernels, run, C = library("batch_norm_statistics", csrc), Run(max_blocks, 0, seed), x.shape[1]
    shape = ctypes.c_int64(x.numel() // C), ctypes.c_int64(C)
    splits = kernels.statistics_splits(run, *shape, ctypes.c_bool(pre_add is not None))
    total, partial = None if pre_add is None else _image(x), _vector(2 * splits * C)
    mean, second = _vector(C), _vector(C)
    with _updated(running_mean, running_var) as running:
        outputs = (
            _tensor(total),
            partial.tensor,
            mean.tensor,
            *((None, second.tensor) if var else (second.tensor, None)),
        )
        inputs = [*_guard(x, pre_add), running_mean, running_var]
        call(kernels, "statistics", inputs, run, *outputs, *running, ctypes.c_float(momentum))
    partial.check()
    return mean.check(), second.check(), _checked(x, total)


@contextlib.contextmanager
def _updated(*vectors: Tensor | None) -> Iterator[list[Tensor | None]]:
    """Guarded copies, which the vectors become."""
    copies = [None if v is None else Guarded(v.shape, v.dtype) for v in vectors]
    for v, copy in zip(vectors, copies, strict=True):
        if v is not None:
            copy.tensor.copy_(v)
    yield list(map(_tensor, copies))
    for v, copy in zip(vectors, copies, strict=True):
        if v is not None:
            v.copy_(copy.check())


def merge_ranks(ranks, running_mean, running_var, momentum, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    C = ranks.shape[1] // 2
    outputs = [_vector(C), _vector(C), _vector(1)]
    with _updated(running_mean, running_var) as running:
        results, options = (o.tensor for o in outputs), (Run(0, 0, seed), ctypes.c_float(momentum))
        call(library("batch_norm_statistics"), "merge_ranks", _guard(ranks), *options, *results, *running)
    mean, var, count = (o.check() for o in outputs)
    return mean, var, count.view(())


def backward_sums(
    dy, z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, relu_mask, relu, max_blocks=0, seed=0
) -> tuple[Tensor, Tensor, Tensor]:
    kernels, run, C = library("batch_norm_backward"), Run(max_blocks, 0, seed), dy.shape[1]
    if dy.numel() == 0:
        return torch.zeros(C), torch.zeros(C), torch.zeros(0 if mean2 is None else C)
    sums = [_vector(C), _vector(C), None if mean2 is None else _vector(C)]
    splits = kernels.backward_splits(run, ctypes.c_int64(dy.numel() // C), ctypes.c_int64(C))
    partial = _vector((2 if mean2 is None else 3) * splits * C)
    inputs = _guard(dy, z, weight, bias, mean, var, residual, weight2, bias2, mean2, var2, relu_mask)
    scalars = ctypes.c_float(eps), ctypes.c_bool(relu)
    call(kernels, "backward_sums", inputs, run, *scalars, partial.tensor, *map(_tensor, sums))
    partial.check()
    return tuple(_checked(mean, s) for s in sums)


def backward_dx(
    dy, z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, relu_mask, relu,
    sum_dz, sum_dz_xhat, sum_dz_rhat, count, dtotal=None, need_dx=True, need_dresidual=False, max_blocks=0, seed=0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    outputs = [_image(dy) if need else None for need in (need_dx, need_dresidual)]
    if dy.numel() and (need_dx or need_dresidual):
        inputs = _guard(dy, z, weight, bias, mean, var, residual, weight2, bias2, mean2, var2, relu_mask)
        inputs += _guard(sum_dz, sum_dz_xhat, sum_dz_rhat, count, dtotal)
        scalars = ctypes.c_float(eps), ctypes.c_bool(relu)
        kernels, run = library("batch_norm_backward"), Run(max_blocks, 0, seed)
        call(kernels, "backward_dx", inputs, run, *scalars, *map(_tensor, outputs))
    return tuple(_checked(dy, output) for output in outputs)
