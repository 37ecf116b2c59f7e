"""csrc/batch_norm_statistics.cuh and batch_norm_backward.cuh, compiled for the CPU, against float64."""

import ctypes
from types import SimpleNamespace

import batch_norm_train
import host_cuda
import pytest
import torch
from batch_norm_train import BN_CASES, EPS, KINDS, SHAPES, Setup, assert_within_budget, check_case, draw, formula
from hypothesis import given, settings
from hypothesis import strategies as st

import resnet_fused
from resnet_fused import explain, ops
from resnet_fused.backends.cuda import kernels as cuda_kernels
from resnet_fused.backends.triton import batch_norm_train as triton_train
from resnet_fused.dispatch import registry
from resnet_fused.testing import DTYPES, largest

pytestmark = pytest.mark.skipif(host_cuda.unavailable() is not None, reason=str(host_cuda.unavailable()))

STEPS = ("statistics", "batch_statistics", "apply_with_mask", "backward_sums", "backward_dx")
ids = {"ids": lambda v: str(v).removeprefix("torch.")}


def kernels(**options: int) -> SimpleNamespace:
    """The launchers, with options for how they run."""

    def with_options(function):
        return lambda *args: function(*args, **options)

    return SimpleNamespace(apply=host_cuda.batch_norm_act, **{n: with_options(getattr(host_cuda, n)) for n in STEPS})


@pytest.fixture
def cuda_serves_the_cpu(monkeypatch):
    """The backend `cuda` takes CPU tensors: everything around the kernels is the package's own."""
    monkeypatch.setitem(registry._UNAVAILABLE, "cuda", lambda device_type, index=None: None)
    for name in ("batch_norm_act", *STEPS):
        monkeypatch.setattr(cuda_kernels, name, getattr(host_cuda, name))


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("case", BN_CASES, ids=lambda c: c.id)
def test_case(case, dtype, cuda_serves_the_cpu):
    check_case(case, dtype, "cuda")


@pytest.mark.parametrize("max_blocks", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, **ids)
@pytest.mark.parametrize("kind", KINDS)
def test_within_budget_of_float64(shape, kind, max_blocks):
    for dtype in DTYPES:
        batch_norm_train.check(Setup(shape, dtype, kind), kernels(max_blocks=max_blocks))


@settings(deadline=None, max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(2, 9)),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    relu=st.booleans(),
    frozen=st.booleans(),
    affine=st.booleans(),
    max_blocks=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_any_shape(shape, dtype, kind, relu, frozen, affine, max_blocks, seed):
    batch_norm_train.check(Setup(shape, dtype, kind, relu, frozen, affine), kernels(max_blocks=max_blocks), seed)


def test_mean_far_above_the_spread():
    setup = Setup((4, 16, 15, 15), torch.float32, mean=1e3)
    i = draw(setup)
    for max_blocks in (0, 1):
        results = batch_norm_train.fused(setup, i, kernels(max_blocks=max_blocks))
        assert_within_budget(setup, i, results)
        assert largest(results["y"] - formula(setup, i, torch.float64)["y"]) <= 5e-4


