"""Whole models on the fused kernels in the interpreter: numbers, launches, tuning, folding."""

import copy
import functools
import json

import pytest
import skimage.data
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from test_layers import first_blocks

import resnet_fused
from resnet_fused import explain, tune
from resnet_fused.backends.cudnn import conv_bn_act as cudnn
from resnet_fused.backends.onednn import conv_bn_act as onednn
from resnet_fused.dispatch import registry, speed, store
from resnet_fused.dispatch.numerics import largest
from resnet_fused.models import get_model
from resnet_fused.ops.conv_bn_act import Call

WHOLE = ["resnet18", "resnet50"]
CUT = ["resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2"]  # the others have these blocks
X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def twins(name, dtype=torch.float32):
    torch.manual_seed(0)
    ours, theirs = get_model(name), torchvision.models.get_model(name)
    theirs.load_state_dict(ours.state_dict())
    if name in CUT:
        first_blocks(ours), first_blocks(theirs)
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


@pytest.fixture
def launches(monkeypatch):
    """Names of the Triton kernels that the interpreter launches."""
    from triton.runtime.interpreter import GridExecutor

    names = []
    call = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return names


@pytest.mark.parametrize("name", WHOLE + CUT)
def test_models_against_torchvision(name):
    ours, theirs = twins(name)
    with torch.no_grad():
        with resnet_fused.backend("triton"):
            y = ours(X)
        expected, exact = theirs(X), theirs.double()(X.double())
    assert largest(y.double() - exact) <= 2 * largest(expected.double() - exact) + 2**-24 * largest(exact)


def test_a_real_photograph_keeps_its_classes(msra):
    model = get_model("resnet50", weights="MSRA").eval()
    preprocess = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms(crop_size=96, resize_size=110)
    x = preprocess(Image.fromarray(skimage.data.chelsea())).unsqueeze(0)
    with torch.no_grad():
        expected = model(x)
        with resnet_fused.backend("triton"):
            y = model(x)
        exact = model.double()(x.double())
    probabilities = expected.softmax(1)
    assert probabilities.argmax() == 285 and probabilities.max() > 0.5  # Egyptian cat
    assert torch.equal(y.topk(5).indices, expected.topk(5).indices)
    assert largest(y.double() - exact) <= 2 * largest(expected.double() - exact) + 2**-24 * largest(exact)


