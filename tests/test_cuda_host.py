"""csrc/batch_norm_act.cuh, compiled for the CPU, against float64."""

import host_cuda
import pytest
import torch
from torch import Tensor

from resnet_fused.testing import CASES, DTYPES, assert_within_budget, make_inputs

pytestmark = pytest.mark.skipif(host_cuda.unavailable() is not None, reason=str(host_cuda.unavailable()))

APPLY = [case for case in CASES if case.op == "batch_norm_act" and not case.options["training"] and not case.large]
BY_ID = {case.id: case for case in APPLY}


def op_args(args: tuple, kwargs: dict) -> tuple:
    """The raw operator's arguments from the public function's."""
    bn2 = kwargs.get("residual_bn", (None,) * 4)
    relu = kwargs.get("act", "relu") == "relu"
    return (*args, 1e-5, kwargs.get("residual"), *bn2, kwargs.get("pre_add"), relu)


def check(case, dtype: torch.dtype, **options: int) -> None:
    args, kwargs = make_inputs(case, dtype=dtype)
    results = host_cuda.batch_norm_act(*op_args(args, kwargs), **options)
    assert_within_budget(case, results if "pre_add" in kwargs else results[:1], args, kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", APPLY, ids=lambda case: case.id)
def test_case(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [BY_ID["bn-two-bn-join"], BY_ID["bn-3-channels"], BY_ID["bn-pre-add-join"]], ids=lambda c: c.id
)
@pytest.mark.parametrize("max_threads", [1, 100, 256, 1000])
def test_a_small_grid_strides_over_all_rows(case, dtype, max_threads):
    check(case, dtype, max_threads=max_threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_outputs(dtype):
    check(BY_ID["bn-pre-add-join"], dtype, offset=1)


def test_misaligned_vectors():
    case = BY_ID["bn-join"]
    args, kwargs = make_inputs(case, dtype=torch.bfloat16)
    shifted = tuple(torch.cat([v.new_zeros(1), v])[1:] for v in args[1:])
    assert shifted[0].data_ptr() % 16
    y, _ = host_cuda.batch_norm_act(*op_args((args[0], *shifted), kwargs))
    assert_within_budget(case, (y,), args, kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_128_bits_a_thread_where_alignment_allows(dtype):
    x = image(2, 64, 8, 8, dtype=dtype)
    plain = (None,) * 4
    call = (x, *plain, 1e-5, None, *plain, None, True)
    packs = x.numel() * dtype.itemsize // 16
    assert host_cuda.batch_norm_act_and_blocks(*call, max_threads=1 << 20)[2] == packs // 256
    assert host_cuda.batch_norm_act_and_blocks(*call, max_threads=1 << 20, offset=1)[2] == x.numel() // 256


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_normalisation_z_itself(dtype):
    x, residual, pre_add = (image(2, 24, 3, 5, dtype=dtype, seed=seed) for seed in range(3))
    plain = (None,) * 4
    y, total = host_cuda.batch_norm_act(x, *plain, 1e-5, None, *plain, pre_add, False)
    assert torch.equal(total, x + pre_add)
    assert torch.equal(y, total)
    y, total = host_cuda.batch_norm_act(x, *plain, 1e-5, residual, *plain, None, True)
    assert torch.equal(y, torch.relu(x + residual))
    assert total.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [16, 3])
def test_nan_and_infinity_as_in_eager(dtype, C):
    x = image(1, C, 2, 4, dtype=dtype)
    x[0, 0, 0, 0], x[0, 1, 0, 1], x[0, 2, 0, 2] = float("nan"), float("inf"), -float("inf")
    mean, var = torch.zeros(C), torch.ones(C)
    y, _ = host_cuda.batch_norm_act(x, None, None, mean, var, 0.0, None, *[None] * 4, None, True)
    assert torch.equal(y.nan_to_num(nan=-1), torch.relu(x).nan_to_num(nan=-1))
    assert y[0, 0, 0, 0].isnan()


def test_the_mean_is_subtracted_first():
    C = 64
    x = image(1, C, 8, 8, dtype=torch.float32) + 1e3
    mean, var, weight, bias = torch.full((C,), 1e3), torch.ones(C), torch.linspace(0.1, 0.9, C), torch.zeros(C)
    y, _ = host_cuda.batch_norm_act(x, weight, bias, mean, var, 0.0, None, *[None] * 4, None, False)
    oracle = weight.double()[:, None, None] * (x.double() - 1e3)
    assert (y - oracle).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_sum_is_rounded_before_it_is_normalised(dtype):
    C = 24
    x, pre_add = image(2, C, 3, 5, dtype=dtype) + 64, image(2, C, 3, 5, dtype=dtype, seed=1)
    mean, var = torch.full((C,), 64.0), torch.ones(C)
    y, total = host_cuda.batch_norm_act(x, None, None, mean, var, 0.0, None, *[None] * 4, pre_add, False)
    assert torch.equal(y, total - 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_vectors_of_two_dtypes(dtype):
    args, kwargs = make_inputs(BY_ID["bn-two-bn-join"], dtype=dtype)
    half = [v.to(dtype) for v in args[1:3]]
    for results in zip(
        host_cuda.batch_norm_act(*op_args((args[0], *half, *args[3:]), kwargs)),
        host_cuda.batch_norm_act(*op_args((args[0], *(v.float() for v in half), *args[3:]), kwargs)),
        strict=True,
    ):
        assert torch.equal(*results)


def image(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A random channels_last [N, C, H, W]."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)
