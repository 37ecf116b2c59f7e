"""The stem as one operator: in Triton's interpreter on the CPU, compiled on a GPU."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

import resnet_fused
from resnet_fused import ops
from resnet_fused.dispatch import numerics, registry
from resnet_fused.ops.stem import Call
from resnet_fused.testing import DTYPES, nan_filled_memory

triton_stem = pytest.importorskip("resnet_fused.backends.triton.stem", reason="needs Triton", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES = {  # of x and channels of the result
    "odd": ((2, 3, 21, 17), 40),
    "one-channel": ((1, 1, 8, 10), 16),
    "four-channels": ((1, 4, 13, 9), 64),
    "wide": ((1, 3, 6, 131), 24),
    "one-pixel": ((2, 2, 1, 1), 3),
    "one-pixel-of-8": ((2, 2, 1, 1), 8),
    "tiles": ((2, 3, 17, 70), 72),  # of the CUDA kernel: two bands and two strips of two images
    "many-channels": ((1, 3, 5, 6), 72),
}


def draw(shape, K=64, dtype=torch.float32, of_bytes=False, layout="channels_last", bn="affine", seed=0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    N, C, H, W = shape
    x = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    x = x if of_bytes else torch.randn(shape, generator=generator).to(dtype)
    if layout == "strided":
        wide = torch.full((N, C, 2 * H, W), 7 if of_bytes else float("nan"), dtype=x.dtype)
        wide[:, :, ::2] = x
        x = wide.to(DEVICE)[:, :, ::2]
    x = x.to(DEVICE).contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x.to(DEVICE)
    weight = (torch.randn(K, C, 7, 7, generator=generator) / (49 * C) ** 0.5).to(DEVICE, dtype)
    draws = torch.randn(4, K, generator=generator)
    vectors = (1 + draws[0] / 4, draws[1], draws[2] / 4, 1 + draws[3].tanh() / 2)
    vectors = [v.to(DEVICE, dtype if bn == "half" else torch.float32) for v in vectors]
    vectors = [None, None, *vectors[2:]] if bn == "plain" else vectors
    mean, std = (torch.tensor((*v, 0.3)[:C], device=DEVICE) if of_bytes else None for v in (MEAN, STD))
    return Call(x, weight.contiguous(memory_format=torch.channels_last), *vectors, 1e-5, mean, std)


def run(call: Call) -> torch.Tensor:
    return ops.stem(*call[:6], eps=call.eps, mean=call.mean, std=call.std)


def assert_within_budget(y: torch.Tensor, call: Call) -> None:
    reason = numerics.wrong((y,), list(numerics.call_limits(call)))
    assert reason is None, reason


@pytest.fixture(params=["triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel(request):
    """A backend's four functions."""
    if DEVICE == "cuda" and (reason := registry.unavailable(request.param, torch.device(DEVICE, 0))):
        pytest.skip(reason)
    return registry.implementation(request.param, "stem")


def planned(kernel, call: Call):
    if (reason := kernel.unsupported(call)) is not None:
        assert kernel is not triton_stem and (call.weight.dtype == torch.float32 or call.weight.shape[0] % 8), reason
        pytest.skip(f"{kernel.__name__}: {reason}")
    return kernel.plan(call, kernel.configs(call)[0])


def check(call: Call, plan) -> None:
    with nan_filled_memory(), torch.no_grad():
        y = plan(call)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_within_budget(y, call)


