"""The PTX emulator: kernels of known result, planted bugs that every schedule must catch, arithmetic, tensor maps."""

import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence

import backend
import numpy as np
import pytest

from virtual_gpu import emulator
from virtual_gpu.build import HERE

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to build the emulator")
SEEDS = range(9)
TARGETS = ["sm_80", "sm_90a"]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> Callable[[str], emulator.Module]:
    """emulator_kernels.cu for a target."""
    toolkit = backend.find_toolkit(os.environ)
    if toolkit is None:
        pytest.skip("nvcc is needed to compile the kernels")
    modules = {}

    def module(target: str) -> emulator.Module:
        if target not in modules:
            out = tmp_path_factory.mktemp("ptx") / "kernels.ptx"
            command = [toolkit / "bin/nvcc", "-ptx", "-O2", "-std=c++17", f"-arch={target}"]
            subprocess.run([*command, HERE / "emulator_kernels.cu", "-o", out], check=True)
            modules[target] = emulator.Module(out.read_text())
        return modules[target]

    return module


def pointer(a: np.ndarray) -> bytes:
    return struct.pack("<Q", a.ctypes.data)


def launch(module, kernel, args: Sequence[np.ndarray | int], *, block, grid=(1, 1, 1), **kw):
    """Arrays are passed as pointers to allocations that live as long as the launch, numbers as int."""
    arrays = [a for a in args if isinstance(a, np.ndarray)]
    for a in arrays:
        emulator.allow(a.ctypes.data, a.nbytes)
    params = [pointer(a) if isinstance(a, np.ndarray) else struct.pack("<i", a) for a in args]
    try:
        module.launch(kernel, grid, block if isinstance(block, tuple) else (block, 1, 1), params, **kw)
    finally:
        for a in arrays:
            emulator.forbid(a.ctypes.data)


@pytest.mark.parametrize("target", TARGETS)
def test_every_instruction_is_known(compiled, target):
    module = compiled(target)
    assert {name: lines for name in module.kernels() if (lines := module.unsupported(name))} == {}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", SEEDS)
class TestRight:
    def test_reduce(self, compiled, target, seed):
        x, y = np.arange(1000, dtype=np.float32) % 9, np.zeros(1, np.float32)
        launch(compiled(target), "reduce", [x, y, len(x)], block=256, seed=seed)
        assert y[0] == x.sum()

    def test_transpose(self, compiled, target, seed):
        n = 75
        x = np.arange(n * n, dtype=np.int32).reshape(n, n)
        y = np.zeros_like(x)
        launch(compiled(target), "transpose", [x, y, n], grid=(3, 3, 1), block=(32, 8, 1), seed=seed)
        np.testing.assert_array_equal(y, x.T)

    def test_pipeline(self, compiled, target, seed):
        x, y = np.random.default_rng(seed).integers(0, 9, (7, 512)).astype(np.float32), np.zeros(128, np.float32)
        launch(compiled(target), "pipeline", [x, y, len(x)], block=128, seed=seed)
        np.testing.assert_array_equal(y, np.roll(x.sum(0), -37).reshape(4, 128).sum(0))

    def test_dynamic_shared(self, compiled, target, seed):
        y = np.zeros(64, np.float32)
        launch(compiled(target), "dynamic_shared", [y], block=64, smem=256, seed=seed)
        assert (y == 1).all()

    def test_divergent_loop(self, compiled, target, seed):
        y = np.zeros(32, np.int32)
        launch(compiled(target), "divergent_loop", [y], block=32, seed=seed)
        sums = np.array([sum(range(lane % 7)) if lane % 7 < 6 else 10 for lane in range(32)])
        np.testing.assert_array_equal(y, sums + (sums > 3).sum())

    def test_atomic_sum(self, compiled, target, seed):
        y = np.zeros(4, np.int32)
        launch(compiled(target), "atomic_sum", [y], grid=(3, 1, 1), block=96, seed=seed)
        assert y.tolist() == [3 * 96] + [sum(range(96))] * 3

    def test_bulk_copies(self, compiled, target, seed):
        if target != "sm_90a":
            return
        x, y = np.arange(256, dtype=np.float32), np.zeros(256, np.float32)
        launch(compiled(target), "bulk_load", [x, y], block=256, seed=seed)
        np.testing.assert_array_equal(y, x[::-1])
        launch(compiled(target), "bulk_store", [y], block=256, seed=seed)
        np.testing.assert_array_equal(y, x)