@pytest.mark.parametrize("max_blocks", [0, 1])
def test_statistics_of_difficult_channels(max_blocks):
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    outlier = noise.clone()
    outlier[0] = 1e4  # the pivot
    channels = [torch.full_like(noise, 1000.1), 0.5 + 1e-5 * noise, outlier, noise, torch.zeros_like(noise)]
    x = torch.stack(channels, 1).reshape(2, 500, 4, 5).permute(0, 3, 1, 2)
    mean, m2, _ = host_cuda.statistics(x, max_blocks=max_blocks)
    assert m2[0] == 0 and mean[0] == x[0, 0, 0, 0]
    assert m2[4] == 0 and mean[4] == 0
    exact = x.double().var((0, 2, 3), correction=0) * 4000
    torch.testing.assert_close(m2.double(), exact, rtol=1e-6, atol=0)
    assert ((mean.double() - x.double().mean((0, 2, 3))).abs() <= 2**-22 * x.abs().amax((0, 2, 3))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_channel(kind):
    setup = Setup((2, 10, 7, 5), torch.float32, kind)
    i = draw(setup)
    clean = batch_norm_train.fused(setup, i, kernels())
    i.x[1, 3, 3, 2] = float("nan")
    results = batch_norm_train.fused(setup, i, kernels())
    others = torch.tensor([c for c in range(10) if c != 3])
    for name, result in results.items():
        if result.numel():
            dim = 1 if result.ndim == 4 else 0
            assert torch.equal(result.index_select(dim, others), clean[name].index_select(dim, others))
    assert results["y"][:, 3].isnan().all() and results["dx"][:, 3].isnan().all()
    torch.testing.assert_close(results["dbias"][3], i.dy[:, 3].sum())  # ReLU's gradient passes NaN


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_the_order_of_threads(kind):
    setup = Setup((2, 64, 9, 9), torch.bfloat16, kind)
    i = draw(setup)
    first, *others = (batch_norm_train.fused(setup, i, kernels(max_blocks=2, seed=seed)) for seed in range(3))
    for other in others:
        assert all(torch.equal(other[name], first[name]) for name in first)


@pytest.mark.parametrize("C", [1, 10, 16, 300])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_the_mask_is_triton_s(C, dtype):
    i = draw(Setup((2, C, 5, 3), dtype, "join"))
    i.x[0, 0, 0] = float("nan")
    bn = (*i.bn, EPS)
    y, mask = host_cuda.apply_with_mask(i.x, *bn, i.residual)
    triton_y, triton_mask = triton_train.apply_with_mask(i.x, *bn, i.residual)
    assert torch.equal(mask, triton_mask)
    torch.testing.assert_close(y, triton_y, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], **ids)
def test_vectors_in_half_precision(dtype):
    """`model.half()`: the affine vectors are in x's type, the batch's statistics in float32."""
    i = draw(Setup((2, 16, 5, 5), dtype, "two-bn-join"))
    bn, bn2 = ((*(v.to(dtype) for v in b[:2]), *b[2:]) for b in (i.bn, i.bn2))
    wide, wide2 = ((*(v.float() for v in b[:2]), *b[2:]) for b in (bn, bn2))
    for function, more in ((host_cuda.backward_sums, ()), (host_cuda.backward_dx, (None,) * 4)):
        results = [
            function(i.dy, i.x, *a, EPS, i.residual, *b, None, True, *more) for a, b in ((bn, bn2), (wide, wide2))
        ]
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **ids)
def test_running_statistics_are_rounded_once(dtype):
    i = draw(Setup((2, 10, 5, 5), torch.bfloat16))
    running = [torch.full((10,), 0.3, dtype=dtype) for _ in range(2)]
    before = [v.float().clone() for v in running]
    mean, var, _ = host_cuda.batch_statistics(i.x, None, *running, 0.25)
    for new, old, value in zip(running, before, (mean, var * 50 / 49), strict=True):
        torch.testing.assert_close(new, old.lerp(value, 0.25).to(dtype))


def test_only_what_is_needed():
    i = draw(Setup((2, 8, 3, 3), torch.float32, "two-bn-join"))
    call = (i.dy, i.x, *i.bn, EPS, i.residual, *i.bn2, None, True, None, None, None, None, None)
    both = host_cuda.backward_dx(*call, True, True)
    for needs in ((True, False), (False, True)):
        for result, full, need in zip(host_cuda.backward_dx(*call, *needs), both, needs, strict=True):
            assert torch.equal(result, full) if need else result.numel() == 0