@pytest.mark.any_device
@pytest.mark.parametrize("of_bytes", [False, True], ids=["float", "bytes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("id", SHAPES)
def test_within_budget_of_float64(id, dtype, of_bytes, kernel):
    shape, K = SHAPES[id]
    call = draw(shape, K, dtype, of_bytes)
    check(call, planned(kernel, call))


@pytest.mark.any_device
@pytest.mark.parametrize("of_bytes", [False, True], ids=["float", "bytes"])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("bn", ["plain", "half"])
def test_layouts_and_vectors(layout, bn, of_bytes, kernel):
    call = draw((2, 3, 11, 14), 32, torch.float16, of_bytes, layout, bn)
    check(call, planned(kernel, call))


@pytest.mark.gpu
def test_more_tiles_than_the_device_runs_at_once():
    """A block of the CUDA kernel goes from one tile to its next."""
    if (reason := registry.unavailable("cuda", torch.device(DEVICE, 0))) is not None:
        pytest.skip(reason)
    at_once = 2 * torch.cuda.get_device_properties(0).multi_processor_count
    call = draw((at_once + 3, 1, 12, 60), 8, torch.float16)
    check(call, planned(registry.implementation("cuda", "stem"), call))


@pytest.mark.any_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_every_tile_on_several_strips_and_bands(dtype, capability, monkeypatch):
    call = draw((1, 3, 10, 140), 64, dtype)
    with monkeypatch.context() as patch:
        patch.setattr(triton_stem.conv, "device", lambda index: (capability, 132))
        configs = triton_stem.configs(call)
    tiles = {(c["BLOCK_Q"], c["BLOCK_N"]) for c in configs}
    assert len({c["rows"] for c in configs}) > 1 and len(tiles) > (dtype == torch.float16)
    for config in configs:
        check(call, triton_stem.plan(call, config))


@pytest.mark.any_device
def test_bands_are_large_where_there_are_images_enough(monkeypatch):
    monkeypatch.setattr(triton_stem.conv, "device", lambda index: ((9, 0), 132))

    def rows(batch):
        x = torch.empty(batch, 3, 224, 224, device="meta", dtype=torch.float16)
        weight, vector = torch.empty(64, 3, 7, 7, device="meta", dtype=torch.float16), torch.empty(64, device="meta")
        return triton_stem.configs(Call(x, weight, *[vector] * 4, 1e-5, None, None))[0]["rows"]

    assert (rows(256), rows(32), rows(1)) == (56, 7, 2)


@pytest.mark.any_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_border_of_bytes_is_0_of_what_is_normalised(dtype, kernel):
    """Black pixels are -2, and every sum is exact: 2 for every pixel that the kernel meets, and none for the border."""
    x = torch.zeros((1, 1, 6, 9), dtype=torch.uint8, device=DEVICE)
    weight = torch.full((16, 1, 7, 7), -1.0, dtype=dtype, device=DEVICE)
    zeros, ones = torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE)
    mean, std = torch.tensor([0.5], device=DEVICE), torch.tensor([0.25], device=DEVICE)
    call = Call(x, weight, None, None, zeros, ones, 0.0, mean, std)
    y = planned(kernel, call)(call)
    met = F.conv2d(torch.ones(1, 1, 6, 9), torch.ones(1, 1, 7, 7), None, 2, 3)
    expected = F.max_pool2d(2 * met, 3, 2, 1).to(DEVICE, dtype).expand(1, 16, 2, 3)
    assert torch.equal(y, expected) and torch.equal(call.reference(), expected)


@pytest.mark.any_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_go_where_eagers_do(value, dtype, kernel):
    """One in every image, in each column of a row and each row of a column."""
    places = [*product([2], range(11)), *product(range(6), [5])]
    call = draw((len(places), 1, 6, 11), 16, dtype)
    for image, (row, column) in zip(call.x, places, strict=True):
        image[0, row, column] = value
    y, expected = planned(kernel, call)(call), call.reference()
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isposinf(), expected.isposinf())


@pytest.mark.any_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_what_lies_around_an_image_is_never_read(dtype, kernel):
    call = draw((1, 3, 9, 13), 16, dtype)
    frame = torch.full((3, 9, 13, 3), float("nan"), dtype=dtype, device=DEVICE)
    frame[1:2] = call.x.permute(0, 2, 3, 1)
    framed = call._replace(x=frame.permute(0, 3, 1, 2)[1:2])
    plan = planned(kernel, call)
    assert torch.equal(plan(framed), plan(call))


@pytest.mark.any_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_large_mean_is_subtracted_before_it_is_scaled(dtype, kernel):
    call = draw((1, 3, 13, 13), 16, dtype)
    x, weight = call.x + 1e3, call.weight.abs()
    mean = F.conv2d(x.double(), weight.double(), None, 2, 3)[:, :, 2:-2, 2:-2].mean((0, 2, 3)).float()
    call = call._replace(x=x, weight=weight, running_mean=mean, running_var=torch.ones_like(mean))
    check(call, planned(kernel, call))
    y = planned(kernel, call)(call)
    assert y[:, :, 1:-1, 1:-1].abs().max() < 500  # what is near the mean, not the border


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_an_empty_batch(backend):
    with resnet_fused.backend(backend), torch.no_grad():
        assert run(draw((0, 3, 8, 8), 16)).shape == (0, 16, 2, 2)


