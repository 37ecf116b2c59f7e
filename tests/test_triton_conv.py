"""The Triton convolution called directly: in Triton's interpreter on the CPU, compiled on a GPU."""

import mmap
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused.testing import CASES, DTYPES, LAYOUTS, Case, assert_within_budget, make_inputs, nan_filled_memory

triton_conv = pytest.importorskip("resnet_fused.backends.triton.conv", reason="needs Triton", exc_type=ImportError)

pytestmark = pytest.mark.any_device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = [case for case in CASES if case.op == "conv_bn_act" and not case.large]
H100 = {"capability": (9, 0), "multiprocessors": 132}


def conv(id, shape, kernel, *inputs, bn="affine", **options) -> Case:
    return Case(id, "conv_bn_act", shape, kernel, options, frozenset(inputs), bn)


def geometry(options) -> tuple:
    """stride, padding, dilation as pairs, and groups."""
    pairs = ([options.get(name, default)] * 2 for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)))
    return *pairs, options.get("groups", 1)


def launch(args, kwargs, **extra) -> torch.Tensor:
    x, weight, *bn = args
    relu = kwargs.get("act", "relu") == "relu"
    return triton_conv.conv_bn_act(
        x, weight, kwargs.get("bias"), *bn, 1e-5, *geometry(kwargs), kwargs.get("residual"), relu, **extra
    )


def check(case: Case, dtype: torch.dtype, layout: str = "channels_last", seed: int = 0, **extra) -> None:
    args, kwargs = make_inputs(case, dtype=dtype, device=DEVICE, seed=seed, layout=layout)
    with nan_filled_memory():
        y = launch(args, kwargs, **extra)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_within_budget(case, (y,), args, kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_within_budget_of_float64(case, dtype, layout):
    check(case, dtype, layout)


ODD = [
    conv("1x1-odd", (3, 48, 7, 5), (96, 1, 1), "residual"),
    conv("3x3-odd", (2, 96, 5, 7), (80, 3, 3), "residual", padding=1),
    conv("3x3-g3-odd", (2, 60, 5, 7), (72, 3, 3), padding=1, groups=3),
    conv("7x7-odd", (1, 3, 21, 9), (40, 7, 7), stride=2, padding=3),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD, ids=lambda case: case.id)
def test_every_tile(case, dtype):
    """Each tile of the candidates for a large image, on shapes that are no multiple of it."""
    stride, padding, dilation, groups = geometry(case.options)
    large = (256, case.shape[1], 56, 56)
    problem = triton_conv.problem(large, case.weight_shape, stride, padding, dilation, groups, dtype, **H100)
    tiles = {}
    for p in (problem, problem._replace(M=49)):
        for c in triton_conv.candidates(p):
            tiles.setdefault((c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"], c["descriptors"]), c)
    for config in tiles.values():
        check(case, dtype, config=config)


def test_descriptors_serve_pointwise_convolutions_of_aligned_rows():
    def descriptors(C, R=1, stride=1, dtype=torch.float16, capability=(9, 0)) -> bool:
        problem = triton_conv.problem(
            (2, C, 8, 8),
            (64, C, R, R),
            [stride] * 2,
            [R // 2] * 2,
            [1, 1],
            1,
            dtype,
            capability=capability,
            multiprocessors=132,
        )
        return triton_conv.config(problem)["descriptors"]

    assert descriptors(64) and descriptors(8)
    assert not any(
        (
            descriptors(12),
            descriptors(64, R=3),
            descriptors(64, stride=2),
            descriptors(64, dtype=torch.float32),
            descriptors(64, capability=(8, 0)),
        )
    )


@settings(max_examples=12, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)),  # N, H, W
    st.sampled_from([1, 2, 3, 4, 5, 10, 16, 20, 48]),
    st.sampled_from([1, 3, 10, 33, 64]),
    st.sampled_from([(1, 1), (3, 3), (1, 3), (5, 2)]),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(1, 2),
    st.sets(st.sampled_from(["bias", "residual"])),
    st.sampled_from(["relu", "none"]),
    st.sampled_from(["affine", "plain", "half", "none"]),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.integers(0, 2**16),
)
def test_any_shape(size, C, K, kernel, stride, padding, dilation, inputs, act, bn, dtype, layout, seed):
    N, H, W = size
    R, S = kernel
    H, W = max(H, dilation * (R - 1) + 1 - 2 * padding), max(W, dilation * (S - 1) + 1 - 2 * padding)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "act": act}
    check(conv("drawn", (N, C, H, W), (K, R, S), *inputs, bn=bn, **options), dtype, layout, seed)


@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from([2, 3, 5, 8]),
    st.sampled_from([16, 17, 32, 40]),
    st.sampled_from([1, 4, 8, 16, 32, 40]),
    st.integers(1, 2),
    st.sampled_from(DTYPES),
)
def test_any_groups(groups, C, K, stride, dtype):
    case = conv("drawn", (2, groups * C, 5, 4), (groups * K, 3, 3), stride=stride, padding=1, groups=groups)
    check(case, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kernel, descriptors", [(1, False), (1, True), (3, False), (7, False)])
def test_nan_and_infinity_reach_the_outputs_that_saw_them(kernel, value, descriptors):
    case = conv("special", (2, 3 if kernel == 7 else 16, 9, 9), (32, kernel, kernel), padding=kernel // 2)
    (x, weight, *bn), kwargs = make_inputs(case, dtype=torch.float32, device=DEVICE)
    x[1, 1, 4, 4] = value
    config = dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, num_warps=4, num_stages=2, descriptors=descriptors)
    y = launch((x, weight, *bn), kwargs, config=config)
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), padding=kernel // 2)
    weight_, bias, mean, var = (v.double()[:, None, None] for v in bn)
    expected = ((expected - mean) * weight_ / (var + 1e-5).sqrt() + bias).relu()
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert not y[0].isnan().any() and not y[0].isinf().any()


