"""The same cases on a CUDA device, under every backend that is there."""

import pytest
import torch
import torchvision
from batch_norm_train import BN_CASES, check_case, train

import resnet_fused
from resnet_fused import _cuda, _registry, testing
from resnet_fused._triton import batch_norm_train
from resnet_fused.models import get_model, list_models
from resnet_fused.testing import CASES, DTYPES, LAYOUTS, check, make_inputs

pytestmark = pytest.mark.gpu
BACKENDS = ["auto", "cuda", "triton", "cudnn"]


@pytest.fixture(autouse=True)
def _exact_float32():
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"


def force(backend):
    reason = None if backend == "auto" else _registry.unavailable(backend, torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)
    return resnet_fused.backend(backend)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_within_budget_of_float64(case, backend):
    for dtype in DTYPES[:1] if case.large else DTYPES:
        for layout in LAYOUTS[:1] if case.large else LAYOUTS:
            with force(backend):
                try:
                    check(case, dtype=dtype, device="cuda", layout=layout)
                except resnet_fused.BackendUnavailable as reason:
                    assert any(known in str(reason) for known in ("torch.float", "only with a ReLU", "cudnn serves"))
                    pytest.skip(str(reason))


@pytest.mark.parametrize(
    "case", [*BN_CASES, *(c for c in CASES if c.id.startswith("bn") and c.large)], ids=lambda c: c.id
)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_training_within_budget_of_float64(case, backend):
    for dtype in DTYPES[:1] if case.large else DTYPES:
        force(backend)
        check_case(case, dtype, backend, "cuda")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("id", ["bn-join", "bn-two-bn-join", "bn-pre-add", "bn-10-channels"])
def test_training_twice_gives_the_same_bits(id, backend):
    case = next(c for c in CASES if c.id == id)
    args, kwargs = make_inputs(case, dtype=torch.bfloat16, device="cuda")
    with force(backend):
        first, second = (train(case, testing.OPS[case.op], args, kwargs) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("writer, reader", [("cuda", "triton"), ("triton", "cuda")])
@pytest.mark.parametrize("C", [8, 10, 300])
def test_masks_go_from_one_backend_to_the_other(C, writer, reader):
    kernels = {"cuda": _cuda, "triton": batch_norm_train}
    x, residual, dy = (torch.randn(2, C, 5, 3, device="cuda", dtype=torch.float16) for _ in range(3))
    x, residual, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual, dy))
    mean, var, nothing = torch.zeros(C, device="cuda"), torch.ones(C, device="cuda"), (None,) * 5
    with force(writer), force(reader):
        masks = [kernels[b].apply_with_mask(x, None, None, mean, var, 0.0, residual)[1] for b in (writer, reader)]
        call = (dy, x, None, None, mean, var, 0.0, *nothing, masks[0], True)
        sums = [kernels[b].backward_sums(*call)[0] for b in (writer, reader)]
    assert torch.equal(*masks)
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("name", list_models()[:10])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_models_against_torchvision(name, dtype, backend):
    torch.manual_seed(0)
    ours = get_model(name).cuda().eval()
    theirs = torchvision.models.get_model(name).cuda().eval().to(memory_format=torch.channels_last)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 224, 224, device="cuda")
    with torch.no_grad():
        exact = theirs.double()(x.double())
        expected, ours = theirs.to(dtype)(x.to(dtype)), ours.to(dtype)
        with force(backend):
            y = ours(x.to(dtype))
    budget = 2 * (expected - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= budget


def test_two_streams_and_a_graph():
    case = next(c for c in CASES if c.id == "bn-two-bn-join")
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
def test_second_device():
    case = next(c for c in CASES if c.id == "bn-two-bn-join")
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


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gradients_past_2_to_the_31_elements(backend):
    x, dy = (torch.randn(1, 8, 2**28 + 7, 1, device="cuda", dtype=torch.float16) for _ in range(2))
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    vectors = [v.cuda() for v in (torch.rand(8) + 1, torch.randn(8), torch.randn(8), torch.rand(8) + 1)]

    def gradients(x, residual, dy):
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        y = resnet_fused.ops.batch_norm_act(x, *vectors, residual=residual, training=False)
        return torch.autograd.grad(y, (x, residual), dy)

    with force(backend):
        whole = gradients(x, dy, dy)
        alone = gradients(*(t[:, :, -9:].contiguous(memory_format=torch.channels_last) for t in (x, dy, dy)))
    assert all(torch.equal(a[:, :, -9:], b) for a, b in zip(whole, alone, strict=True))
