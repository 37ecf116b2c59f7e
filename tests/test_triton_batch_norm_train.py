"""The Triton kernels of training, one launcher after the other, against float64."""

from types import SimpleNamespace

import batch_norm_train
import pytest
import torch
from batch_norm_train import EPS, KINDS, SHAPES, Setup, assert_within_budget, draw, formula
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from resnet_fused import testing
from resnet_fused.backends.triton import batch_norm_apply as batch_norm_act
from resnet_fused.backends.triton import batch_norm_train as train
from resnet_fused.backends.triton.batch_norm_train import tiles
from resnet_fused.testing import DTYPES, largest

KERNELS = SimpleNamespace(apply=batch_norm_act.apply, **{name: getattr(train, name) for name in train.__all__})
ids = {"ids": lambda v: str(v).removeprefix("torch.")}


@pytest.fixture(autouse=True, scope="module")
def tiles_of_a_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_TILE", 1024)
        patch.setattr(tiles, "_MULTIPROCESSORS", 108)
        yield


def fused(setup: Setup, i: SimpleNamespace) -> dict[str, torch.Tensor]:
    return batch_norm_train.fused(setup, i, KERNELS)


def check(setup: Setup, seed: int = 0) -> None:
    batch_norm_train.check(setup, KERNELS, seed)


@pytest.mark.parametrize("shape", SHAPES, **ids)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_within_budget_of_float64(shape, kind, dtype):
    check(Setup(shape, dtype, kind))


@settings(deadline=None, max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(2, 9)),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    relu=st.booleans(),
    frozen=st.booleans(),
    affine=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_shape(shape, dtype, kind, relu, frozen, affine, seed):
    check(Setup(shape, dtype, kind, relu, frozen, affine), seed)


def test_mean_far_above_the_spread():
    setup = Setup((4, 16, 15, 15), torch.float32, mean=1e3)
    i = draw(setup)
    results = fused(setup, i)
    assert_within_budget(setup, i, results)
    assert largest(results["y"] - formula(setup, i, torch.float64)["y"]) <= 1e-4