@pytest.mark.parametrize("C, size", [(3, 224), (64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)])
def test_every_shape_has_blocks_enough(C, size):
    run = host_cuda.Run(0, 0, 0)
    for name, more in (("statistics", (False,)), ("statistics", (True,)), ("backward", ())):
        for batch in (1, 2, 8, 32, 100, 256, 1024):
            rows = batch * size * size
            shape = ctypes.c_int64(rows), ctypes.c_int64(C), *map(ctypes.c_bool, more)
            blocks = host_cuda.library(f"batch_norm_{name}")[f"{name}_splits"](run, *shape) * -(-C // 256)
            assert 108 <= blocks <= 3 * 108 or blocks * 256 * 8 >= rows * C  # or every thread has one row


def test_explain_names_the_backend(cuda_serves_the_cpu):
    model = torch.nn.Sequential(resnet_fused.BasicBlock(8, 8)).train()
    with resnet_fused.backend("cuda"):
        rows = [r for r in explain(model, torch.randn(2, 8, 5, 5)) if "BatchNorm2d" in r.modules]
    assert rows and all(r.ran == ["batch_norm_act: cuda"] for r in rows)


def test_forced_and_not_served(cuda_serves_the_cpu):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with (
        resnet_fused.backend("cuda"),
        pytest.raises(resnet_fused.BackendUnavailable, match="float64; the kernels serve"),
    ):
        ops.batch_norm_act(x, None, None, None, None)


def test_a_wrong_kernel_is_refused(cuda_serves_the_cpu, monkeypatch):
    def off(*args):
        mean, var, total = host_cuda.batch_statistics(*args)
        return mean + 0.01, var, total

    monkeypatch.setattr(cuda_kernels, "batch_statistics", off)
    with (
        resnet_fused.backend("cuda"),
        pytest.warns(UserWarning, match="batch_norm_act_training/cuda.*is disabled"),
        pytest.raises(resnet_fused.BackendUnavailable, match="is off by"),
    ):
        ops.batch_norm_act(torch.randn(2, 23, 4, 4), None, None, None, None)


def test_offsets_past_32_bits():
    """The last blocks of 2^31 + 2560 elements against the same rows alone; no other page is touched."""
    C, rows = 64, 96  # a block has 32 rows
    M = 2**31 // C + 64
    generator = torch.Generator().manual_seed(0)
    small = [torch.randn((rows, C), generator=generator).half() for _ in range(2)]
    bn = [v.exp() for v in torch.randn((4, C), generator=generator)]
    bytes_of_small = torch.randint(256, (rows, C // 8), generator=generator, dtype=torch.uint8)

    def large(tail: torch.Tensor) -> torch.Tensor:
        t = torch.empty((M, tail.shape[1]), dtype=tail.dtype)
        t[0], t[-rows:] = tail[0], tail
        return t

    def launch(dy, z, mask):
        M = len(z)
        blocks = -(-M // 32)
        run = host_cuda.Run(blocks, blocks - 3, 0)

        def call(library, name, *args):
            host_cuda.call(host_cuda.library(f"batch_norm_{library}"), name, *args)

        partial = [torch.empty((2, blocks, C)) for _ in range(2)]
        y, dx, dresidual = (torch.empty_like(z) for _ in range(3))
        relu_mask = torch.empty_like(mask)
        eps, relu, none = ctypes.c_float(EPS), ctypes.c_bool(True), [None] * 5
        call("statistics", "statistics", (z, *none[:3]), run, None, partial[0], *none, ctypes.c_float(0))
        call("act", "batch_norm_mask", (z, *bn, dy), run, eps, y, relu_mask)
        inputs = (dy, z, *bn, *none, mask)
        call("backward", "backward_sums", inputs, run, eps, relu, partial[1], None, None, None)
        call("backward", "backward_dx", (*inputs, *none), run, eps, relu, dx, dresidual)
        sums = [p[:, -3:] for p in partial]
        return [*sums, *(t[-rows:] for t in (y, relu_mask, dx, dresidual))]

    expected = launch(*small, bytes_of_small)
    for result, alone in zip(launch(*map(large, small), large(bytes_of_small)), expected, strict=True):
        assert torch.equal(result, alone)
