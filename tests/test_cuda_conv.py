"""The CUDA convolutions' planner, compiled for the CPU, and how the cuda backend is chosen; the kernels need a GPU."""

import ctypes
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import conv_planner
import host_cuda
import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused import BackendUnavailable, explain, ops, testing, tune
from resnet_fused.backends.cuda import conv_bn_act, extension, kernels
from resnet_fused.dispatch import registry, speed, store, trust
from resnet_fused.models import get_model
from resnet_fused.ops.batch_norm_act.formulas import plain_apply
from resnet_fused.ops.conv_bn_act import reference

NAMES = ["resnet18", "resnet50", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2"]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 100, 128, 256, 512, 1024]
TILES = {(128, 128), (128, 64), (64, 64)}
H100, A100, L4 = (9, 0, 132), (8, 0, 108), (8, 9, 58)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to compile the planner")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return conv_planner.load(tmp_path_factory.mktemp("planner"))


def problem(x, weight, stride, padding, dilation, groups, itemsize):
    N, C, H, W = x
    K, _, R, S = weight
    return (ctypes.c_int64 * 15)(N, H, W, C, K, R, S, *stride, *padding, *dilation, groups, itemsize)


@pytest.fixture(scope="module")
def planner(library):
    """`_C.conv_plans` of a build with both families."""

    def conv_plans(*args):
        *sizes, major, minor, multiprocessors = args
        device = (library.host_conv_family(major, minor, True, True) == 90, major, minor, multiprocessors)
        found, count = (ctypes.c_int * 64)(), ctypes.c_int()
        reason = library.host_conv_plans(problem(*sizes), *device, found, ctypes.byref(count))
        plans = [tuple(found[3 * i : 3 * i + 3]) for i in range(count.value)]
        return reason and reason.decode(), plans

    conv_plans.family = library.host_conv_family
    return conv_plans


@pytest.fixture(scope="module")
def layers():
    """(x [C, H, W], Conv2d) of every convolution that differs."""
    found = {}

    def note(conv, args, y):
        found.setdefault((args[0].shape[1:], repr(conv)), conv)

    for name in NAMES:
        with torch.device("meta"), torch.no_grad():
            model = get_model(name).eval()
            for conv in model.modules():
                if isinstance(conv, nn.Conv2d):
                    conv.register_forward_hook(note)
            model(torch.empty(1, 3, 224, 224))
    assert len(found) == 70, len(found)
    return [(shape, conv) for (shape, _), conv in found.items()]


def geometry(conv: nn.Conv2d) -> tuple:
    return conv.weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups


def blocks(plan: tuple[int, int, int], rows: int, columns: int) -> int:
    return -(-rows // plan[0]) * -(-columns // plan[1]) * plan[2]


@pytest.mark.parametrize("device", [H100, A100, L4], ids=["H100", "A100", "L4"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_resnet_shape_is_within_the_kernels_limits(planner, layers, device, itemsize):
    served = 0
    for shape, conv in layers:
        K, C, R, S = conv.weight.shape
        P, Q = (-(-size // s) for size, s in zip(shape[1:], conv.stride, strict=True))
        for batch in BATCHES:
            reason, plans = planner((batch, *shape), *geometry(conv), itemsize, *device)
            largest = max(shape.numel() * batch, batch * P * Q * K) * itemsize
            refused = conv.groups > 1 or R == 7 or (device[:2] < (9, 0) and largest >= 2**31)
            assert (reason is not None) == refused == (not plans), (shape, conv, batch, reason)
            served += not refused
            assert refused or len(plans) >= (2 if itemsize == 4 and device != H100 else 3)
            for plan in plans:
                tile_m, tile_n, splits = plan
                assert (tile_m, tile_n) in TILES and C % 8 == K % 8 == 0
                assert device == H100 or tile_n * itemsize <= 256  # a thread of sm_80's epilogue keeps its columns
                assert -(-batch * P * Q // tile_m) < 2**31 and -(-K // tile_n) < 2**16  # the grid
                if splits > 1:  # a plain GEMM with two steps of 64 channels or more in each block, all in one wave
                    assert device == H100 and itemsize == 2 and (R, *conv.stride) == (1, 1, 1)
                    assert C >= 128 * splits and blocks(plan, batch * P * Q, K) <= device[2]
    assert served > 400


def test_the_default_keeps_the_multiprocessors_busy(planner, layers):
    """The busiest multiprocessor gets little more than its share, or the smallest tile serves."""
    for shape, conv in layers:
        for batch in BATCHES:
            _, plans = planner((batch, *shape), *geometry(conv), 2, *H100)
            if not plans:
                continue
            rows = batch * shape[1] * shape[2] // conv.stride[0] ** 2
            count = blocks(plans[0], rows, conv.out_channels)
            share = -(-count // 132) * 132 / count
            assert share <= 1.35 or count <= 2 * 132, (shape, conv, batch, plans[0], share)


def test_large_tiles_for_large_problems(planner):
    three_by_three = ((256, 256, 3, 3), [1, 1], [1, 1], [1, 1], 1, 2)
    defaults = [planner((batch, 256, 14, 14), *three_by_three, *H100)[1][0] for batch in (1, 8, 256, 1024)]
    assert defaults == [(64, 64, 1), (64, 64, 1), (128, 128, 1), (128, 128, 1)]


def test_a_tail_of_one_block_is_avoided(planner):
    three_by_three = ((128, 256, 3, 3), [1, 1], [1, 1], [1, 1], 1, 2)
    assert planner((1, 256, 128, 132), *three_by_three, *H100)[1][0] == (128, 128, 1)  # 132 blocks
    assert planner((1, 256, 128, 133), *three_by_three, *H100)[1][0] == (128, 64, 1)


def test_a_short_gemm_with_a_long_reduction_is_split(planner):
    one_by_one = ([1, 1], [0, 0], [1, 1], 1, 2)
    assert planner((1, 2048, 7, 7), (512, 2048, 1, 1), *one_by_one, *H100)[1][0] == (128, 128, 8)
    assert planner((256, 2048, 7, 7), (512, 2048, 1, 1), *one_by_one, *H100)[1][0][2] == 1
    assert all(plan[2] == 1 for plan in planner((1, 2048, 7, 7), (512, 2048, 1, 1), *one_by_one, *A100)[1])


@pytest.mark.parametrize(
    "x, weight, options, reason",
    [
        ((2, 64, 8, 8), (64, 32, 3, 3), {"groups": 2}, "groups"),
        ((2, 12, 8, 8), (64, 12, 3, 3), {}, "multiples of 8"),
        ((2, 16, 8, 8), (10, 16, 1, 1), {}, "multiples of 8"),
        ((2, 16, 8, 8), (16, 16, 5, 5), {}, "1x1 and 3x3"),
        ((2, 16, 8, 8), (16, 16, 1, 3), {}, "1x1 and 3x3"),
        ((2, 16, 8, 8), (16, 16, 3, 3), {"stride": [3, 1]}, "stride of 1 or 2"),
        ((2, 16, 8, 8), (16, 16, 3, 3), {"stride": [1, 0]}, "stride of 1 or 2"),
        ((2, 16, 8, 8), (16, 16, 3, 3), {"stride": [-1, 1]}, "stride of 1 or 2"),
        ((2, 16, 8, 8), (16, 16, 3, 3), {"padding": [128, 1]}, "padding of 0 to 127"),
        ((2, 16, 8, 8), (16, 16, 3, 3), {"padding": [1, -1]}, "padding of 0 to 127"),
        ((2, 16, 300, 300), (16, 16, 3, 3), {"dilation": [1, 65]}, "dilation of 1 to 64"),
        ((2, 16, 8, 8), (16, 16, 3, 3), {"dilation": [0, 1]}, "dilation of 1 to 64"),
        ((2, 16, 2, 2), (16, 16, 3, 3), {}, "larger than the padded input"),
        ((2, 16, 2, 8), (16, 16, 3, 3), {"stride": [2, 2]}, "larger than the padded input"),
        ((2**17, 8, 128, 128), (8, 8, 1, 1), {}, "2\\^31 output pixels"),
        ((2, 16, 8, 8), (2**23, 16, 1, 1), {}, "output channels"),
        ((2, 16, 8, 8), (16, 16, 3, 3), {"padding": [127, 127], "dilation": [2, 64], "stride": [2, 1]}, None),
    ],
)
def test_what_is_refused(planner, x, weight, options, reason):
    defaults = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    found, plans = planner(x, weight, *(defaults | options).values(), 2, *H100)
    assert (found is None and plans) if reason is None else re.search(reason, found)


def test_a_plan_that_no_kernel_runs_is_refused(library):
    gemm = problem((1, 512, 7, 7), (512, 512, 1, 1), [1, 1], [0, 0], [1, 1], 1, 2)  # 8 steps
    tf32 = problem((1, 512, 7, 7), (512, 512, 1, 1), [1, 1], [0, 0], [1, 1], 1, 4)
    conv = problem((1, 512, 7, 7), (512, 512, 3, 3), [1, 1], [1, 1], [1, 1], 1, 2)
    for sizes, sm90a, plan, reason in [
        (gemm, True, (64, 64, 1), None),
        (gemm, True, (128, 128, 8), None),
        (gemm, True, (64, 64, 2), b"only the tile 128x128 can be split"),
        (gemm, True, (128, 64, 2), b"only the tile 128x128 can be split"),
        (gemm, True, (128, 128, 9), b"splits must be between 1 and"),
        (gemm, True, (128, 128, 0), b"splits must be between 1 and"),
        (gemm, True, (64, 128, 1), b"no such tile"),
        (gemm, False, (128, 128, 1), None),
        (gemm, False, (128, 128, 2), b"can't be split"),
        (tf32, True, (128, 128, 2), b"can't be split"),
        (tf32, False, (128, 128, 1), b"no such tile"),
        (conv, True, (128, 128, 2), b"can't be split"),
    ]:
        found = library.host_why_not_plan(sizes, sm90a, *plan)
        assert found is None if reason is None else reason in found, (plan, found)


def test_every_plan_is_one_that_a_kernel_runs(library, planner, layers):
    for shape, conv in layers:
        for itemsize, device in product((2, 4), (H100, A100)):
            sizes = ((4, *shape), *geometry(conv), itemsize)
            for plan in planner(*sizes, *device)[1]:
                assert library.host_why_not_plan(problem(*sizes), device == H100, *plan) is None


@pytest.mark.parametrize(
    "device, itemsize, blocks",
    [
        (H100, 2, [1, 2, 3]),
        (H100, 4, [1, 2, 2]),
        (A100, 2, [2, 3, 4]),
        (A100, 4, [-1, 3, 4]),
        (L4, 2, [1, 2, 3]),
        (L4, 4, [-1, 2, 3]),
        ((10, 0, 148), 2, [2, 3, 4]),
        ((12, 0, 170), 2, [1, 2, 3]),
    ],
)
def test_blocks_that_share_a_multiprocessor(library, device, itemsize, blocks):
    tiles = [(128, 128), (128, 64), (64, 64)]
    sm90a = device == H100
    assert [library.host_conv_resident(sm90a, itemsize, *tile, 0, *device[:2]) for tile in tiles] == blocks


@pytest.mark.skipif(host_cuda.include_dir() is None, reason="cuda_runtime_api.h is needed")
def test_a_failed_launch_says_what_cuda_said(tmp_path):
    source, path = Path(__file__).parent / "host_cuda/conv_launch.cpp", tmp_path / "launch.so"
    flags = [
        "-shared",
        "-fPIC",
        "-std=c++17",
        "-Wall",
        "-Werror",
        "-Wl,-Bsymbolic",
        "-isystem",
        host_cuda.include_dir(),
    ]
    subprocess.run(["g++", *flags, source, "-o", path], check=True)
    launch = ctypes.CDLL(str(path)).host_launch
    launch.restype = ctypes.c_char_p
    left = ctypes.c_int()
    for attribute, launched, said in [
        (0, 0, None),
        (1, 0, b"invalid argument"),
        (0, 209, b"no kernel image is available"),
    ]:
        assert launch(attribute, launched, ctypes.byref(left)) == said and left.value == 0


def test_which_family_serves_which_device(planner):
    served = {c: planner.family(*c, True, True) for c in [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]}
    assert served == {(7, 5): 0, (8, 0): 80, (8, 9): 80, (9, 0): 90, (10, 0): 80, (12, 0): 80}
    assert planner.family(9, 0, True, False) == 80 and planner.family(8, 0, False, True) == 0


@pytest.fixture
def on_cpu(planner, monkeypatch, tmp_path):
    """The cuda backend on the CPU as on an H100, its kernel replaced by the reference; counts configurations."""
    launched = []

    def kernel(x, weight, bias, *args):
        *bn, eps, stride, padding, dilation, groups, residual, relu, config = args
        for t in (x, weight, residual):
            assert t is None or t.is_contiguous(memory_format=torch.channels_last)
        launched.append(tuple(config.values()))
        kwargs = dict(bias=bias, eps=eps, stride=stride, padding=padding, dilation=dilation, groups=groups)
        return reference(x, weight, *bn, residual=residual, act="relu" if relu else "none", **kwargs)

    monkeypatch.setattr(extension, "_C", type("_C", (), {"conv_plans": staticmethod(planner)}))
    monkeypatch.setattr(conv_bn_act, "device", lambda index: H100)
    monkeypatch.setattr(kernels, "conv_bn_act", kernel)
    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path)
    monkeypatch.setitem(registry._UNAVAILABLE, "cuda", lambda device_type, index: None)
    precision = torch.backends.cudnn.conv.fp32_precision
    trust.forget(), speed.forget()
    yield launched
    trust.forget(), speed.forget()
    torch.backends.cudnn.conv.fp32_precision = precision


X = torch.randn(1, 64, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
WEIGHT = torch.randn(64, 64, 3, 3).bfloat16() / 24
BN = [v.abs() + 0.5 for v in torch.randn(4, 64)]


def test_the_backend_is_checked_launched_and_tuned(on_cpu, monkeypatch):
    monkeypatch.setattr(registry, "_AUTO_DEVICES", ("cpu",))
    monkeypatch.setitem(registry._ORDER, "conv", ("cuda", "triton"))
    case = next(c for c in testing.CASES if c.id == "conv-3x3-join")
    testing.check(case, dtype=torch.float16, layout="strided")
    assert on_cpu == [(64, 64, 1)] * 2  # the self-check's launch, then the call's
    model = nn.Sequential(resnet_fused.models.resnet.BasicBlock(64, 64)).eval().bfloat16()
    with torch.no_grad():
        rows = explain(model, X)
    assert [row.ran for row in rows] == [["conv_bn_act: cuda"]] * 2
    on_cpu.clear()
    with resnet_fused.backend("cuda"):
        found = tune(model, X, lambda launch: float(len(on_cpu)))
        assert [entry["candidates"] for entry in found.values()] == [3, 3]
        assert all(entry["config"] == dict(tile_m=64, tile_n=64, splits=1) for entry in found.values())


def test_a_wrong_convolution_is_disabled(on_cpu, monkeypatch):
    monkeypatch.setattr(kernels, "conv_bn_act", lambda x, *args: x)
    with resnet_fused.backend("cuda"), pytest.warns(UserWarning, match="conv_bn_act/cuda/.*is disabled.*: result 0 "):
        with pytest.raises(BackendUnavailable, match="result 0 "):
            ops.conv_bn_act(X, WEIGHT, *BN, padding=1)


def test_forced_it_says_why_two_passes_serve(on_cpu, monkeypatch):
    """`auto` passes the same calls on."""
    passes, said = [], []
    monkeypatch.setattr(kernels, "batch_norm_act", lambda *args: passes.append(1) or plain_apply(*args, False))
    monkeypatch.setattr(registry, "listener", lambda op, choice, args: said.append(choice))
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    for reason, x, weight, options in [
        ("groups", X, WEIGHT[:, :32], {"groups": 2}),
        ("multiples of 8", X[:, :3], torch.zeros(64, 3, 7, 7).bfloat16(), {"stride": 2}),
        ("float32 as TF32", X.float(), WEIGHT.float(), {}),
        ("x does not start at a multiple of 16 bytes", shifted(X), WEIGHT, {"padding": 1}),
    ]:
        weight = weight.contiguous(memory_format=torch.channels_last)
        with resnet_fused.backend("cuda"):
            y = ops.conv_bn_act(x, weight, *BN, **options)
        torch.testing.assert_close(y, reference(x, weight, *BN, **options))
        assert reason in said[-1].rejected[0][1] and "in one pass" in said[-1].rejected[0][1]
        monkeypatch.setattr(registry, "_AUTO_DEVICES", ("cpu",))
        monkeypatch.setattr(registry, "_ORDER", dict.fromkeys(registry._ORDER, ("cuda",)))
        passes.clear()
        ops.conv_bn_act(x, weight, *BN, **options)
        assert said[-1].backend == "eager" and reason in said[-1].rejected[0][1] and not passes
    assert not on_cpu


def test_tf32_where_it_is_allowed(on_cpu):
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    with resnet_fused.backend("cuda"):
        ops.conv_bn_act(X.float(), WEIGHT.float(), *BN, padding=1)
    assert on_cpu == [(64, 64, 1)] * 2


def shifted(x: torch.Tensor) -> torch.Tensor:
    """x in channels_last, one element off its alignment."""
    N, C, H, W = x.shape
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(N, H, W, C).permute(0, 3, 1, 2).copy_(x)