def images(*channels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Channels of N * H * W values as a channels_last batch [2, C, H, 4]."""
    x = torch.stack(channels, 1).reshape(2, -1, 4, len(channels)).to(dtype)
    return x.permute(0, 3, 1, 2)


def test_statistics_of_difficult_channels():
    torch.manual_seed(0)
    noise = torch.randn(4000)
    outlier = noise.clone()
    outlier[0] = 1e4  # the pivot
    x = images(torch.full_like(noise, 1000.1), 0.5 + 1e-5 * noise, outlier, noise, torch.zeros_like(noise))
    mean, m2, _ = train.statistics(x)
    assert m2[0] == 0 and mean[0] == x[0, 0, 0, 0]
    assert m2[4] == 0 and mean[4] == 0
    exact = x.double().var((0, 2, 3), correction=0) * 4000
    torch.testing.assert_close(m2.double(), exact, rtol=1e-6, atol=0)
    assert ((mean.double() - x.double().mean((0, 2, 3))).abs() <= 2**-22 * x.abs().amax((0, 2, 3))).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pixel", [(0, 0, 0), (1, 3, 2)])
def test_nan_stays_in_its_channel(kind, pixel):
    setup = Setup((2, 10, 7, 5), torch.float32, kind)
    i = draw(setup)
    clean = fused(setup, i)
    n, h, w = pixel
    i.x[n, 3, h, w] = float("nan")
    results = fused(setup, i)
    others = [c for c in range(10) if c != 3]
    for name, result in results.items():
        if result.numel():
            dim = 1 if result.ndim == 4 else 0
            torch.testing.assert_close(
                *(t.index_select(dim, torch.tensor(others)) for t in (result, clean[name])), rtol=0, atol=0
            )
    assert results["y"][:, 3].isnan().all() and results["dx"][:, 3].isnan().all()
    torch.testing.assert_close(results["dbias"][3], i.dy[:, 3].sum())  # ReLU's gradient passes NaN


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], **ids)
def test_bits_do_not_change_and_splits_agree(kind, dtype, monkeypatch):
    setup = Setup((2, 64, 9, 9), dtype, kind)
    i = draw(setup)
    results = fused(setup, i)
    for name, result in fused(setup, i).items():
        assert torch.equal(result, results[name])
    for tile, multiprocessors, splits in ((1024, 0, 1), (1024, 1, 4), (2**14, 1, 1)):
        monkeypatch.setattr(tiles, "_TILE", tile)
        monkeypatch.setattr(tiles, "_MULTIPROCESSORS", multiprocessors)
        assert tiles.tiling(162, 64, 4)[1] == splits
        other = fused(setup, i)
        assert_within_budget(setup, i, other)
        for name in ("dweight", "dbias"):
            torch.testing.assert_close(other[name], results[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("C", [1, 8, 10, 300])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_mask_is_where_the_gradient_passes(C, dtype):
    setup = Setup((2, C, 5, 3), dtype, "join")
    i = draw(setup)
    i.x[0, 0, 0] = float("nan")
    i.residual[1, 0] = -i.bn[1][0]
    i.x[1, 0] = i.bn[2][0] = 0.5  # pre-activation: bias - bias
    with testing.nan_filled_memory():
        y, relu_mask = train.apply_with_mask(i.x, *i.bn, EPS, i.residual)
    torch.testing.assert_close(
        y, batch_norm_act.apply(i.x, *i.bn, EPS, i.residual, *i.bn2, None, True)[0], rtol=0, atol=0, equal_nan=True
    )
    bits = (relu_mask[:, :, None] >> torch.arange(8)) & 1
    assert bits.reshape(30, -1)[:, C:].count_nonzero() == 0
    keep = bits.reshape(2, 5, 3, -1)[..., :C].permute(0, 3, 1, 2).bool()
    assert torch.equal(keep, ~(y <= 0)) if dtype == torch.float32 else keep[y > 0].all()
    for mask in (relu_mask, None):
        dz = train.backward_dx(
            i.dy, i.x, *i.bn, EPS, i.residual, *i.bn2, mask, True, None, None, None, None, None, False, True
        )[1]
        torch.testing.assert_close(dz, torch.where(keep, i.dy, 0), rtol=0, atol=0)


def test_two_processes_as_one():
    """Each sees its share; (count, mean, M2) are merged, the sums added, the global count is a tensor."""
    setup = Setup((5, 48, 6, 7), torch.float32)
    i = draw(setup)
    whole = fused(setup, i)
    parts = [slice(0, 3), slice(3, 5)]
    counts = torch.tensor([126.0, 84.0])[:, None]
    means, m2s = (torch.stack(v) for v in list(zip(*(train.statistics(i.x[p]) for p in parts), strict=True))[:2])
    mean = (counts * means).sum(0) / 210
    var = (m2s + counts * (means - mean) ** 2).sum(0) / 210
    shared = (*i.bn[:2], mean, var, EPS, *[None] * 5, None, True)
    sums = [sum(s) for s in zip(*(train.backward_sums(i.dy[p], i.x[p], *shared)[:2] for p in parts), strict=True)]
    count = counts.sum(0)
    dx = torch.cat([train.backward_dx(i.dy[p], i.x[p], *shared, *sums, None, count)[0] for p in parts])
    torch.testing.assert_close(dx, whole["dx"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(sums), torch.stack([whole["dbias"], whole["dweight"]]), rtol=1e-5, atol=1e-4)


def test_only_what_is_needed_and_empty_batches():
    i = draw(Setup((2, 8, 3, 3), torch.float32, "two-bn-join"))
    call = (i.dy, i.x, *i.bn, EPS, i.residual, *i.bn2, None, True)
    both = train.backward_dx(*call, None, None, None, None, None, True, True)
    for needs in ((True, False), (False, True), (False, False)):
        for result, full, need in zip(
            train.backward_dx(*call, None, None, None, None, None, *needs), both, needs, strict=True
        ):
            assert torch.equal(result, full) if need else result.numel() == 0
    empty = (i.dy[:0], i.x[:0], *i.bn, EPS, i.residual[:0], *i.bn2, None, True)
    assert [s.tolist() for s in train.backward_sums(*empty)] == [[0.0] * 8] * 3
    assert train.backward_dx(*empty, None, None, None, None)[0].shape == (0, 8, 3, 3)


def test_offsets_past_32_bits(monkeypatch):
    """The last three programs of 2^31 + 2560 elements against the same rows alone; no other page is touched."""
    builder, rows, C = interpreter.interpreter_builder, 40, 64
    M = 2**31 // C + rows
    generator = torch.Generator().manual_seed(0)
    bn = [v.exp() for v in torch.randn((4, C), generator=generator)]
    small = [torch.randn((rows, C), generator=generator).half() for _ in range(2)]
    large = [torch.empty((M, C), dtype=torch.float16) for _ in small]
    for t, tail in zip(large, small, strict=True):
        t[0], t[-rows:] = tail[0], tail

    def launch(dy, z, first_program):
        M = len(z)
        splits = -(-M // 16)
        partial = [torch.empty((splits, 2, C)) for _ in range(2)]
        dx, dresidual, y = (torch.empty_like(z) for _ in range(3))
        relu_mask = torch.empty((M, C // 8), dtype=torch.uint8)
        monkeypatch.setattr(
            builder, "set_grid_idx", lambda x, *_: setattr(builder, "grid_idx", (x + first_program, 0, 0))
        )
        blocks = {"BLOCK_M": 16, "BLOCK_C": C}
        none = [None] * 5
        train.forward.statistics_kernel[3,](z, None, None, partial[0], M, C, 1, **blocks)
        train.forward.apply_with_mask_kernel[3,](z, *bn, dy, y, relu_mask, M, C, EPS, **blocks)
        call = (dy, z, *bn, *none, relu_mask)
        train.backward.sums_kernel[3,](*call, partial[1], M, C, 1, EPS, True, **blocks)
        train.backward.dx_kernel[3,](*call, *none[:3], None, None, dx, dresidual, 1.0, M, C, 1, EPS, True, **blocks)
        return [p[-3:] for p in partial] + [t[-rows:] for t in (y, relu_mask, dx, dresidual)]

    monkeypatch.setattr(
        interpreter.GridExecutor, "_restore_args_dev", lambda *_: None
    )  # it copies tensors onto themselves
    for result, expected in zip(launch(*large, M // 16 - 2), launch(*small, 0), strict=True):
        assert torch.equal(result, expected)
