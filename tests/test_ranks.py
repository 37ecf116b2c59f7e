"""SyncBatchNorm's merge of the ranks' statistics: every kernel against float64 and against one process's batch."""

import host_cuda
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import resnet_fused
from resnet_fused.backends.cuda import kernels as cuda_kernels
from resnet_fused.dispatch import numerics, registry
from resnet_fused.ops.batch_norm_act import ranks
from resnet_fused.ops.batch_norm_act.ranks import RanksCall


@pytest.fixture
def extension(monkeypatch):
    """Its kernels, compiled for the CPU, are forced."""
    if host_cuda.unavailable() is not None:
        pytest.skip(host_cuda.unavailable())
    monkeypatch.setitem(registry._UNAVAILABLE, "cuda", lambda device_type, index=None: None)
    monkeypatch.setattr(cuda_kernels, "merge_ranks", host_cuda.merge_ranks)
    with resnet_fused.backend("cuda"):
        yield


@pytest.fixture(params=["eager", "triton", "cuda"])
def backend(request):
    """The one that is forced."""
    if request.param == "cuda":
        request.getfixturevalue("extension")
    with resnet_fused.backend(request.param):
        yield request.param


def of_shares(x: torch.Tensor, shares: list[int]) -> torch.Tensor:
    """[ranks, 2 C + 1] of the images [N, C, H, W], so many of them each."""
    rows = []
    for part in x.split(shares):
        count = part.numel() // part.shape[1]
        mean = part.mean((0, 2, 3)) if count else torch.zeros(part.shape[1])
        m2 = (part - mean[:, None, None]).square().sum((0, 2, 3))
        rows.append(torch.cat([mean, m2, torch.tensor([float(count)])]))
    return torch.stack(rows)


@pytest.mark.parametrize("C", [1, 8, 130, 300])
@pytest.mark.parametrize("shares", [[5], [3, 5], [3, 0, 2, 3], [0, 8]])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_the_ranks_are_one_batch(backend, C, shares, mean):
    x = torch.randn(sum(shares), C, 3, 3, generator=torch.Generator().manual_seed(0)) + mean
    running = torch.full((C,), 2.0), torch.full((C,), 3.0)
    call = RanksCall(of_shares(x, shares), *running, 0.25)
    limits = list(numerics.call_limits(call))
    before = [t._version for t in running]
    found = ranks.merge(*call)
    assert numerics.wrong((*found, *running), limits) is None
    assert all(t._version > v for t, v in zip(running, before, strict=True))
    expected = torch.nn.BatchNorm2d(C, momentum=0.25).double()
    expected.running_mean.fill_(2.0)
    expected.running_var.fill_(3.0)
    expected(x.double())
    torch.testing.assert_close(running[0].double(), expected.running_mean, rtol=1e-6, atol=1e-6 * mean)
    torch.testing.assert_close(running[1].double(), expected.running_var, rtol=1e-5, atol=1e-6 * mean)
    assert found[2] == x.numel() // C
    again = ranks.merge(call.ranks, None, None, 0.0)
    assert all(torch.equal(*pair) for pair in zip(again, found, strict=True))


def test_nothing_counted_is_nan(backend):
    call = RanksCall(torch.zeros(2, 7), torch.ones(3), torch.ones(3), 0.1)
    *found, count = ranks.merge(*call)
    assert all(t.isnan().all() for t in (*found, *call.written())) and count == 0


@settings(deadline=None, max_examples=20)
@given(world=st.integers(1, 9), C=st.integers(1, 40), seed=st.integers(0, 9))
def test_any_ranks(world, C, seed):
    call = RanksCall(torch.randn(world, 2 * C + 1, generator=torch.Generator().manual_seed(seed)), None, None, 0.0)
    call = call.drawn()
    limits = list(numerics.call_limits(call))
    with resnet_fused.backend("triton"):
        assert numerics.wrong(ranks.merge(*call), limits) is None


def test_running_statistics_in_half_precision_and_strided(backend):
    x = torch.randn(8, 4, 3, 3)
    given = of_shares(x, [3, 5])
    wide = torch.ones(4), torch.ones(4)
    ranks.merge(given, *wide, 0.5)
    half = torch.ones(4).half(), torch.ones(4).half()
    mixed = torch.ones(4), torch.ones(4).half()
    strided = torch.ones(4, 2)[:, 0], torch.ones(4, 3)[:, 1]
    for running in (half, mixed, strided):
        ranks.merge(given, *running, 0.5)
        for t, expected in zip(running, wide, strict=True):
            torch.testing.assert_close(t, expected.to(t.dtype))


def test_a_wrong_merge_is_refused(extension, monkeypatch):
    def off(*args):
        mean, var, count = host_cuda.merge_ranks(*args)
        return mean, var * count / (count - 1), count

    monkeypatch.setattr(cuda_kernels, "merge_ranks", off)
    with (
        pytest.warns(UserWarning, match="batch_norm_act_merge_ranks/cuda.*is disabled"),
        pytest.raises(resnet_fused.BackendUnavailable, match="is off by"),
    ):
        ranks.merge(of_shares(torch.randn(4, 11, 2, 2), [2, 2]), None, None, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
@pytest.mark.parametrize("shares", [[3, 0, 5], [8]])
def test_on_a_device(backend, shares):
    device = torch.device("cuda", 0)
    if backend != "auto" and (reason := registry.unavailable(backend, device)) is not None:
        pytest.skip(reason)
    given = of_shares(torch.randn(8, 130, 3, 3) + 10, shares).to(device)
    call = RanksCall(given, *(torch.ones(130, device=device) for _ in range(2)), 0.1)
    limits = list(numerics.call_limits(call))
    with resnet_fused.backend(backend):
        assert numerics.wrong((*ranks.merge(*call), *call.written()), limits) is None


def test_opcheck():
    given = of_shares(torch.randn(8, 4, 3, 3), [3, 5])
    with resnet_fused.backend("triton"):
        torch.library.opcheck(ranks._merge, (given, None, None, 0.1))
        torch.library.opcheck(ranks._merge, (given, torch.ones(4), torch.ones(4), 0.1))
