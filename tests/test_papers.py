"""The papers' other networks: plain, CIFAR, the shortcut options, pre-activation; and what all of them cost."""

import copy
import functools
import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resnet_fused
from resnet_fused import cli, explain
from resnet_fused.dispatch import registry
from resnet_fused.dispatch.numerics import largest
from resnet_fused.layers import PadShortcut
from resnet_fused.models import PreActBasicBlock, PreActBottleneck, PreActResNet, costs, get_model, list_models

NEW = list_models()[10:]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FUSED = {"stem: triton", "conv_bn_act: triton", "batch_norm_act: triton"}
ALONE = {"Conv2d", "MaxPool2d", "AdaptiveAvgPool2d", "Linear", "PadShortcut"}  # none is a BN, an add or a ReLU
DEEPER = {  # the same blocks, more of them
    "cifar_resnet20": ["cifar_resnet32", "cifar_resnet44", "cifar_resnet56", "cifar_resnet110", "cifar_resnet1202"],
    "cifar_plain20": ["cifar_plain32", "cifar_plain44", "cifar_plain56", "cifar_plain110"],
    "plain18": ["plain34"],
    "preact_resnet18": ["preact_resnet34"],
    "preact_resnet50": ["preact_resnet101", "preact_resnet152", "preact_resnet200"],
    "cifar_preact_resnet110": [],
    "cifar_resnet164": ["cifar_resnet1001"],
    "cifar_preact_resnet164": ["cifar_preact_resnet1001"],
}


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return get_model(name, **kwargs)


def blocks(model):
    return [list(stage) for stage in model._stages()]


def cut(name, depth=1, **kwargs):
    """The first blocks of every stage, on the CPU, with weights and statistics drawn."""
    model = on_meta(name, **kwargs)
    for stage in model._stages():
        del stage[depth:]
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
        elif isinstance(m, nn.BatchNorm2d):
            m.reset_parameters()
            for t, mean in ((m.weight, 1), (m.bias, 0), (m.running_mean, 0), (m.running_var, 2)):
                t.data.copy_(mean + torch.randn(t.shape) / 4)
        elif isinstance(m, nn.Linear):
            m.reset_parameters()
    return model


def assert_explained(model, x):
    rows = explain(model, x)
    assert sum("add" in row.modules for row in rows) == sum(
        block.residual for stage in blocks(model) for block in stage
    )
    for row in rows:
        if row.ran == ["PyTorch"]:
            assert row.modules in ALONE, row
        else:
            assert set(row.ran) <= FUSED or "'s pass" in row.ran[0], row


def train_step(model, x=X):
    model.train().zero_grad()
    loss = nn.functional.cross_entropy(model(x), torch.arange(len(x), device=x.device))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach()} | gradients | dict(model.named_buffers())


def assert_same_step(found, expected, rtol=1e-4):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert largest(found[name] - value) <= rtol * largest(value), name


def assert_step_within(found, plain, oracle, dtype=torch.float32):
    """By norm, and by PyTorch's own error: a rounding that flips one ReLU moves single gradients far."""
    assert found.keys() == plain.keys() == oracle.keys()
    for name, exact in oracle.items():
        exact = exact.double()
        allowed = 3 * (plain[name] - exact).norm() + 4 * torch.finfo(dtype).eps * exact.norm() + 1e-6
        assert (found[name] - exact).norm() <= allowed, name


def assert_follows_eager(model, x, backend="triton"):
    """In eval mode and through one train step; everything is fused."""
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    with torch.no_grad():
        expected, oracle = twin.eval()(x), exact.eval()(x.double())
        with resnet_fused.backend(backend):
            y = model.eval()(x)
            assert_explained(model, x)
    assert largest(y.double() - oracle) <= 2 * largest(expected.double() - oracle) + 2**-22 * largest(oracle)
    with resnet_fused.backend(backend):
        found = train_step(model, x)
        assert_explained(model, x)
    assert_step_within(found, train_step(twin, x), train_step(exact, x.double()))


