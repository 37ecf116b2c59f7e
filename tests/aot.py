"""Compile every Triton kernel ahead of time for GPUs that need not be there: registers, spills, shared memory, MMA.

    python tests/aot.py            every configuration that a tuner may try
    python tests/aot.py --quick    the default configurations

The launchers run on meta tensors and their launches are recorded, so what is compiled is what they launch. Exits with 1
on a spill, on more shared memory than the architecture has, where a 16-bit convolution uses no wgmma on sm_90, where
one in TF32 uses no tensor cores or cuts its operands, or where a mean is not rounded to nearest.
"""

import argparse
import inspect
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # compiled, not interpreted

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from resnet_fused.backends.triton import (  # noqa: E402
    batch_norm_apply,
    batch_norm_train,
    stem,  # noqa: E402
)
from resnet_fused.backends.triton import conv as conv_bn_act  # noqa: E402
from resnet_fused.backends.triton.fold import fold  # noqa: E402
from resnet_fused.ops.stem import Call as Stem  # noqa: E402

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
POINTERS = TYPES | {torch.uint8: "u8"}  # the ReLU mask
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
MMA = ("wgmma.mma_async", "mma.sync", "tcgen05.mma")


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages


class Conv(NamedTuple):
    name: str
    C: int
    size: int  # H = W
    K: int
    R: int
    stride: int = 1
    groups: int = 1
    residual: bool = False
    relu: bool = True


CONVS = [
    Conv("stem", 3, 224, 64, 7, 2),
    Conv("1x1", 256, 56, 64, 1),
    Conv("1x1-join", 64, 56, 256, 1, residual=True),
    Conv("1x1-s2", 256, 56, 512, 1, 2, relu=False),
    Conv("3x3", 64, 56, 64, 3),
    Conv("3x3-s2", 128, 56, 128, 3, 2),
    Conv("3x3-join", 64, 56, 64, 3, residual=True),
    Conv("3x3-g16", 512, 14, 512, 3, groups=32),
    Conv("3x3-g32", 1024, 7, 1024, 3, groups=32),
]
MORE_CONVS = [  # other configurations of the same kernels
    Conv("1x1-wide", 2048, 7, 512, 1),
    Conv("1x1-wide-join", 512, 7, 2048, 1, residual=True),
    Conv("1x1-downsample", 64, 56, 256, 1, relu=False),
    Conv("3x3-wide", 512, 7, 512, 3),
    Conv("3x3-s2-g16", 1024, 14, 1024, 3, 2, groups=64),
]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside the block are listed instead of run."""
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        arguments = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
        launches.append(Launch(kernel, arguments, options))

    before, JITFunction.run = JITFunction.run, run
    try:
        yield launches
    finally:
        JITFunction.run = before


def source(launch: Launch) -> ASTSource:
    """What Triton's launcher would make of the arguments: types, constants and divisibility by 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialized = type(value) is int and not parameter.do_not_specialize
        constant = parameter.is_constexpr or value is None or (specialized and value == 1)
        if constant:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{POINTERS[value.dtype]}"
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
        divisible = isinstance(value, Tensor) or (specialized and value % 16 == 0)
        if divisible and not constant:
            attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def batch_norm_launches(dtype: torch.dtype) -> Iterator[Launch]:
    """Every ending of ResNet-50's blocks."""
    x = torch.empty((256, 256, 56, 56), dtype=dtype, device="meta", memory_format=torch.channels_last)
    bn = [torch.empty(256, device="meta")] * 4
    none = [None] * 4
    for residual, residual_bn, pre_add in [(None, none, None), (x, none, None), (x, bn, None), (x, none, x)]:
        with recorded() as launches:
            batch_norm_apply.apply(x, *bn, 1e-5, residual, *residual_bn, pre_add, True)
        yield from launches


