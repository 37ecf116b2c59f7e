"""The same cases on a CUDA device, under every backend that is there."""

import pytest
import torch
import torchvision

import resnet_fused
from resnet_fused import _registry, testing
from resnet_fused.models import get_model, list_models
from resnet_fused.ops.conv_bn_act import backends, reference
from resnet_fused.testing import CASES, DTYPES, LAYOUTS, Case, check, make_inputs

pytestmark = pytest.mark.gpu
BACKENDS = ["auto", "cuda", "triton", "cudnn"]
REFUSALS = ("torch.float", "only with a ReLU", "cudnn serves", "CUDA kernels serve", "as TF32")


@pytest.fixture(autouse=True)
def _exact_float32():
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"


def force(backend):
    reason = None if backend == "auto" else _registry.unavailable(backend, torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)
    return resnet_fused.backend(backend)


def prefer(backend, monkeypatch):
    """The backend where it can serve, the others elsewhere: not every one has kernels for all layers of a model."""
    force(backend)
    order = {name: (backend, *names) if backend in names else names for name, names in _registry._ORDER.items()}
    monkeypatch.setattr(_registry, "_ORDER", order)
    monkeypatch.setattr(backends, "_plans", {})


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_within_budget_of_float64(case, backend):
    served = 0
    for dtype in DTYPES[:1] if case.large else DTYPES:
        for layout in LAYOUTS[:1] if case.large else LAYOUTS:
            with force(backend):
                try:
                    check(case, dtype=dtype, device="cuda", layout=layout)
                    served += 1
                except resnet_fused.BackendUnavailable as error:
                    assert any(known in str(error) for known in REFUSALS)
                    reason = str(error)
    if not served:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, kernel, stride, dilation",
    [
        ((2, 64, 28, 28), (64, 3, 3), 1, 1),
        ((2, 128, 15, 13), (256, 3, 3), 2, 1),
        ((3, 40, 9, 7), (72, 3, 3), 1, 2),
        ((2, 256, 14, 14), (512, 1, 1), 2, 1),
        ((1, 2048, 7, 7), (512, 1, 1), 1, 1),
    ],
)
def test_every_tile_of_the_cuda_convolution(shape, kernel, stride, dilation, dtype):
    with force("cuda"):
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        options = dict(stride=stride, dilation=dilation, padding=kernel[1] // 2)
        case = Case("tiles", "conv_bn_act", shape, kernel, options, frozenset({"residual", "bias"}))
        (x, weight, *bn), kwargs = make_inputs(case, dtype=dtype, device="cuda")
        pairs = ([options[k]] * 2 for k in ("stride", "padding", "dilation"))
        args = (x, weight, kwargs["bias"], *bn, 1e-5, *pairs, 1, kwargs["residual"], True)
        for config in backends.configs("cuda", args):
            assert backends.compare("cuda", args, config, reference) is None, config


@pytest.mark.parametrize("name", list_models()[:10])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_models_against_torchvision(name, dtype, backend, monkeypatch):
    prefer(backend, monkeypatch)
    torch.manual_seed(0)
    ours = get_model(name).cuda().eval()
    theirs = torchvision.models.get_model(name).cuda().eval().to(memory_format=torch.channels_last)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 224, 224, device="cuda")
    with torch.no_grad():
        exact = theirs.double()(x.double())
        expected, ours = theirs.to(dtype)(x.to(dtype)), ours.to(dtype)
        y = ours(x.to(dtype))
        rows = resnet_fused.explain(ours, x.to(dtype))
    if backend == "cuda" and dtype != torch.float32:
        assert sum(row.ran == ["conv_bn_act: cuda"] for row in rows) > 10
    budget = 2 * (expected - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= budget


@pytest.mark.parametrize("id", ["bn-two-bn-join", "conv-1x1-join", "conv-3x3-join"])
def test_two_streams_and_a_graph(id, monkeypatch):
    prefer("cuda", monkeypatch)
    case = next(c for c in CASES if c.id == id)
    args, kwargs = make_inputs(case, dtype=torch.float16, device="cuda")
    expected = testing.OPS[case.op](*args, **kwargs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(testing.OPS[case.op](*args, **kwargs), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = testing.OPS[case.op](*args, **kwargs)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("id", ["bn-two-bn-join", "conv-3x3-join"])
def test_second_device(id):
    case = next(c for c in CASES if c.id == id)
    check(case, dtype=torch.float16, device="cuda:1")


def test_past_2_to_the_31_elements():
    x = torch.randn(1, 8, device="cuda", dtype=torch.float16).expand(2**28 + 7, 8).contiguous()
    x = x.view(1, 2**28 + 7, 1, 8).permute(0, 3, 1, 2)
    vectors = [v.cuda() for v in (torch.rand(8) + 1, torch.randn(8), torch.randn(8), torch.rand(8) + 1)]
    for backend in ("cuda", "triton"):
        with force(backend), torch.no_grad():
            y = resnet_fused.ops.batch_norm_act(x, *vectors, training=False)
            expected = resnet_fused.ops.batch_norm_act(x[:, :, -9:], *vectors, training=False)
            assert torch.equal(y[:, :, -9:], expected)