NARROW = dict(widths=(16, 16, 24, 24))
SMALL = NARROW | dict(stem="cifar")


@pytest.mark.parametrize(
    "name, size, depth, kwargs",
    [
        ("cifar_resnet20", 8, 2, {}),
        ("cifar_plain20", 8, 1, {}),
        ("cifar_resnet20", 8, 1, dict(shortcut="C")),
        ("plain18", 16, 1, SMALL),
        ("resnet18", 16, 1, SMALL | dict(num_classes=10)),
        ("resnet50", 16, 1, SMALL | dict(shortcut="A")),
        ("preact_resnet18", 16, 1, SMALL),
        ("preact_resnet50", 48, 1, NARROW),
        ("cifar_preact_resnet110", 8, 2, {}),
        ("cifar_resnet164", 8, 2, {}),
        ("cifar_preact_resnet164", 8, 2, {}),
    ],
)
def test_fused_follows_eager(name, size, depth, kwargs):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert_follows_eager(cut(name, depth, **kwargs), x)


@pytest.fixture(scope="module")
def counted():
    """Rows of the table, and the models that it built."""
    built = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            costs, "get_model", lambda *key, **kwargs: built.setdefault((*key, *kwargs), on_meta(*key, **kwargs))
        )
        rows = costs.table()
    return {(row["model"], *row["arguments"]): row for row in rows}, built


@pytest.fixture(scope="module")
def rows(counted):
    return counted[0]


def test_deeper_networks_have_the_same_blocks(counted):
    assert sorted([*DEEPER, *sum(DEEPER.values(), [])]) == sorted(NEW)
    for name, deeper in DEEPER.items():
        shallow = blocks(counted[1][name,])
        for other in deeper:
            for i, (few, many) in enumerate(zip(shallow, blocks(counted[1][other,]), strict=True)):
                second = str(few[1])
                assert str(few[0]) == str(many[0]) and all(str(block) == second for block in many[1:]), (other, i)
                assert all(block.residual == few[0].residual for block in many)


def test_parameters_are_the_papers(rows):
    millions = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}
    for depth, count in millions.items():
        found = rows[(f"cifar_resnet{depth}",)]["parameters"] / 1e6
        assert round(found, 1 if count > 1 else 2) == count
        if depth < 1202:
            assert rows[(f"cifar_plain{depth}",)]["parameters"] / 1e6 == found
    for depth, count in (("110", 1.7), ("164", 1.7), ("1001", 10.2)):
        for family in ("cifar_resnet", "cifar_preact_resnet"):
            assert rows[(f"{family}{depth}",)]["parameters"] / 1e6 == pytest.approx(count, rel=0.02)
    for name in ("plain18", "plain34"):
        twin = on_meta(name.replace("plain", "resnet"))
        projections = sum(p.numel() for n, p in twin.named_parameters() if "downsample" in n)
        assert rows[(name,)]["parameters"] == sum(p.numel() for p in twin.parameters()) - projections


def test_multiply_adds_are_the_papers(rows):
    v1 = "stride_in_1x1"
    billions = {("resnet18",): 1.8, ("resnet34",): 3.6, ("resnet50", v1): 3.8, ("resnet101", v1): 7.6}
    billions |= {("resnet152", v1): 11.3, ("vgg16",): 15.3, ("vgg19",): 19.6}
    for key, count in billions.items():
        assert rows[key]["multiply_adds"] / 1e9 == pytest.approx(count, rel=0.02), key
    for name in ("resnet50", "cifar_resnet20", "preact_resnet18"):
        row = rows[(name,)]
        model, size = on_meta(name).eval(), row["image_size"]
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            model(torch.empty(1, 3, size, size, device="meta"))
        assert row["multiply_adds"] == flops.get_total_flops() / 2
        assert row["parameters"] == sum(p.numel() for p in model.parameters())