def training_launches(dtype: torch.dtype) -> Iterator[Launch]:
    """Statistics, and the backward pass of every ending, with the batch's statistics and with given ones."""
    x = torch.empty((256, 256, 56, 56), dtype=dtype, device="meta", memory_format=torch.channels_last)
    bn = [torch.empty(256, device="meta")] * 4
    none = [None] * 4
    count = torch.empty(1, device="meta")
    with recorded() as launches:
        batch_norm_train.statistics(x)
        batch_norm_train.statistics(x, x)
        for running in (bn[:2], [None, None]):
            batch_norm_train.merge_ranks(torch.empty((8, 513), device="meta"), *running, 0.1)
        for pre_add, running in [(None, bn[:2]), (x, bn[:2]), (None, [None, None])]:
            batch_norm_train.plan_batch_statistics(x, pre_add, *running)(x, pre_add, *running, 0.1)
        mask = batch_norm_train.apply_with_mask(x, *bn, 1e-5, x)[1]
        for residual, bn2, relu_mask, dtotal in [
            (None, none, None, None),
            (None, none, None, x),
            (None, none, mask, None),
            (x, none, None, None),
            (x, bn, None, None),
        ]:
            call = (x, x, *bn, 1e-5, residual, *bn2, relu_mask, True)
            join = residual is not None or relu_mask is not None
            sums = batch_norm_train.backward_sums(*call)
            rhat = None if bn2[2] is None else sums[2]
            for own in (None, count):  # one process, several
                batch_norm_train.backward_dx(*call, *sums[:2], rhat, own, dtotal, True, join)
            batch_norm_train.backward_dx(*call, None, None, None, None, dtotal, True, join)
    yield from launches


def fold_launches(dtype: torch.dtype) -> Iterator[Launch]:
    """BN folded for cuDNN's convolutions."""
    bn = [torch.empty(64, device="meta")] * 4
    with recorded() as launches:
        fold(torch.empty((64, 64, 3, 3), dtype=dtype, device="meta"), None, *bn, 1e-5)
    yield from launches