FLOATS = np.zeros(4096, np.float32)  # more than any of these kernels writes
BUGS = {  # kernel: its arguments, its block, and what the error says, one or the other by the schedule
    "transpose_unsynchronised": ([FLOATS[:1024], FLOATS[1024:2048], 32], (32, 8, 1), "race|never written"),
    "pipeline_late_wait": ([FLOATS, FLOATS[:128].copy(), 7], 128, "in flight|never written"),
    "reads_while_overwritten": ([FLOATS], 64, "race: .* was (written|read) by warp"),
    "overwritten_twice": ([FLOATS], 64, "race: .* and is written by warp"),
    "uninitialised": ([FLOATS], 64, "is read, and was never written"),
    "fill": ([FLOATS[:64], 1], 64, "global write of 4 bytes at .* is outside the allocations .*at its byte 256"),
    "misaligned": ([FLOATS], 1, "write of 16 bytes at .* is not aligned"),
    "dynamic_shared": ([FLOATS], 64, "shared write of 4 bytes at .* is outside the CTA's 0 bytes"),
    "half_barrier": ([FLOATS], 128, "deadlock|expected"),
    "divergent_shuffle": ([FLOATS], 32, "reached by some lanes only"),
}
BULK_BUGS = {
    "bulk_load_expects_more": ([FLOATS, FLOATS], 256, "deadlock|expect_tx"),
    "bulk_load_expects_less": ([FLOATS, FLOATS], 256, "deadlock|expect_tx|in flight|never written"),
    "bulk_load_unwaited": ([FLOATS, FLOATS], 256, "in flight|race|never written"),
    "bulk_store_unfenced": ([FLOATS], 256, "without fence.proxy.async"),
    "bulk_store_unwaited": ([FLOATS], 256, "overwritten|no cp.async.bulk.wait_group"),
    "wgmma_unfenced": ([FLOATS, FLOATS, FLOATS], 128, "wgmma reads .* without fence.proxy.async"),
}
PLANTED = [(target, name) for target in TARGETS for name in BUGS] + [("sm_90a", name) for name in BULK_BUGS]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("target, kernel", PLANTED)
def test_planted_bug_is_caught(compiled, target, kernel, seed):
    args, block, message = (BUGS | BULK_BUGS)[kernel]
    with pytest.raises(emulator.EmulatorError, match=rf"(?s)^{kernel}: .*({message})"):
        launch(compiled(target), kernel, args, block=block, seed=seed)


def test_an_error_names_the_place(compiled):
    with pytest.raises(emulator.EmulatorError, match=r"CTA \(0, 0, 0\), warp 0, .*PTX line \d+: .*\n +st.global.v4"):
        launch(compiled("sm_80"), "misaligned", [FLOATS], block=1)


@pytest.mark.parametrize("allowed, device, writable, message", [
    (1, 0, True, "the memory belongs to device 1, the kernel runs on device 0"),
    (-1, 0, False, "into a read-only allocation"),
    (1, 1, False, "into a read-only allocation"),
])  # fmt: skip
def test_memory_that_may_not_be_written(compiled, allowed, device, writable, message):
    y, module = np.zeros(64, np.float32), compiled("sm_80")
    emulator.allow(y.ctypes.data, y.nbytes, writable, allowed)
    try:
        with pytest.raises(emulator.EmulatorError, match=message):
            module.launch("fill", (1, 1, 1), (64, 1, 1), [pointer(y), bytes(4)], device=device)
    finally:
        emulator.forbid(y.ctypes.data)
    assert (y == 0).all()