@pytest.mark.parametrize("channels", [16, 20])
def test_nan_of_one_group_stays_in_it(channels):
    case = conv("groups", (1, 3 * channels, 5, 5), (3 * channels, 3, 3), padding=1, groups=3)
    (x, *rest), kwargs = make_inputs(case, dtype=torch.float32, device=DEVICE)
    x[:, channels : 2 * channels] = float("nan")
    first, second, third = launch((x, *rest), kwargs).chunk(3, 1)
    assert second.isnan().all() and not first.isnan().any() and not third.isnan().any()


def test_neighbours_of_padding_and_edges_stay_out():
    """What lies beyond an image, a row or the channels is never read into a result: it is NaN here."""
    case = conv("framed", (2, 10, 6, 5), (24, 3, 3), padding=1)
    (x, weight, *bn), kwargs = make_inputs(case, dtype=torch.float32, device=DEVICE)
    frame = torch.full((4, 6, 5, 10), float("nan"), device=DEVICE)
    frame[1:3] = x.permute(0, 2, 3, 1)
    framed = frame.permute(0, 3, 1, 2)[1:3]
    assert framed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(launch((framed, weight, *bn), kwargs), launch((x, weight, *bn), kwargs))


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("id, copies", [("conv-7x7-s2", False), ("conv-bias", True)])
def test_the_stem_copies_no_layout(id, copies, layout):
    case = next(case for case in SMALL if case.id == id)
    args, kwargs = make_inputs(case, dtype=torch.float16, device=DEVICE, layout=layout)
    with Operators() as operators:
        launch(args, kwargs)
    assert ("clone" in operators.names) == copies


@pytest.mark.skipif(DEVICE == "cuda", reason="the memory is the operating system's, never touched")
@pytest.mark.parametrize(
    "C, H, W, channels_last, dilated",
    [
        (32, 2**13, 2**13, True, False),
        (32, 2, 2**28, True, False),
        (128, 2**13, 2**13, True, True),
        (2, 2**15, 2**15, False, False),
        (3, 2**15, 2**15, False, False),
    ],
    ids=["image", "column", "tap", "stem-image", "stem-channel"],
)
def test_offsets_past_2_31(C, H, W, channels_last, dilated):
    """Images of 2^31 elements and more, of which only the 2 x 2 pixels that the convolution reads exist."""
    half = [H // 2, W // 2]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
    storage = torch.frombuffer(mmap.mmap(-1, 2 * C * H * W * 2, flags), dtype=torch.float16)
    strides = (1, C * W, C) if channels_last else (H * W, W, 1)
    x = storage.as_strided((2, C, H, W), (C * H * W, *strides))
    pixels = torch.randn((2, C, 2, 2)).half()
    for i, j in product(range(2), range(2)):
        x[:, :, i * half[0], j * half[1]] = pixels[:, :, i, j]
    weight = torch.randn((16, C, 2, 2) if dilated else (16, C, 1, 1)).half()
    stride, dilation = ([H, W], half) if dilated else (half, [1, 1])
    y = triton_conv.conv_bn_act(x, weight, None, None, None, None, None, 1e-5, stride, [0, 0], dilation, 1, None, False)
    expected = torch.nn.functional.conv2d(pixels.double(), weight.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "x_shape, weight_shape, groups, dtype, reason",
    [
        ((256, 3, 224, 224), (64, 3, 7, 7), 1, torch.float16, None),
        ((256, 512, 14, 14), (512, 16, 3, 3), 32, torch.bfloat16, None),
        ((256, 256, 28, 28), (256, 8, 3, 3), 32, torch.bfloat16, "groups of 8 input channels"),
        ((256, 128, 56, 56), (128, 4, 3, 3), 32, torch.float16, "groups of 4 input channels"),
        ((2, 64, 8, 8), (64, 1, 3, 3), 64, torch.float32, "groups of 1 input channels"),
        ((2, 64, 8, 8), (64, 64, 3, 3), 1, torch.float64, "float64"),
        ((1, 1, 2**16, 2**15), (1, 1, 1, 1), 1, torch.float16, "2^31"),
    ],
)
def test_unsupported(x_shape, weight_shape, groups, dtype, reason):
    found = triton_conv.unsupported(x_shape, weight_shape, [1, 1], [1, 1], [1, 1], groups, dtype)
    assert found is None if reason is None else reason in found
