"""The models as backbones, and in other libraries' hands."""

import copy
import importlib

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.ops import FrozenBatchNorm2d

import resnet_fused

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)


def pair(name="resnet18", **kwargs):
    """torchvision's and ours, of the same bits."""
    models = []
    for library in (torchvision.models, resnet_fused.models):
        torch.manual_seed(0)
        models.append(library.get_model(name, **kwargs).to(memory_format=torch.channels_last))
    return models


def same(outputs):
    theirs, ours = outputs
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in theirs)


@pytest.mark.parametrize("norm", [None, FrozenBatchNorm2d])
def test_features_are_torchvisions(norm):
    layers = {"layer2": "a", "layer4": "b"}
    same([IntermediateLayerGetter(m, layers)(X) for m in pair(norm_layer=norm)])
    same([create_feature_extractor(m, {"layer3.1": "a", "layer4": "b"})(X) for m in pair(norm_layer=norm)])
    channels = [64, 128, 256, 512]
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    outputs = []
    for m in pair(norm_layer=norm):
        torch.manual_seed(1)
        outputs.append(BackboneWithFPN(m, layers, channels, 16).to(memory_format=torch.channels_last)(X))
    same(outputs)


def losses(models, step, lr=0.01):
    """Of three train steps each."""
    found = []
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
        found.append([])
        for i in range(3):
            torch.manual_seed(i)
            loss = step(model.train())
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            found[-1].append(loss.item())
    return found


@pytest.mark.parametrize("norm", [None, FrozenBatchNorm2d])
def test_a_deeplab_trains_as_on_torchvisions_backbone(norm):
    models = []
    for backbone in pair("resnet50", norm_layer=norm, replace_stride_with_dilation=[False, True, True]):
        torch.manual_seed(1)
        head = DeepLabHead(2048, 3).to(memory_format=torch.channels_last)
        models.append(DeepLabV3(IntermediateLayerGetter(backbone, {"layer4": "out"}), head))
    target = torch.zeros(2, 64, 64, dtype=torch.long)
    theirs, ours = losses(models, lambda m: F.cross_entropy(m(X)["out"], target))
    assert theirs == ours and theirs[2] < theirs[0]


@pytest.mark.parametrize("norm", [None, FrozenBatchNorm2d])
def test_a_faster_rcnn_trains_as_on_torchvisions_backbone(norm):
    models = []
    for backbone in pair("resnet50", norm_layer=norm):
        torch.manual_seed(1)
        layers = {f"layer{i + 1}": str(i) for i in range(4)}
        fpn = BackboneWithFPN(backbone, layers, [256, 512, 1024, 2048], 256)
        models.append(FasterRCNN(fpn, 3, min_size=64, max_size=64).to(memory_format=torch.channels_last))
    target = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 44.0]]), "labels": torch.tensor([1])}] * 2
    theirs, ours = losses(models, lambda m: sum(m([*X], [dict(t) for t in target]).values()), 1e-6)
    assert theirs == ours and theirs[2] < theirs[0]


class TestTimmsMethods:
    @pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20", "preact_resnet18"])
    def test_features_and_head_are_the_model(self, name):
        model = resnet_fused.get_model(name).eval()
        features = model.forward_features(X)
        assert features.shape[:2] == (2, model.num_features)
        assert torch.equal(model.forward_head(features), model(X))
        assert torch.equal(model.get_classifier()(model.forward_head(features, pre_logits=True)), model(X))

    def test_they_are_timms(self):
        theirs = timm.create_model("resnet18").eval()
        ours = resnet_fused.resnet18().eval()
        ours.load_state_dict(theirs.state_dict())
        theirs = theirs.to(memory_format=torch.channels_last)
        assert torch.equal(ours.forward_features(X), theirs.forward_features(X))
        for m in (ours, theirs):
            m.reset_classifier(0)
        assert ours.num_features == theirs.num_features and torch.equal(ours(X), theirs(X))

    def test_another_classifier(self):
        model = resnet_fused.resnet18().to(torch.float64)
        model.reset_classifier(7)
        assert model(X.double()).shape == (2, 7)
        with pytest.raises(ValueError, match='global_pool must be "avg" or None'):
            model.reset_classifier(7, "max")
        with pytest.raises(ValueError, match="num_classes must be 0 or more"):
            model.reset_classifier(-1)

    @pytest.mark.parametrize("out_indices", [None, (0, 2), (1, 3, 4)])
    def test_features_only_is_timms(self, out_indices):
        options = {} if out_indices is None else {"out_indices": out_indices}
        theirs = timm.create_model("resnet50", features_only=True, **options).eval()
        ours = resnet_fused.resnet50(features_only=True, **options).eval()
        ours.load_state_dict(theirs.state_dict())
        for e, f in zip(theirs.to(memory_format=torch.channels_last)(X), ours(X), strict=True):
            assert torch.equal(e, f)
        assert ours.feature_info.channels() == theirs.feature_info.channels()
        assert ours.feature_info.reduction() == theirs.feature_info.reduction()
        assert [i.replace("relu", "act1") for i in ours.feature_info.module_name()] == theirs.feature_info.module_name()

    def test_features_only_trains(self):
        net = resnet_fused.resnet18(features_only=True, out_indices=[4])
        net.train()(X)[0].sum().backward()
        assert net.bn1.num_batches_tracked == 1 and all(p.grad is not None for p in net.parameters())

    def test_wrong_indices(self):
        with pytest.raises(ValueError, match="out_indices must be out of 0 to 4, got .7."):
            resnet_fused.resnet18(features_only=True, out_indices=[7])
        with pytest.raises(ValueError, match="needs features_only=True"):
            resnet_fused.resnet18(out_indices=[1])


def test_a_fused_backbone_of_timm_in_a_model_of_ones_own():
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.backbone = timm.create_model("resnet18", features_only=True)
            self.head = nn.Conv2d(512, 2, 1)

        def forward(self, x):
            return F.interpolate(self.head(self.backbone(x)[-1]), x.shape[2:])

    model = Segmenter().to(memory_format=torch.channels_last)
    fused, report = resnet_fused.fuse(copy.deepcopy(model), report=True)
    assert len(report.fused) == 19  # timm's list of features asks what the stem's modules return
    theirs, ours = losses([model, fused], lambda m: m(X).square().mean())
    assert theirs == ours


def test_timm_creates_this_packages_models():
    importlib.import_module("resnet_fused.timm_models")
    assert {f"fused_{name}" for name in resnet_fused.models.list_models()} <= set(timm.list_models("fused_*"))
    model = timm.create_model("fused_resnet18", num_classes=7).eval()
    assert type(model) is type(resnet_fused.resnet18()) and model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    features = timm.create_model("fused_resnet18", features_only=True, out_indices=(1, 4))
    assert [f.shape[1] for f in features(torch.zeros(1, 3, 64, 64))] == [64, 512]
    assert not timm.is_model_pretrained("fused_resnet18")
    with pytest.raises(ValueError, match="takes no pretrained_cfg"):
        timm.create_model("fused_resnet18", pretrained_cfg={"url": ""})