@pytest.mark.parametrize("target, limit, smem, fits", [
    ("sm_80", 0, 163, True), ("sm_80", 0, 164, False), ("sm_90a", 0, 227, True), ("sm_90a", 0, 228, False),
    ("sm_80", 99, 99, True), ("sm_80", 99, 100, False),
])  # fmt: skip
def test_limit_of_shared_memory(compiled, target, limit, smem, fits):
    emulator.option("smem_limit", limit * 1024)
    try:
        launch(compiled(target), "dynamic_shared", [FLOATS], block=64, smem=smem * 1024)
        assert fits
    except emulator.EmulatorError as error:
        assert not fits and f"{smem * 1024} bytes of shared memory, the device allows" in str(error)
    finally:
        emulator.option("smem_limit", 0)


def test_options_and_counters(compiled):
    with pytest.raises(ValueError, match="no option 'nonsense'"):
        emulator.option("nonsense", 1)
    before = emulator.counters()
    launch(compiled("sm_80"), "fill", [FLOATS, 0], grid=(2, 1, 1), block=64)
    after = emulator.counters()
    assert after["ctas"] - before["ctas"] == 2 and after["stored"] - before["stored"] == 2 * 64 * 4


def test_info(compiled):
    info = compiled("sm_90a").info("wgmma_f16")
    assert (info.target, info.arch_specific, info.param_bytes, info.static_smem) == (90, 1, 24, 64 * 32 + 16 * 32)
    assert (compiled("sm_80").info("fill").target, compiled("sm_80").info("fill").arch_specific) == (80, 0)
    with pytest.raises(emulator.EmulatorError, match="no kernel nothing"):
        compiled("sm_80").info("nothing")


def test_numbers(compiled):
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, np.inf, -np.inf, 65519, 65520, 1e-40, 0.5, 1.5, 2.5, -2.5]
    x = np.concatenate([rng.standard_normal(500) * 10.0 ** rng.integers(-8, 8, 500), special]).astype(np.float32)
    y = np.zeros((len(x), 8), np.uint32)
    launch(compiled("sm_80"), "numbers", [x, y, len(x)], block=64)
    bits = x.view(np.uint32).astype(np.uint64)
    with np.errstate(all="ignore"):
        integers = [
            np.clip(f(x.astype(np.float64)), -(2.0**31), 2.0**31 - 1).astype(np.int32) for f in (np.rint, np.trunc)
        ]
        floats = [(x.astype(np.float64) ** 2 + 1).astype(np.float32), np.maximum(x, 0), np.sqrt(np.abs(x)), 1 / x]
        np.testing.assert_array_equal(y[:, 0], x.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(y[:, 1], (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    np.testing.assert_array_equal(y[:, 3:5].view(np.int32), np.stack(integers, 1))
    np.testing.assert_array_equal(y[:, [2, 5, 6, 7]].view(np.float32), np.stack(floats, 1).astype(np.float32))


def truncated(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) & 0xFFFFE000).view(np.float32)


def operand(rng, kind: str, rows: int, row_bytes: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """A matrix in a format of the tensor cores as it lies in memory, and its values."""
    x = rng.standard_normal((rows, row_bytes // (4 if kind == "tf32" else 2))).astype(np.float32)
    if kind == "f16":
        return x.astype(np.float16), x.astype(np.float16).astype(np.float64)
    if kind == "bf16":
        bits = (x.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x, truncated(x).astype(np.float64)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_mma(compiled, target, kind):
    rng = np.random.default_rng(0)
    (a, a_values), (b, b_values) = operand(rng, kind, 16), operand(rng, kind, 8)
    c = np.zeros((16, 8), np.float32)
    launch(compiled(target), f"mma_{kind}", [a, b, c], block=32)
    np.testing.assert_allclose(c, a_values @ b_values.T, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", ["", "_swizzled"])
@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_wgmma(compiled, kind, layout, seed):
    rng = np.random.default_rng(seed)
    (a, a_values), (b, b_values) = operand(rng, kind, 64), operand(rng, kind, 16)
    c = np.zeros((64, 16), np.float32)
    launch(compiled("sm_90a"), f"wgmma_{kind}{layout}", [a, b, c], block=128, seed=seed)
    np.testing.assert_allclose(c, 2 * a_values @ b_values.T, atol=1e-5)