def test_multiply_adds_are_counted_without_bn(monkeypatch):
    monkeypatch.setattr("torch.nn.functional.batch_norm", lambda *args, **kwargs: pytest.fail("it costs seconds"))
    assert costs.count(on_meta("cifar_resnet20"), 32) == (269_722, 40_551_040)


def test_info_models(rows, monkeypatch, capsys):
    monkeypatch.setattr(costs, "table", lambda: list(rows.values()))
    assert cli.main(["info", "--models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == list(rows.values())
    assert cli.main(["info", "--models"]) == 0
    text = capsys.readouterr().out
    assert "resnet50, stride_in_1x1=True" in text and all(name in text for name in list_models())


@pytest.mark.parametrize("name", ["cifar_resnet1202", "cifar_preact_resnet1001"])
def test_a_thousand_layers(name):
    """With the statistics of one batch: with those of a new BN, activations would double a thousand times."""
    torch.manual_seed(0)
    model = get_model(name, norm_layer=functools.partial(nn.BatchNorm2d, momentum=1.0))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert model.train()(x).isfinite().all()
        y = model.eval()(x)
        assert y.shape == (2, 10) and y.isfinite().all()
        if name == "cifar_resnet1202":
            with resnet_fused.backend("onednn"):
                assert largest(model(x) - y) <= 1e-3 * largest(y)


# shortcuts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_pad_shortcut(stride, dtype):
    x = torch.randn(2, 16, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = PadShortcut(40, stride)(x)
    assert torch.equal(y[:, :16], x[:, :, ::stride, ::stride]) and not y[:, 16:].any() and y.shape[1] == 40
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx[:, :, ::stride, ::stride].eq(1).all() and dx.sum() == y[:, :16].numel()
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, dx))


def test_shortcut_options():
    for name in ("resnet34", "cifar_resnet20"):
        kinds = {o: [type(b.downsample) for s in blocks(on_meta(name, shortcut=o)) for b in s] for o in ("A", "B", "C")}
        changes = [i for i, kind in enumerate(kinds["B"]) if kind is nn.Sequential]
        assert len(changes) == (3 if name == "resnet34" else 2)
        assert [i for i, kind in enumerate(kinds["A"]) if kind is PadShortcut] == changes
        assert set(kinds["C"]) == {nn.Sequential}
    assert not [key for key in on_meta("resnet34", shortcut="A").state_dict() if "downsample" in key]
    assert type(on_meta("preact_resnet50").layer2[0].downsample) is nn.Conv2d


def test_plain_networks_have_no_shortcut():
    model = cut("cifar_plain20").eval()
    block, x = model.layer2[0], torch.randn(2, 16, 6, 6)
    with torch.no_grad():
        y = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())).relu()
        assert torch.equal(block(x), y)


def test_he_initialisation():
    torch.manual_seed(0)
    for name in ("cifar_resnet20", "cifar_preact_resnet110", "plain18"):
        convolutions = [m for m in get_model(name).modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 4000]
        for m in convolutions:
            fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1]
            assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


# pre-activation


def preact(block=PreActBasicBlock, **kwargs):
    torch.manual_seed(0)
    return PreActResNet(block, [1, 2], 10, stem="cifar", widths=(16, 32), **kwargs)


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize("block", [PreActBasicBlock, PreActBottleneck])
def test_pre_activation_as_the_paper_writes_it(block, shortcut):
    model, x = preact(block, shortcut=shortcut).eval(), X
    assert not [key for key in model.state_dict() if key.startswith("layer1.0.bn1")]
    with torch.no_grad():
        y = model.bn1(model.conv1(x)).relu()
        for i, unit in enumerate(blocks(model)[0] + blocks(model)[1]):
            a = unit.bn1(y).relu() if i else y
            z = unit.conv2(unit.bn2(unit.conv1(a)).relu())
            z = z if block is PreActBasicBlock else unit.conv3(unit.bn3(z).relu())
            y = z + (y if unit.downsample is None else unit.downsample(a))
        y = model.fc(model.norm(y).relu().mean((2, 3)))
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)


