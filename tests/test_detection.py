"""torchvision's detection and segmentation models on this package's backbones: torchvision's losses, to the bit."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone as torchvisions
from torchvision.ops import FrozenBatchNorm2d

import resnet_fused
from resnet_fused.dispatch import registry
from resnet_fused.models.detection import resnet_fpn_backbone

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import detection

SIZE = 64


pytestmark = pytest.mark.usefixtures("one_thread")


def pair(name="resnet18", weights=None, **kwargs):
    """torchvision's and ours, of the same bits."""
    found = []
    for build in (torchvisions, resnet_fpn_backbone):
        torch.manual_seed(0)
        found.append(build(backbone_name=name, weights=weights, **kwargs))
    return found


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"trainable_layers": 0, "norm_layer": nn.BatchNorm2d},
        {"trainable_layers": 5, "returned_layers": [2, 3]},
    ],
    ids=["default", "frozen", "two"],
)
def test_a_feature_pyramid_is_torchvisions(kwargs):
    theirs, ours = pair(**kwargs)
    assert type(ours) is BackboneWithFPN and ours.out_channels == theirs.out_channels
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    for (name, p), (key, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == key and p.requires_grad == q.requires_grad and torch.equal(p, q), name
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, SIZE, SIZE)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        a, b = theirs(given), ours(given)
        assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    if kwargs.get("norm_layer"):
        assert ours.body.bn1.num_batches_tracked == theirs.body.bn1.num_batches_tracked == 2


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"trainable_layers": 6}, "range .0,5., got 6"),
        ({"returned_layers": [0, 2]}, "range .1,4.. Got .0, 2."),
        ({"backbone_name": "resnet49"}, "unknown model 'resnet49'"),
    ],
)
def test_errors_are_torchvisions(kwargs, message):
    with pytest.raises(ValueError, match=message):
        resnet_fpn_backbone(**{"backbone_name": "resnet18", "weights": None} | kwargs)
    net = resnet_fused.models.cifar_resnet20()
    with pytest.raises(ValueError, match="return_layers must name some of layer1, layer2, layer3, got {'fc': '0'}"):
        resnet_fused.models.detection.IntermediateLayerGetter(net, {"fc": "0"})


def test_weights_with_counters_fit_frozen_bn(tmp_path):
    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    _, ours = pair(weights=None)
    loaded = resnet_fpn_backbone(backbone_name="resnet18", weights=tmp_path / "resnet18.pth")
    assert all(torch.equal(t, state[k]) for k, t in loaded.body.state_dict().items())
    assert loaded.body.state_dict().keys() == ours.body.state_dict().keys()
    with pytest.raises(ValueError, match="unexpected: .*bn1.running_mean"):  # GroupNorm has no statistics to count
        resnet_fused.resnet18(weights=tmp_path / "resnet18.pth", norm_layer=lambda c: nn.GroupNorm(4, c))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of ResNet-50: torchvision's state_dict with the statistics of the example's images."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    return detection.drawn_weights("resnet50", detection.scenes(4, SIZE, 1)[0], path)


@pytest.mark.parametrize("kind", detection.MODELS)
def test_three_steps_have_torchvisions_losses(kind, weights, monkeypatch):
    """The example's models, and the same of torchvision: other imports, nothing else."""

    def three_losses(weights):
        torch.manual_seed(0)
        model = detection.MODELS[kind]("resnet50", SIZE, weights).train()
        if weights is None:
            net = torch.load(path, weights_only=True)
            body = model.backbone.body if kind == "fpn" else model.backbone
            body.load_state_dict({k: v for k, v in net.items() if k.split(".")[0] in dict(body.named_children())})
            if kind == "c4":
                stage = {k.removeprefix("layer4."): v for k, v in net.items() if k.startswith("layer4.")}
                model.roi_heads.box_head.layer4.load_state_dict(stage)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-5, momentum=0.9)
        found = []
        for _ in range(3):
            torch.manual_seed(1)  # which proposals are taken is drawn
            images, targets, pixels = detection.scenes(2, SIZE, 2)
            loss = detection.loss(model, images, targets, pixels)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            found.append(loss.item())
        return found, type(model)

    path = weights
    ours, cls = three_losses(weights)
    monkeypatch.setattr(detection, "models", torchvision.models)
    monkeypatch.setattr(detection, "IntermediateLayerGetter", IntermediateLayerGetter)
    monkeypatch.setattr(detection, "resnet_fpn_backbone", torchvisions)
    theirs, other = three_losses(None)
    assert ours == theirs and ours[2] < ours[0] and cls is other


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_frozen_bn_is_fused_as_given_statistics(mode, monkeypatch):
    """Gradients too, where a device fuses: Triton's interpreter serves."""
    theirs, ours = pair(trainable_layers=5, returned_layers=[1, 2])
    for bn in (m for m in ours.modules() if isinstance(m, FrozenBatchNorm2d)):
        bn.running_mean.normal_(0, 0.1), bn.running_var.uniform_(1, 3)
    theirs.load_state_dict(ours.state_dict())
    theirs, ours = (m.train(mode == "train") for m in (theirs, ours))
    x = torch.randn(1, 3, SIZE, SIZE)
    monkeypatch.setattr(registry, "_AUTO_DEVICES", ("cpu",))
    expected, found = theirs(x), ours(x)
    if mode == "eval":
        rows = [row for row in resnet_fused.explain(ours.body, x) if "FrozenBatchNorm2d" in row.modules]
        assert len(rows) == 10 and all(row.ran == ["conv_bn_act: triton"] for row in rows)
    for key in expected:
        scale = expected[key].abs().max().item()
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5 * scale)
    if mode == "train":
        for outputs in (expected, found):
            sum(y.square().mean() for y in outputs.values()).backward()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            scale = q.grad.abs().max().item()
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-4 * scale, msg=name)


def test_backbones_copies_are_backbones():
    _, ours = pair()
    x = torch.randn(1, 3, SIZE, SIZE)
    assert torch.equal(copy.deepcopy(ours)(x)["pool"], ours(x)["pool"])


@pytest.mark.parametrize("kind", detection.MODELS)
def test_the_example_runs(kind, capsys):
    reached = detection.main(["--model", kind, "--steps", "2", "--batch", "2", "--size", str(SIZE), "--device", "cpu"])
    assert 0 <= reached <= 1
    out = capsys.readouterr().out
    assert "step    0  loss " in out and "step    1  loss " in out and "on 16 new images: " in out
