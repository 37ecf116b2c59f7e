"""What the CUDA operators say of a bad argument, called directly; nothing else keeps one from the kernels there."""

import pytest
import torch

from resnet_fused.backends.cuda import extension
from resnet_fused.ops.stem import Call

pytestmark = pytest.mark.gpu

PLAN = {"tile_m": 64, "tile_n": 64, "splits": 1}


@pytest.fixture(autouse=True)
def _built():
    reason = extension.unavailable("cuda", 0)
    if reason is not None:
        pytest.skip(reason)


def image(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", memory_format=torch.channels_last)


def conv(kernel=1, stride=(1, 1), padding=(0, 0), dilation=(1, 1), residual=None, **plan):
    x, weight = image(1, 128, 8, 8), image(128, 128, kernel, kernel)
    none = [None] * 5
    return torch.ops.resnet_fused_cuda.conv_bn_act(
        x, weight, *none, 1e-5, stride, padding, dilation, residual, False, **PLAN | plan
    )


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"stride": (0, 1)}, "stride of 1 or 2"),
        ({"stride": (1, -1)}, "stride of 1 or 2"),
        ({"dilation": (0, 1)}, "dilation of 1 to 64"),
        ({"padding": (0, -1)}, "padding of 0 to 127"),
        ({"tile_m": 64, "tile_n": 128}, "tile 64x128, splits 1: there is no such tile"),
        ({"splits": 2}, "tile 64x64, splits 2: .*split"),
        ({"kernel": 3, "padding": (1, 1), "tile_m": 128, "tile_n": 128, "splits": 2}, "can't be split"),
    ],
)
def test_a_convolution_that_no_kernel_runs_is_refused(options, reason):
    with pytest.raises(RuntimeError, match=reason):
        conv(**options)


def test_a_residual_is_compared_with_the_output():
    with pytest.raises(RuntimeError, match=r"residual must have the shape of the output, \[1, 128, 4, 4\], got"):
        conv(kernel=3, stride=(2, 2), padding=(1, 1), residual=image(1, 128, 8, 8))
    with pytest.raises(RuntimeError, match="residual must have the dtype of the output"):
        conv(residual=image(1, 128, 8, 8, dtype=torch.float32))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"weight": (8, 3, 7, 7), "dtype": torch.float32}, "weight must be float16 or bfloat16"),
        ({"weight": (8, 3, 5, 5)}, r"weight must be a dense channels_last tensor \[K, C, 7, 7\]"),
        ({"weight": (12, 3, 7, 7)}, "K a multiple of 8"),
        ({"x": (1, 5, 8, 8)}, "with 1 to 4 channels; got"),
        ({"x": (1, 3, 0, 8)}, "x must have images of 1 pixel or more"),
        ({"x": (1, 3, 8, 8), "dtype": torch.bfloat16}, "x must be .* of weight's dtype or of bytes"),
        ({"x": (1, 3, 8, 8), "dtype": torch.uint8}, "mean must be given where x is of bytes"),
        ({"running_var": (3,)}, r"running_var must have shape \[8\], one value per channel of the result"),
    ],
)
def test_a_stem_that_the_kernel_does_not_run_is_refused(changes, reason):
    dtype = changes.get("dtype", torch.float16)
    given = {n: torch.ones(shape, dtype=dtype, device="cuda") for n, shape in changes.items() if n != "dtype"}
    given = {n: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for n, t in given.items()}
    vector = torch.ones(8, device="cuda")
    call = Call(image(1, 3, 8, 8), image(8, 3, 7, 7), None, None, vector, vector, 1e-5, None, None)
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.resnet_fused_cuda.stem(*call._replace(**given))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"ranks": (2, 6)}, r"ranks must be .*\[ranks, 2 \* channels \+ 1\]; its shape is \[2, 6\]"),
        ({"ranks": (0, 7)}, "ranks must be"),
        ({"ranks": (2, 7), "dtype": torch.float16}, "ranks must be a contiguous float32"),
        ({"running_var": (2,)}, r"running_var must be a contiguous float32 tensor \[3\]"),
        ({"running_mean": None}, "running_mean and running_var must be given together"),
    ],
)
def test_ranks_that_the_kernel_does_not_merge_are_refused(changes, reason):
    shapes = {"ranks": (2, 7), "running_mean": (3,), "running_var": (3,)} | changes
    dtype = shapes.pop("dtype", torch.float32)
    given = [None if shape is None else torch.ones(shape, dtype=dtype, device="cuda") for shape in shapes.values()]
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.resnet_fused_cuda.merge_ranks(*given, 0.1)