def conv_launches(conv: Conv, batch: int, dtype: torch.dtype, tf32: bool, arch: int, quick: bool) -> Iterator[Launch]:
    """The default configuration, or every candidate."""
    shape, weight_shape = (batch, conv.C, conv.size, conv.size), (conv.K, conv.C // conv.groups, conv.R, conv.R)
    geometry = ([conv.stride] * 2, [conv.R // 2] * 2, [1, 1], conv.groups)
    assert conv_bn_act.unsupported(shape, weight_shape, *geometry, dtype) is None
    device = {"capability": divmod(arch, 10), "multiprocessors": MULTIPROCESSORS[arch]}
    problem = conv_bn_act.problem(shape, weight_shape, *geometry, dtype, allow_tf32=tf32, **device)
    x = torch.empty(shape, dtype=dtype, device="meta")
    weight = torch.empty(weight_shape, dtype=dtype, device="meta")
    bn = [torch.empty(conv.K, device="meta")] * 4
    out = (conv.size - 1) // conv.stride + 1
    residual = torch.empty((batch, conv.K, out, out), dtype=dtype, device="meta") if conv.residual else None
    configs = conv_bn_act.candidates(problem)
    for config in configs[:1] if quick else configs:
        with recorded() as launches:
            arguments = (x, weight, None, *bn, 1e-5, *geometry, residual, conv.relu)
            conv_bn_act.conv_bn_act(*arguments, allow_tf32=tf32, config=config)
        yield from launches


def stem_launches(dtype: torch.dtype, tf32: bool, arch: int, quick: bool) -> Iterator[Launch]:
    """Images of the weight's dtype and of bytes; the default configuration for ImageNet's, or every candidate."""
    before, conv_bn_act.device = conv_bn_act.device, lambda index: (divmod(arch, 10), MULTIPROCESSORS[arch])
    weight, vector = (
        torch.empty(shape, dtype=t, device="meta") for shape, t in (((64, 3, 7, 7), dtype), (64, torch.float32))
    )
    torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
    for batch, of in itertools.product((256,) if quick else (256, 1), (dtype, torch.uint8)):
        normalization = [torch.empty(3, device="meta") if of == torch.uint8 else None] * 2
        x = torch.empty((batch, 3, 224, 224), dtype=of, device="meta")
        for layout in (torch.contiguous_format, torch.channels_last):
            call = Stem(x.contiguous(memory_format=layout), weight, *[vector] * 4, 1e-5, *normalization)
            configs = stem.configs(call)
            for config in configs[:1] if quick else configs:
                with recorded() as launches:
                    stem.plan(call, config)(call)
                yield from launches
    conv_bn_act.device = before


class Job(NamedTuple):
    name: str
    arch: int
    dtype: torch.dtype
    launch: Launch


def jobs(arch: int, quick: bool) -> Iterator[Job]:
    for dtype in TYPES:
        if quick and dtype == torch.float16 and arch != 90:  # bfloat16's kernels with another instruction
            continue
        for launch in batch_norm_launches(dtype):
            yield Job(f"{TYPES[dtype]} batch_norm_act", arch, dtype, launch)
        for launch in training_launches(dtype):
            yield Job(f"{TYPES[dtype]} batch_norm_train", arch, dtype, launch)
        for launch in fold_launches(dtype):
            yield Job(f"{TYPES[dtype]} fold", arch, dtype, launch)
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            for launch in stem_launches(dtype, tf32, arch, quick):
                yield Job(f"{'tf32' if tf32 else TYPES[dtype]} stem + pool", arch, dtype, launch)
            for conv in CONVS if quick else CONVS + MORE_CONVS:
                for batch in (256,) if quick else (256, 32, 1):
                    for launch in conv_launches(conv, batch, dtype, tf32, arch, quick):
                        yield Job(f"{'tf32' if tf32 else TYPES[dtype]} {conv.name}", arch, dtype, launch)


def unique(all_jobs: Iterator[Job]) -> list[Job]:
    """One job for each kernel that differs."""
    found = {}
    for job in all_jobs:
        found.setdefault((job.arch, source(job.launch).hash(), str(job.launch.options)), job)
    return list(found.values())


def compile_job(task: tuple[int, bool, int]) -> tuple[str, list[str]]:
    """The line to print, and what is wrong."""
    arch, quick, index = task
    job = _jobs(arch, quick)[index]
    launch, target = job.launch, GPUTarget("cuda", job.arch, 32)
    start = time.perf_counter()
    compiled = triton.compile(source(launch), target=target, options=launch.options)
    seconds = time.perf_counter() - start
    usage = resource_usage(compiled.asm["cubin"])
    spilled, shared = usage["STACK"] + usage["LOCAL"], compiled.metadata.shared
    mma = {name: compiled.asm["ptx"].count(name) for name in MMA}
    blocks = [str(v) for k, v in launch.arguments.items() if k.startswith("BLOCK_")]
    shape = f"{'x'.join(blocks)} w{launch.options['num_warps']} s{launch.options.get('num_stages', 3)}"
    counts = " ".join(f"{name} {n}" for name, n in mma.items() if n) or "no mma"
    line = (
        f"sm_{job.arch} {job.name:20} {launch.kernel.__name__:17} {shape:18} {usage['REG']:3} registers, "
        f"{spilled} B spilled, {shared:6} B shared, {counts} ({seconds:.1f} s)"
    )
    wrong = []
    if spilled:
        wrong.append(f"spills {spilled} bytes")
    if shared > SHARED[job.arch]:
        wrong.append(f"needs {shared} bytes of shared memory, sm_{job.arch} has {SHARED[job.arch]}")
    is_16_bit_conv = ".conv." in launch.kernel.fn.__module__ and job.dtype.itemsize == 2
    if is_16_bit_conv and job.arch == 90 and not mma["wgmma.mma_async"]:
        wrong.append("has no wgmma")
    if launch.arguments.get("PRECISION") == "tf32" and job.dtype == torch.float32:
        if not any(mma.values()):
            wrong.append("has no MMA")
        if "cvt.rna.tf32.f32" not in compiled.asm["ptx"]:
            wrong.append("cuts its operands to TF32 where cuDNN rounds them")
    if takes_means(launch) and "div.rn.f32" not in compiled.asm["ptx"]:
        wrong.append("takes means without rounding to nearest")
    return line, wrong


def takes_means(launch: Launch) -> bool:
    """Whether the kernel divides sums by a count: once a program, so a division to nearest costs nothing."""
    name, arguments = launch.kernel.__name__, launch.arguments
    if name == "dx_kernel":
        return arguments["sum_xhat"] is not None
    return name in ("statistics_kernel", "merge_ranks_kernel") or (name == "merge_kernel" and "M" in arguments)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL in bytes, as cuobjdump reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", output)}


_found: dict[tuple[int, bool], list[Job]] = {}


def _jobs(arch: int, quick: bool) -> list[Job]:
    """The same list in every worker: kernels do not pickle."""
    if (arch, quick) not in _found:
        _found[arch, quick] = unique(jobs(arch, quick))
    return _found[arch, quick]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the default configurations only, float16 only on sm_90")
    parser.add_argument("--arch", type=int, nargs="+", choices=list(SHARED), default=list(SHARED))
    args = parser.parse_args(argv)
    tasks = [(arch, args.quick, i) for arch in args.arch for i in range(len(_jobs(arch, args.quick)))]
    print(f"triton {triton.__version__}: {len(tasks)} kernels")
    failures = 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            for line, wrong in pool.imap(compile_job, tasks):
                print(line, *(f"<- {w}" for w in wrong), flush=True)
                failures += bool(wrong)
    print(f"{failures} of {len(tasks)} kernels are wrong" if failures else "all kernels are right")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