class Kinds:
    """What comes out of a module."""

    def __init__(self, module):
        self.found = []
        module.register_forward_hook(lambda module, args, output: self.found.append(type(output)))


@pytest.mark.parametrize("place", ["layer2", "layer2.0", "layer2.0.conv2", "layer2.1.bn1"])
def test_hooks_see_tensors(place, monkeypatch):
    expected = train_step(preact())
    model = preact()
    kinds = Kinds(model.get_submodule(place))
    monkeypatch.setattr(registry, "_AUTO_DEVICES", ("cpu",))
    found = train_step(model)
    assert kinds.found == [torch.Tensor]
    assert_same_step(found, expected)


def test_pre_activation_traces_and_compiles():
    expected = train_step(preact())
    with resnet_fused.backend("triton"):
        traced = torch.fx.symbolic_trace(preact())
        torch._dynamo.reset()
        compiled = preact()
        compiled.forward = torch.compile(compiled.forward, fullgraph=True, backend="aot_eager")
        assert_same_step(train_step(traced), expected)
        assert_same_step(train_step(compiled), expected)


def kept(model):
    """Bytes that autograd keeps outside the recomputed regions, and the regions' inputs."""
    tensors = {}

    def pack(t):
        tensors[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model.train()(X).sum()
    return sum(tensors.values()), loss


@pytest.mark.parametrize("name, shortcut", [("resnet50", "A"), ("preact_resnet18", "A"), ("preact_resnet50", "C")])
def test_recompute(name, shortcut):
    model = cut(name, 2, shortcut=shortcut, stem="cifar", num_classes=10)
    expected, sizes = None, []
    for mode in (None, "activations", "blocks"):
        twin = copy.deepcopy(model)
        twin.set_recompute(mode)
        sizes.append(kept(copy.deepcopy(twin))[0])
        found = train_step(twin)
        expected = expected or found
        assert_same_step(found, expected, rtol=0)
    assert sizes[1] < 0.4 * sizes[0] and sizes[2] < 0.1 * sizes[0], sizes


def test_recompute_of_pre_activation_is_fused():
    model = preact(recompute="activations")
    with resnet_fused.backend("triton"):
        found = train_step(model)
        assert_explained(model, X)
    assert_same_step(found, train_step(preact()))


# errors


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: get_model("cifar_resnet20", weights="DEFAULT"), "none are published for cifar_resnet20; accepted are"),
        (lambda: get_model("preact_resnet50", weights="ResNet50_Weights.DEFAULT"), "published for preact_resnet50"),
        (lambda: get_model("cifar_plain20", shortcut="A"), "cifar_plain20 takes shortcut=None, got shortcut=A"),
        (lambda: get_model("cifar_resnet20", widths=(8, 16, 32)), "takes widths=\\(16, 32, 64\\), got widths"),
        (lambda: get_model("resnet18", shortcut="D"), 'shortcut must be "A", "B", "C" or None, got \'D\''),
        (lambda: get_model("resnet18", stem="mnist"), 'stem must be "imagenet", "caffe" or "cifar", got \'mnist\''),
        (lambda: get_model("plain18", zero_init_residual=True), "zero_init_residual=True needs shortcuts"),
        (lambda: get_model("preact_resnet18", zero_init_residual=True), "zero_init_residual=True needs a BN"),
        (lambda: get_model("preact_resnet18", shortcut=None), "in a pre-activation network, got None"),
        (
            lambda: resnet_fused.ResNet(resnet_fused.BasicBlock, [1, 1]),
            "layers must have 4 elements, .* got \\[1, 1\\]",
        ),
    ],
)
def test_errors_name_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()
