"""resnet-fused analyze: what is measured on layers and blocks."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from cli_runs import fails_fixture, output_fixture  # noqa: F401
from evaluation_runs import CLASSES, NARROW, SMALL, saved_fixture  # noqa: F401
from PIL import Image
from torch import nn

from resnet_fused import models
from resnet_fused.analysis import ShortcutOnly, gradient_norms, lesions, responses
from resnet_fused.train import load_model

CPU = torch.device("cpu")


def test_responses_are_the_bns_outputs_before_the_add(saved):
    model = load_model(saved("cifar_resnet20"))[0]
    batches = [(torch.randn(n, 3, 16, 16), torch.zeros(n, dtype=torch.long)) for n in (4, 3)]
    expected = {}
    with torch.inference_mode():
        x = torch.cat([x for x, _ in batches])
        expected["bn1"] = model.bn1(model.conv1(x))
        x = expected["bn1"].relu()
        for name, block in model.named_modules():
            if isinstance(block, models.BasicBlock):
                first = expected[f"{name}.bn1"] = block.bn1(block.conv1(x))
                second = expected[f"{name}.bn2"] = block.bn2(block.conv2(first.relu()))
                x = (second + (x if block.downsample is None else block.downsample(x))).relu()
    found = responses(model, batches)
    assert [name for name, _ in found] == list(expected)
    torch.testing.assert_close(
        torch.tensor([std for _, std in found]), torch.stack([y.std(correction=0) for y in expected.values()])
    )
    assert not any(m._forward_hooks for m in model.modules())


def test_layers_of_projections_are_left_out():
    model = models.resnet18(**NARROW).eval()
    batch = torch.randn(2, 3, 64, 64), torch.zeros(2, dtype=torch.long)
    layers = [name for name, _ in responses(model, [batch])]
    assert len(layers) == 17 and not any("downsample" in name for name in layers)
    layers = [name for name, _ in gradient_norms(model, *batch)]
    assert len(layers) == 18 and not any("downsample" in name for name in layers)


def test_gradient_norms_are_those_of_a_training_step_and_leave_the_model_alone(saved):
    model = load_model(saved("cifar_resnet20"))[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    found = dict(gradient_norms(model, x, labels))
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    F.cross_entropy(model.train()(x), labels).backward()
    for name in ("conv1", "layer2.0.conv2", "fc"):
        assert found[name] == pytest.approx(model.get_submodule(name).weight.grad.square().sum().sqrt().item())


BLOCKS = [
    ("cifar_resnet20", {}),
    ("resnet18", NARROW),
    ("preact_resnet18", NARROW | {"shortcut": "A"}),
    ("preact_resnet18", NARROW | {"shortcut": "C"}),
]


@pytest.mark.parametrize("name, kwargs", BLOCKS)
def test_a_block_without_its_branch_is_one_whose_branch_gives_zeros(name, kwargs):
    torch.manual_seed(0)
    model = models.get_model(name, **kwargs)
    blocks = [m for m in model.modules() if isinstance(m, (models.BasicBlock, models.PreActBasicBlock))]
    assert len(blocks) in (8, 9)
    with torch.no_grad():
        for m in model.modules():  # any statistics and affine, but for the branches' ends
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(), m.weight.normal_(), m.bias.normal_()
        for block in blocks:
            x = torch.randn(2, block.conv1.in_channels, 8, 8).relu()
            lesion, whole = ShortcutOnly(block.eval())(x), block(x)
            end = block.conv2 if isinstance(block, models.PreActBasicBlock) else block.bn2
            for p in end.parameters():
                p.zero_()
            assert torch.equal(lesion, block(x)) and not torch.equal(lesion, whole)


def test_lesions_are_the_errors_without_each_block_and_leave_the_model_alone(saved):
    path = saved("cifar_resnet20")
    model, images = load_model(path)[0], torch.randn(40, 3, 16, 16)
    labels = model(images).argmax(1)
    labels[:10] = (labels[:10] + 1) % 10

    def error(m):
        with torch.inference_mode():
            return 100 * (m(images).argmax(1) != labels).double().mean().item()

    blocks = [name for name, m in model.named_modules() if isinstance(m, models.BasicBlock)]
    modules = list(model.modules())
    whole, found = lesions(model, lambda: [(images, labels)])
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert whole == error(model) == 25 and [name for name, _ in found] == blocks
    for name, value in found:
        wounded = load_model(path)[0]
        nn.init.zeros_(wounded.get_submodule(name).bn2.weight)
        assert value == pytest.approx(error(wounded))
    assert max(value for _, value in found) > 25


def test_analyze(saved, output, tmp_path):
    path, other = saved("cifar_resnet20"), saved("cifar_resnet20", 1)
    argv = ("analyze", "--responses", "--lesions", "--gradients", *SMALL, "--images", 5, "--batch", 16)
    result = json.loads(output(*argv, path, other, "--out", tmp_path / "a" / "b", "--json"))
    assert list(result) == ["data", "device", "backend", "responses", "gradients", "lesions"]
    assert result["data"] == SMALL[1]
    for measure, key, row in (
        ("responses", "layers", {"layer", "std"}),
        ("gradients", "layers", {"layer", "norm"}),
        ("lesions", "blocks", {"block", "error", "change"}),
    ):
        assert [n["network"] for n in result[measure]["networks"]] == [str(path), str(other)]
        assert all(set(r) == row for n in result[measure]["networks"] for r in n[key])
        with Image.open(tmp_path / "a" / "b" / f"{measure}.png") as plot:
            assert result[measure]["plot"] == plot.filename and min(plot.size) > 300
    text = output(*argv, path, "--out", tmp_path)
    for name, std in ((r["layer"], r["std"]) for r in result["responses"]["networks"][0]["layers"]):
        assert re.search(rf"\n  {re.escape(name)} +{std:.4f} ", text)
    lesion = result["lesions"]["networks"][0]
    first = lesion["blocks"][0]
    assert re.search(rf"\n  layer1.0 +{first['error']:.2f} +{re.escape(format(first['change'], '+.2f'))}\n", text)


def test_gradients_of_twins_that_are_drawn(output, tmp_path):
    argv = ("analyze", "--gradients", "--model", "cifar_plain20", "--batch", 16, "--out", tmp_path, *SMALL)
    networks = json.loads(output(*argv, "--json"))["gradients"]["networks"]
    assert [n["network"] for n in networks] == ["cifar_resnet20", "cifar_plain20"]
    plain, residual = ([r["layer"] for r in n["layers"]] for n in networks)
    assert plain == residual and len(plain) == 20
    assert [n["layers"] for n in networks] == [
        n["layers"] for n in json.loads(output(*argv, "--json"))["gradients"]["networks"]
    ]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["{cifar}"], "choose a measure: --responses, --gradients, --lesions"),
        (["--lesions"], "name a run of resnet-fused train"),
        (["--lesions", "--model", "cifar_resnet20"], "--responses and --lesions are of trained networks"),
        (["--gradients", "--model", "resnet18"], "needs data"),
        (["--gradients", "--model", "cifar_resnet20", "{cifar}"], "--model goes without a checkpoint"),
        (["--lesions", "{plain}"], "lesions need shortcuts"),
        (["--lesions", "{cifar}", "--out", "{cifar}"], "checkpoint.pt"),
    ],
)
def test_bad_arguments_of_analyze(saved, fails, tmp_path, argv, message):
    paths = {"cifar": saved("cifar_resnet20"), "plain": saved("cifar_plain20")}
    assert message in fails("analyze", "--out", tmp_path / "plots", *(arg.format(**paths) for arg in argv))
