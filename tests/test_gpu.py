"""The same cases on a CUDA device, under every backend that is there."""

import pytest
import torch
import torchvision
from batch_norm_train import BN_CASES, check_case, train
from conftest import VIRTUAL
from test_layers import EDITS, assert_same, first_blocks, twins
from test_papers import assert_follows_eager
from torch import nn

import resnet_fused
from resnet_fused import testing
from resnet_fused.backends.cuda import kernels as cuda_kernels
from resnet_fused.backends.triton import batch_norm_train
from resnet_fused.dispatch import compare, plans, registry, speed, store, trust
from resnet_fused.models import get_model
from resnet_fused.models.weights import TORCHVISION_ENUMS
from resnet_fused.ops.conv_bn_act import Call
from resnet_fused.testing import CASES, DTYPES, LAYOUTS, Case, check, make_inputs
from resnet_fused.train import Settings
from resnet_fused.train import loop as train_loop

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error:.*is disabled on this device")]
BACKENDS = ["auto", "cuda", "triton", "cudnn"]
DEVICE = torch.device("cuda")
SIZE = 32 if VIRTUAL else 224  # of whole models' images
SMALL = [c for c in CASES if not c.large]
DEEPER = {"resnet34", "resnet101", "resnet152", "wide_resnet101_2"}  # whose first two blocks a stage another has


def large(*values):
    """A parameter set that takes too long to emulate."""
    return pytest.param(*values, marks=pytest.mark.real_gpu)


@pytest.fixture(autouse=True)
def _settings(request, monkeypatch):
    """float32 as IEEE has it; on the virtual GPU, where a reference stands for cuDNN, it serves only who forces it."""
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"
    if VIRTUAL and hasattr(request.node, "callspec"):
        monkeypatch.setattr(torch.backends.cudnn, "enabled", request.node.callspec.params.get("backend") == "cudnn")


def force(backend):
    reason = None if backend == "auto" else registry.unavailable(backend, torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)
    return resnet_fused.backend(backend)


def prefer(backend, monkeypatch):
    """The backend where it can serve, the others elsewhere: not every one has kernels for all layers of a model."""
    force(backend)
    order = {name: (backend, *names) if backend in names else names for name, names in registry._ORDER.items()}
    monkeypatch.setattr(registry, "_ORDER", order)
    monkeypatch.setattr(plans, "kept", {})
    monkeypatch.setattr(plans, "short", {})


def served(case):
    """Those that have the operator, and all for the stem, of which each has the convolution."""
    return [b for b in BACKENDS if b == "auto" or case.op == "stem" or registry.serves(b, case.op)]


@pytest.mark.parametrize(
    "backend, case, dtype, layout",
    [
        *((b, c, dtype, layout) for c in SMALL for dtype in DTYPES for layout in LAYOUTS for b in served(c)),
        *(large(b, c, DTYPES[0], LAYOUTS[0]) for c in CASES if c.large for b in served(c)),
    ],
    ids=lambda value: getattr(value, "id", str(value)),
)
def test_within_budget_of_float64(backend, case, dtype, layout):
    with force(backend):
        check(case, dtype=dtype, device="cuda", layout=layout)


@pytest.mark.skipif(not VIRTUAL, reason="which precision a GPU's PyTorch chooses is its own")
def test_tf32_where_it_is_allowed_and_pytorch_does_not_use_it(monkeypatch):
    monkeypatch.setattr("virtual_gpu.cudnn._operand", lambda t: t)
    case = next(c for c in CASES if c.id == "conv-3x3-join")
    (x, weight, *bn), kwargs = make_inputs(case, dtype=torch.float32, device="cuda")
    call = Call(x, weight, None, *bn, 1e-5, [1, 1], [1, 1], [1, 1], 1, kwargs["residual"], True)
    config = registry.implementation("triton", call.op).configs(call)[0]
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert compare("triton", call, config) is None
    check(case, dtype=torch.float32, device="cuda")
    plan = registry.implementation("triton", call.op).plan(call, config)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with pytest.raises(AssertionError, match="is off by"):
        testing.assert_within_budget(case, (plan(call),), (x, weight, *bn), kwargs)


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
        call = Call(x, weight, kwargs["bias"], *bn, 1e-5, *pairs, 1, kwargs["residual"], True)
        for config in registry.implementation("cuda", call.op).configs(call):
            assert compare("cuda", call, config) is None, config


