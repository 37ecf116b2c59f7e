"""The stem in the layer and the models, and images of bytes: in Triton's interpreter on the CPU, compiled on a GPU."""

import copy

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused import BackendUnavailable, BasicBlock, PreActBasicBlock, PreActResNet, ResNet, explain, graphed
from resnet_fused.dispatch import plans, registry, speed, trust
from resnet_fused.doctor import replay
from resnet_fused.models.features import FeatureNet
from resnet_fused.ops.stem import Call, normalized

pytest.importorskip("resnet_fused.backends.triton.stem", reason="needs Triton", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def small(cls=ResNet, block=BasicBlock, stages=1, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = cls(block, [1] * stages, 10, widths=(16, 32)[:stages], **kwargs)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.5, 0.5)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model.to(DEVICE).eval()


BYTES = torch.randint(256, (2, 3, 13, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def floats(x=BYTES, dtype=torch.float32):
    return normalized(x, *(torch.tensor(v, device=x.device) for v in (MEAN, STD)), dtype)


def first_row(model, x=BYTES):
    with resnet_fused.backend("triton"), torch.no_grad():
        return explain(model, x)[0]


def hooked(model):
    model.maxpool.register_forward_hook(lambda *args: None)


def with_a_pooling_of_another_kind(model):
    model.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)


def with_average_pooling(model):
    model.maxpool = nn.AvgPool2d(3, 2, 1)


def with_another_convolution(model):
    model.conv1 = nn.Conv2d(3, 16, 5, 2, 2, bias=False).to(DEVICE)


def with_a_bias(model):
    model.conv1.bias = nn.Parameter(torch.ones(16, device=DEVICE))


def with_the_batchs_statistics(model):
    model.bn1.train()


CHANGES = [
    hooked,
    with_a_pooling_of_another_kind,
    with_average_pooling,
    with_another_convolution,
    with_a_bias,
    with_the_batchs_statistics,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_the_operator_can_not_stand_for_goes_the_plain_way(change):
    model = small()
    model.set_input_normalization(MEAN, STD)
    assert first_row(model).ran == ["stem: triton"]
    change(model)
    row = first_row(model)
    assert not any(ran.startswith("stem") for ran in row.ran) and "MaxPool2d" not in row.modules
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = twin(floats())
        with resnet_fused.backend("triton"):
            torch.testing.assert_close(model(BYTES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{"stem": "cifar"}, {"stem": "caffe"}, {}, {"in_chans": 1}], ids=str)
@pytest.mark.parametrize("cls, block", [(ResNet, BasicBlock), (PreActResNet, PreActBasicBlock)])
def test_every_model_takes_bytes(cls, block, kwargs):
    model, grey = small(cls, block, **kwargs), "in_chans" in kwargs
    x, normalization = (BYTES[:, :1], (MEAN[0], STD[0])) if grey else (BYTES, (MEAN, STD))
    model.set_input_normalization(*normalization)
    values = [torch.tensor(v, device=DEVICE).reshape(-1) for v in normalization]
    with torch.no_grad():
        expected = model(normalized(x, *values, torch.float32))
        assert torch.equal(model(x), expected) or DEVICE == "cuda"
        with resnet_fused.backend("triton"):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    ran = first_row(model, x).ran
    assert ran == (["stem: triton"] if kwargs.get("stem") is None else ["conv_bn_act: triton"])
    model.train()(x).sum().backward()
    assert model.conv1.weight.grad.abs().sum() > 0


def test_training_on_bytes_is_training_on_floats():
    ours, theirs = small().train(), small().train()
    ours.set_input_normalization(MEAN, STD)
    for recompute in (None, "activations", "blocks"):
        ours.set_recompute(recompute)
        for model, x in ((ours, BYTES), (theirs, floats())):
            model.zero_grad()
            model(x).sum().backward()
        torch.testing.assert_close(ours.conv1.weight.grad, theirs.conv1.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("out_indices", [(1,), (0, 2)])
def test_features_of_bytes(out_indices):
    net = small(stages=2)
    net.set_input_normalization(MEAN, STD)
    model = FeatureNet(net, out_indices).eval()
    with torch.no_grad():
        expected = model(floats())
        with resnet_fused.backend("triton"):
            for a, b in zip(model(BYTES), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            assert explain(model, BYTES)[0].ran == ["conv_bn_act: triton" if 0 in out_indices else "stem: triton"]


def test_bytes_without_a_normalization_name_the_call():
    for backend in ("auto", "triton"):
        for model in (small(), small().train(), small(stem="cifar")):
            with resnet_fused.backend(backend), pytest.raises(ValueError, match=r"model.set_input_normalization\(mean"):
                model(BYTES)


@pytest.mark.parametrize(
    "mean, std, message",
    [
        ((0.5, 0.5), 1, r"mean must be a finite number, or 3 of them, one a channel; got \(0.5, 0.5\)"),
        ("a", 1, "mean must be a finite number"),
        (0, (1, 1, float("nan")), "std must be a finite number"),
        (0, torch.ones(1, 3), "std must be a finite number"),
        (None, 1, "mean must be a finite number"),
        (0, (1, 0, 1), r"std must be positive, got \(1, 0, 1\)"),
        (0, -1.0, "std must be positive, got -1.0"),
        (0, 1e-60, "std must be positive, got 1e-60"),  # 0 in float32
        ((123.675, 116.28, 103.53), 1, "mean must be of pixels between 0 and 1"),
    ],
)
def test_normalizations_that_are_none(mean, std, message):
    model = small()
    with pytest.raises(ValueError, match=message):
        model.set_input_normalization(mean, std)
    assert model.input_mean is None and model.input_normalization is None


def test_the_normalization_follows_the_model_and_is_no_part_of_its_state():
    model, keys = small(), small().state_dict().keys()
    model.set_input_normalization(torch.tensor(MEAN), 0.25)
    assert model.state_dict().keys() == keys and dict(model.named_parameters()).keys() <= keys
    for moved in (copy.deepcopy(model), copy.deepcopy(model).half(), copy.deepcopy(model).double().float()):
        assert moved.input_mean.dtype == moved.input_std.dtype == torch.float32
        assert moved.input_mean.tolist() == torch.tensor(MEAN).tolist() and moved.input_std.tolist() == [0.25] * 3
        moved.load_state_dict(model.state_dict())
    assert model.to("meta").input_mean.is_meta


def test_exported_models_take_bytes_in_plain_pytorch():
    model = small()
    model.set_input_normalization(MEAN, STD)
    program = torch.export.export(model, (BYTES,))
    assert not any("resnet_fused" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(BYTES), model(floats()), rtol=1e-4, atol=1e-5)


def test_a_traced_graph_is_torchvisions():
    names = [n.name for n in torch.fx.symbolic_trace(small()).graph.nodes]
    assert names[:5] == ["x", "conv1", "bn1", "relu", "maxpool"]


@pytest.fixture
def on_the_cpu(monkeypatch):
    """`auto` takes CPU tensors as a GPU's."""
    if DEVICE == "cuda":
        pytest.skip("on the CPU")
    monkeypatch.setattr(registry, "_AUTO_DEVICES", ("cpu",))
    plans.forget()
    yield monkeypatch
    plans.forget()


def test_where_the_kernel_is_wrong_the_convolution_is_fused(on_the_cpu):
    model, right = small(), trust.refused
    on_the_cpu.setattr(trust, "refused", lambda key, *args: "wrong" if key.startswith("stem/") else right(key, *args))
    with torch.no_grad():
        row, *rest = explain(model, floats())
    assert row.ran == ["conv_bn_act: triton"] and "stem on triton: wrong" in row.why
    assert row.modules == "Conv2d + BatchNorm2d + ReLU"
    assert [(r.ran, r.why) for r in rest if r.layer == "maxpool"] == [(["PyTorch"], ["the stem's row says why"])]


def test_a_stem_that_is_called_twice_has_its_pooling_in_its_row():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, x):
            return self.net(x) + self.net(x.flip(-1))

    with resnet_fused.backend("triton"), torch.no_grad():
        rows = explain(Twice().eval(), floats())
    assert rows[0].modules == "Conv2d + BatchNorm2d + ReLU + MaxPool2d"
    assert not any(row.layer.endswith("maxpool") for row in rows)


@pytest.mark.parametrize("us, ran", [(5.0, "stem: triton (2.00x conv_bn_act + pooling)"), (20.0, "conv_bn_act: ")])
def test_where_the_kernel_is_slower_the_convolution_serves(us, ran, on_the_cpu):
    """What is timed beside it is heard by nobody."""
    heard = []

    def measure(launches, device):
        for launch in launches.values():
            launch()
        return {name: us if name == "triton" else 10.0 for name in launches}

    on_the_cpu.setattr(speed, "calibrates", lambda device: True)
    on_the_cpu.setattr(speed, "measure", measure)
    on_the_cpu.setattr(speed, "keep_times", lambda *args: heard.append(args[1]))
    with torch.no_grad():
        row = explain(small(), floats())[0]
    assert row.ran[0].startswith(ran) and len(row.ran) == 1
    assert any(key.startswith("stem float32 M32x3x16x3x7x7") for key in heard)


# --- on a device


@pytest.mark.gpu
@pytest.mark.parametrize("of_bytes", [False, True], ids=["float", "bytes"])
def test_a_model_on_a_gpu(of_bytes):
    model = small().half()
    model.set_input_normalization(MEAN, STD)
    x = BYTES if of_bytes else floats(dtype=torch.float16)
    with torch.no_grad():
        with resnet_fused.backend("eager"):
            expected = model(x)
        found = explain(model, x)
        assert found[0].ran == ["stem: triton"], found
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_forced_backend_runs_it_or_gets_the_convolution(dtype):
    model = small().to(dtype)
    for name in ("cuda", "cudnn"):
        try:
            with resnet_fused.backend(name), torch.no_grad():
                row = explain(model, floats(dtype=dtype))[0]
        except BackendUnavailable:
            continue
        serves = name == "cuda" and dtype == torch.float16
        assert row.ran == ["stem: cuda" if serves else f"conv_bn_act: {name}"]
        assert row.modules == "Conv2d + BatchNorm2d + ReLU" + " + MaxPool2d" * serves


@pytest.mark.gpu
def test_bytes_in_a_cuda_graph():
    model = small().half()
    model.set_input_normalization(MEAN, STD)
    with torch.no_grad():
        expected = model(BYTES)
        graph = graphed(model, torch.zeros_like(BYTES))
        assert torch.equal(graph(BYTES), expected)


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (1, 32, 32, 3), (3, 32, 32)])
def test_bytes_of_other_channels_are_refused(stem, shape):
    model = resnet_fused.resnet18(stem=stem, num_classes=3).eval()
    model.set_input_normalization(0.5, 0.25)
    with pytest.raises(ValueError, match=r"x must be \[N, 3, H, W\]"):
        model(torch.zeros(shape, dtype=torch.uint8))


def test_the_normalization_outlives_meta():
    model = resnet_fused.resnet18(num_classes=3)
    with torch.device("meta"):
        model.set_input_normalization((0.1, 0.2, 0.3), 0.25)
    model.to("meta").to_empty(device="cpu").half()
    assert model.input_mean.tolist() == torch.tensor([0.1, 0.2, 0.3]).tolist()
    assert model.input_std.tolist() == [0.25] * 3 and model.input_std.dtype == torch.float32


def test_its_refused_kernels_can_be_replayed():
    assert replay._RECORDS["stem"] is Call