@pytest.mark.parametrize("of_bytes", [False, True], ids=["float", "bytes"])
@pytest.mark.parametrize("backend", ["auto", "eager", "onednn", "triton"])
def test_under_every_backend(backend, of_bytes):
    """A backend without a kernel for it gets the convolution."""
    call, heard = draw((1, 3, 10, 11), 16, of_bytes=of_bytes), []
    registry.listener = lambda op, choice, call: heard.append((op, choice.backend))
    try:
        with resnet_fused.backend(backend), torch.no_grad():
            y, again = run(call), run(call)
    finally:
        registry.listener = None
    assert torch.equal(y, again)
    assert_within_budget(y, call)
    served = {"auto": ("conv_bn_act", "eager"), "triton": ("stem", "triton")}
    assert heard == 2 * [served.get(backend, ("conv_bn_act", backend))]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c._replace(weight=c.weight[:, :, 1:, 1:]), r"weight must have shape \[K, 3, 7, 7\]"),
        (lambda c: c._replace(weight=c.weight[:, :2]), r"weight must have shape \[K, 3, 7, 7\] for x's 3 channels"),
        (lambda c: c._replace(x=c.x.half()), "x must be uint8 or of weight's dtype torch.float32"),
        (lambda c: c._replace(x=c.x.int()), "x must be of a floating-point dtype, got torch.int32"),
        (lambda c: c._replace(x=c.x[0]), "x must have 4 dimensions"),
        (lambda c: c._replace(x=c.x[:, :, :0]), "x must have images of 1 pixel or more"),
        (lambda c: c._replace(x=c.x.byte()), "mean must be given where x is uint8, and only there; got None"),
        (lambda c: c._replace(std=torch.ones(3)), "std must be given where x is uint8, and only there; got a tensor"),
        (lambda c: c._replace(x=c.x.byte(), mean=torch.ones(2)), r"mean must have shape \(3,\)"),
        (lambda c: c._replace(x=c.x.byte(), mean=torch.ones(3).double()), "mean must be of dtype torch.float32"),
        (lambda c: c._replace(running_var=None), "running_mean and running_var must be given"),
        (lambda c: c._replace(bn_weight=torch.ones(3)), r"bn_weight must have shape \(16,\)"),
    ],
)
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.skipif(DEVICE == "cuda", reason="on the CPU")
def test_errors(change, message, backend):
    with pytest.raises(ValueError, match=message), resnet_fused.backend(backend):
        run(change(draw((1, 3, 8, 8), 16)))


def test_channels_that_the_kernel_does_not_take_are_the_convolutions():
    call, heard = draw((1, 3, 9, 9), 16), []
    call = call._replace(x=call.x.repeat(1, 2, 1, 1), weight=call.weight.repeat(1, 2, 1, 1))
    registry.listener = lambda op, choice, call: heard.append((op, choice))
    try:
        with resnet_fused.backend("triton"), torch.no_grad():
            assert_within_budget(run(call), call)
    finally:
        registry.listener = None
    (first, why), (second, served) = heard
    assert (first, why.rejected) == ("stem", (("triton", "x has 6 channels; the kernel serves 1 to 4"),))
    assert (second, served.backend) == ("conv_bn_act", "triton")


@pytest.mark.parametrize("of_bytes", [False, True], ids=["float", "bytes"])
def test_gradients_are_the_plain_formulas(of_bytes):
    call = draw((1, 3, 9, 9), 16, torch.float64, of_bytes, bn="half")
    weight = call.weight.requires_grad_()
    x = call.x if of_bytes else call.x.requires_grad_()
    inputs = [weight] if of_bytes else [x, weight]
    found = torch.autograd.grad(run(call).sum(), inputs)
    expected = torch.autograd.grad(call.reference().sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    with resnet_fused.backend("triton"):
        single = draw((1, 3, 9, 9), 16, of_bytes=of_bytes)
        y = ops.stem(single.x, single.weight.requires_grad_(), *single[2:6], mean=single.mean, std=single.std)
        assert y.grad_fn is not None


def test_the_operator_is_registered_soundly():
    for of_bytes in (False, True):
        call = draw((1, 3, 9, 9), 16, of_bytes=of_bytes)
        with resnet_fused.backend("triton"):
            torch.library.opcheck(torch.ops.resnet_fused.stem.default, tuple(call))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_what_a_convolution_would(dtype):
    for of_bytes in (False, True):
        call = draw((1, 3, 9, 9), 16, of_bytes=of_bytes)
        low = call._replace(x=call.x if of_bytes else call.x.to(dtype), weight=call.weight.to(dtype))
        for backend in ("eager", "triton"):
            with resnet_fused.backend(backend), torch.no_grad(), torch.autocast(DEVICE, dtype):
                y = run(call)
            assert y.dtype == dtype
            assert_within_budget(y, low)