@pytest.mark.parametrize(
    "case", [*BN_CASES, *(large(c) for c in CASES if c.kernel is None and c.large)], ids=lambda c: c.id
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
    kernels = {"cuda": cuda_kernels, "triton": batch_norm_train}
    x, residual, dy = (torch.randn(2, C, 5, 3, device="cuda", dtype=torch.float16) for _ in range(3))
    x, residual, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual, dy))
    mean, var, nothing = torch.zeros(C, device="cuda"), torch.ones(C, device="cuda"), (None,) * 5
    with force(writer), force(reader):
        masks = [kernels[b].apply_with_mask(x, None, None, mean, var, 0.0, residual)[1] for b in (writer, reader)]
        call = (dy, x, None, None, mean, var, 0.0, *nothing, masks[0], True)
        sums = [kernels[b].backward_sums(*call)[0] for b in (writer, reader)]
    assert torch.equal(*masks)
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("name", [large(name) if name in DEEPER else name for name in TORCHVISION_ENUMS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_models_against_torchvision(name, dtype, backend, monkeypatch):
    prefer(backend, monkeypatch)
    torch.manual_seed(0)
    ours = get_model(name).cuda().eval()
    for bn in (m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.running_var.fill_(4)  # 152 layers of a fresh BN's overflow float16
    theirs = torchvision.models.get_model(name).cuda().eval().to(memory_format=torch.channels_last)
    theirs.load_state_dict(ours.state_dict())
    if VIRTUAL:  # there are no kernels but those of a stage's first two blocks
        first_blocks(ours, 2), first_blocks(theirs, 2)
    x = torch.randn(2, 3, SIZE, SIZE, device="cuda")
    with torch.no_grad():
        exact = theirs.double()(x.double())
        expected, ours = theirs.to(dtype)(x.to(dtype)), ours.to(dtype)
        y = ours(x.to(dtype))
        rows = resnet_fused.explain(ours, x.to(dtype))
    if backend == "cuda" and dtype != torch.float32:
        assert sum(row.ran == ["conv_bn_act: cuda"] for row in rows) > 10
    budget = 2 * (expected - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= budget


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("id", ["bn-two-bn-join", "conv-1x1-join", "conv-3x3-join"])
def test_two_streams_and_a_graph(id, backend, monkeypatch):
    prefer(backend, monkeypatch)
    case = next(c for c in CASES if c.id == id)
    args, kwargs = make_inputs(case, dtype=torch.float16, device="cuda")
    expected = testing.OPS[case.op](*args, **kwargs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):  # a launch elsewhere may be in time by chance
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


@pytest.mark.real_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_past_2_to_the_31_elements(backend):
    x = torch.randn(1, 8, device="cuda", dtype=torch.float16).expand(2**28 + 7, 8).contiguous()
    x = x.view(1, 2**28 + 7, 1, 8).permute(0, 3, 1, 2)
    vectors = [v.cuda() for v in (torch.rand(8) + 1, torch.randn(8), torch.randn(8), torch.rand(8) + 1)]
    with force(backend), torch.no_grad():
        y = resnet_fused.ops.batch_norm_act(x, *vectors, training=False)
        expected = resnet_fused.ops.batch_norm_act(x[:, :, -9:], *vectors, training=False)
        assert torch.equal(y[:, :, -9:], expected)


@pytest.mark.real_gpu
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


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_next_pass_sees_every_edit(edit, backend, monkeypatch):
    prefer(backend, monkeypatch)
    ours, theirs = (m.to(DEVICE) for m in twins())
    assert_same(ours, theirs, "auto")
    edit(ours), edit(theirs)
    assert_same(ours, theirs, "auto")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_autocast_runs_the_fused_kernels(dtype):
    ours, theirs = (m.to(DEVICE) for m in twins())
    x = torch.randn(4, 3, 64, 64, device=DEVICE)
    with torch.no_grad():
        exact = theirs.double()(x.double())
        with torch.autocast(DEVICE.type, dtype):
            y, expected = ours(x), theirs.float()(x)
            rows = [r for r in resnet_fused.explain(ours, x) if "Conv2d" in r.modules]
    assert y.dtype == dtype and not any("eager" in ran for r in rows for ran in r.ran)
    budget = 2 * (expected - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= budget


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
@pytest.mark.parametrize("recompute", [None, "activations", "blocks"])
def test_train_steps_follow_torchvision(recompute, backend, dtype):
    losses = []
    for model in twins(zero_init_residual=True):  # else rounding errors grow in a few steps, eager's too
        model = model.to(DEVICE).train()
        ours = isinstance(model, resnet_fused.ResNet)
        if ours:
            model.set_recompute(recompute)
        torch.manual_seed(0)
        x, target = torch.randn(16, 3, 64, 64, device=DEVICE), torch.arange(16, device=DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0, enabled=dtype == torch.float16)
        for _ in range(3):
            optimizer.zero_grad()
            with force(backend if ours else "auto"):
                with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                    loss = nn.functional.cross_entropy(model(x), target)
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    rtol = 1e-3 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(torch.tensor(losses[:3]), torch.tensor(losses[3:]), rtol=rtol, atol=0)


def test_graphed_replays_what_the_model_computes():
    ours, theirs = (m.to(DEVICE) for m in twins())
    x = torch.randn(2, 3, 64, 64, device=DEVICE)
    graphed = resnet_fused.graphed(ours, x)
    for edit in (lambda model: None, *EDITS):
        edit(ours), edit(theirs)
        for images in (x, x + 1, x[:1]):
            with torch.no_grad():
                expected = theirs(images)
            torch.testing.assert_close(graphed(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_graphed_under_autocast_casts_the_weights_of_the_day():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).to(DEVICE).eval()
    x = torch.randn(2, 3, 2, 2, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        graphed = resnet_fused.graphed(model, x)
    for _ in range(2):  # the cache of the first block is gone
        with torch.autocast(DEVICE.type, torch.bfloat16), torch.no_grad():
            assert torch.equal(graphed(x), model(x))
        with torch.no_grad():
            model[1].weight.mul_(3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_graphed_on_a_second_device_after_the_first():
    case = next(c for c in CASES if c.id == "conv-3x3-join")
    for device in ("cuda:0", "cuda:1"):
        (x, *tensors), kwargs = make_inputs(case, dtype=torch.float16, device=device)
        model = Convolution(tensors, kwargs).eval()
        graphed = resnet_fused.graphed(model, x)
        for images in (x, x + 1):
            assert torch.equal(graphed(images), model(images))


class Convolution(nn.Module):
    def __init__(self, tensors, kwargs):
        super().__init__()
        self.tensors, self.kwargs = tensors, kwargs

    def forward(self, x):
        with torch.no_grad():
            return resnet_fused.ops.conv_bn_act(x, *self.tensors, **self.kwargs)


def test_an_unchecked_kernel_is_eager_inside_a_capture(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path)
    trust.forget()
    case = next(c for c in CASES if c.id == "bn-two-bn-join")
    args, kwargs = make_inputs(case, dtype=torch.float32, device="cuda")
    with resnet_fused.backend("eager"):
        expected = testing.OPS[case.op](*args, **kwargs)
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(UserWarning, match="not checked before a CUDA graph was captured"), torch.cuda.graph(graph):
        captured = testing.OPS[case.op](*args, **kwargs)
    graph.replay()
    torch.testing.assert_close(captured, expected)


def test_tune_times_every_layer_and_its_winners_are_right(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path)
    speed.forget()
    ours, theirs = (m.to(DEVICE) for m in twins())
    x = torch.randn(2, 3, 33, 35, device=DEVICE)
    found = resnet_fused.tune(ours, x)
    assert len(found) > 6 and all(entry["candidates"] > 1 for entry in found.values())
    assert_same(ours, theirs, "auto")
    speed.forget()


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("cifar_resnet20", {}),
        ("cifar_plain20", {}),
        ("resnet18", {"shortcut": "A"}),
        ("resnet18", {"shortcut": "C", "stem": "cifar"}),
        ("preact_resnet50", {}),
        ("cifar_preact_resnet164", {}),
    ],
)
def test_the_papers_networks_follow_eager(name, kwargs, backend):
    torch.manual_seed(0)
    small = "cifar" in (*name.split("_"), kwargs.get("stem"))
    size = 32 if small else 64  # at 32 the last stage's BN sees four values behind the large stem
    x = torch.randn(4, 3, size, size, device=DEVICE)
    force(backend)
    assert_follows_eager(get_model(name, **kwargs).to(DEVICE), x, backend)


@pytest.mark.real_gpu
def test_a_training_run_in_float16(tmp_path):
    settings = Settings(model="cifar_resnet20", data="synthetic:512x32", iterations=60, batch=64, dtype="fp16")
    assert train_loop.train(settings, tmp_path / "run", device=DEVICE).error < 50  # of ten patterns
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["scaler"]