def test_resnet50_takes_57_launches_at_most(launches):
    """One a convolution; pooling twice, the classifier and nothing else (views and allocations launch nothing)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    ours, _ = twins("resnet50", torch.bfloat16)
    others = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "aten" and not func.is_view and func not in FREE:
                others.append(str(func))
            return func(*args, **(kwargs or {}))

    FREE = (torch.ops.aten.as_strided_.default, torch.ops.aten.empty.memory_format)
    x = X.bfloat16()
    with resnet_fused.backend("triton"), torch.no_grad():
        ours(x)  # kernels are checked here
        launches.clear()
        with Count():
            ours(x)
    assert len(launches) == 53
    assert len(launches) + len(others) <= 57, others


def test_bfloat16_and_autocast_run_the_same_kernels(launches):
    ours, theirs = twins("resnet18", torch.bfloat16)
    exact = twins("resnet18", torch.float64)[1]
    with torch.no_grad():
        exact = exact(X.double())
        expected = theirs(X.bfloat16())
        budget = 2 * largest(expected.double() - exact) + torch.finfo(torch.bfloat16).eps * largest(exact)
        with resnet_fused.backend("triton"):
            assert largest(ours(X.bfloat16()).double() - exact) <= budget
            ours = twins("resnet18")[0]
            with torch.autocast("cpu", torch.bfloat16):
                ours(X)
                launches.clear()
                y = ours(X)
    assert y.dtype == torch.bfloat16 and largest(y.double() - exact) <= budget
    assert len(launches) == 20


def test_narrow_groups_say_why_two_passes_serve():
    ours = first_blocks(twins("resnext50_32x4d")[0])
    with resnet_fused.backend("triton"), torch.no_grad():
        rows = {r.layer: r for r in explain(ours, X)}
    narrow, wide = rows["layer1.0.conv2"], rows["layer4.0.conv2"]
    assert narrow.ran == wide.ran == ["conv_bn_act: triton"]
    assert "groups of 4 " in narrow.why[0] and "one pass" in narrow.why[0]
    assert not wide.why


@pytest.fixture
def own_store(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path)
    speed.forget()
    yield tmp_path
    speed.forget()


@pytest.fixture
def small():
    """(ours, theirs, x): seven convolutions of five shapes and the stem."""
    ours, theirs = twins("resnet18")
    return first_blocks(ours), first_blocks(theirs), X[:, :, :32, :32]


def assert_close(ours, theirs, x):
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5 * largest(theirs(x)))


def test_tune_keeps_the_fastest_and_later_calls_take_it(own_store, small, monkeypatch):
    ours, theirs, x = small
    timed = []

    def timer(launch):  # the last candidate of every layer wins
        timed.append(launch)
        return 1000.0 - len(timed)

    with resnet_fused.backend("triton"):
        found = tune(ours, x, timer)
        assert len(timed) == sum(e["candidates"] for e in found.values()) > 2 * len(found) > 12
        (path,) = own_store.glob("tuned-*.json")
        assert json.loads(path.read_text())["entries"] == found
        speed.forget()
        ran = []
        for op in ("conv_bn_act", "stem"):
            triton = registry.implementation("triton", op)
            plan = functools.partial(
                lambda plan, call, c: ran.append((call.problem(), c)) or plan(call, c), triton.plan
            )
            monkeypatch.setattr(triton, "plan", plan)
        assert_close(ours, theirs, x)
    assert all(config == found[key]["config"] for key, config in ran) and {key for key, _ in ran} == set(found)


@pytest.mark.parametrize("content", ["", "[]", '{"environment": {"torch": "0"}, "entries": {}}'])
def test_a_damaged_tuning_file_is_a_warning(own_store, small, content):
    path = store.Store("tuned", torch.device("cpu")).path
    path.write_text(content)
    with resnet_fused.backend("triton"), pytest.warns(UserWarning, match=f"{path.name} is left aside"):
        assert_close(*small)


def test_tuned_entries_are_not_trusted_blindly(own_store, small):
    ours, theirs, x = small
    with resnet_fused.backend("triton"):
        found = tune(ours, x, lambda launch: 1.0)
        (path,) = own_store.glob("tuned-*.json")
        content = json.loads(path.read_text())
        wrong = [3, {"backend": "none", "config": None}, {"backend": ["triton"], "config": None}, {"backend": "triton"}]
        tiles = [[1], "x", {}, {"BLOCK_M": 3}, found[next(iter(found))]["config"] | {"BLOCK_M": 48}]
        wrong += [{"backend": "triton", "config": tile} for tile in tiles]
        content["entries"] = dict(zip(found, wrong, strict=False))
        assert len(found) >= len(wrong)
        path.write_text(json.dumps(content))
        speed.forget()
        assert_close(ours, theirs, x)


def test_tune_says_what_it_needs():
    ours, _ = twins("resnet18")
    with pytest.raises(ValueError, match="x must be on a CUDA device to be timed, got cpu"):
        tune(ours, X)
    with pytest.raises(ValueError, match="nothing is fused on cpu under backend 'auto'"):
        tune(ours, X, lambda launch: 1.0)
    ours.layer1[0].bn1.train()
    with pytest.raises(ValueError, match="model must be in eval mode to be tuned"), resnet_fused.backend("triton"):
        tune(ours, X, lambda launch: 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fold(dtype):
    """What cuDNN's fused convolutions take; they run on a GPU only."""
    from resnet_fused.backends.triton.fold import fold

    torch.manual_seed(0)
    weight = torch.randn(48, 40, 3, 3).to(dtype)
    bias, beta, mean = (torch.randn(48) for _ in range(3))
    gamma, var = torch.rand(48) + 0.5, torch.rand(48) + 0.5
    bias = bias.to(dtype)
    for vectors in [
        (bias, gamma, beta, mean, var),
        (None, None, None, mean, var),
        (bias, *[None] * 4),
        (None, *[None] * 4),
    ]:
        w, b = fold(weight, *vectors, 1e-5)
        bias_, gamma_, beta_, mean_, var_ = (None if v is None else v.double() for v in vectors)
        scale = torch.ones(48).double() if var_ is None else (var_ + 1e-5).rsqrt() * (1 if gamma_ is None else gamma_)
        shift = (0 if bias_ is None else bias_) - (0 if mean_ is None else mean_)
        shift = shift * scale + (0 if beta_ is None else beta_)
        eps = torch.finfo(dtype).eps
        assert w.dtype == b.dtype == dtype and w.is_contiguous(memory_format=torch.channels_last)
        assert largest(w.double() - weight.double() * scale[:, None, None, None]) <= eps * largest(w)
        assert largest(b.double() - shift) <= eps * largest(b) + 1e-6


def test_forced_cudnn_serves_whole_models(monkeypatch, small):
    """cuDNN's two operators are played by PyTorch's CPU convolution, the fold by oneDNN's."""

    def conv_relu(x, w, b, *geometry):
        return F.conv2d(x, w, b, *geometry).relu()

    def conv_add_relu(x, w, z, alpha, b, *geometry):
        return (F.conv2d(x, w, b, *geometry) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)
    monkeypatch.setattr(cudnn, "plan_fold", lambda *args: onednn._fold)
    monkeypatch.setitem(registry._UNAVAILABLE, "cudnn", lambda *device: None)
    ours, theirs, x = small
    ours = copy.deepcopy(ours).to(memory_format=torch.channels_last)  # as on a GPU, and as what is folded
    with resnet_fused.backend("cudnn"):
        assert_close(ours, theirs, x)
        with torch.no_grad():
            rows = [r for r in explain(ours, x) if "BatchNorm2d" in r.modules]
    for row in rows:
        assert row.ran == ["conv_bn_act: cudnn"]
        assert ("cudnn in one kernel: cuDNN fuses a convolution only with a ReLU" in str(row.why)) == (
            "downsample" in row.layer
        )
    monkeypatch.setattr(registry, "_AUTO_DEVICES", ("cpu",))
    with torch.no_grad():
        assert {r.layer: r.ran for r in explain(ours, x)}["layer2.0.downsample.0"] == ["conv_bn_act: triton"]


@pytest.mark.parametrize("residual", [None, torch.randn(1, 8, 5, 5)])
def test_cudnn_without_relu(residual):
    x, weight, bias = torch.randn(1, 4, 5, 5), torch.randn(8, 4, 3, 3), torch.randn(8)
    call = Call(x, weight, bias, *[None] * 4, 1e-5, [1, 1], [1, 1], [1, 1], 1, residual, False)
    y = cudnn.plan(call, None)(call)
    expected = F.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(y, expected if residual is None else expected + residual)
