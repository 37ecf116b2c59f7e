import json
import sys
import urllib.error
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision

import resnet_fused
from resnet_fused import fetch as fetching
from resnet_fused.fetch import FetchError
from resnet_fused.models import BasicBlock, Bottleneck, ResNet, get_model, list_models, load_weights, resnet18, resnet50
from resnet_fused.models.weights import TORCHVISION_ENUMS, convert_keras, load_state_dict, resolve


def small(seed=0, **kwargs):
    torch.manual_seed(seed)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3, **kwargs)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# what does not fit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("layer1.0.conv1.weight"), "missing: layer1.0.conv1.weight$"),
        (lambda s: [s.pop(k) for k in list(s) if "layer4" in k], "missing: layer4.0.conv1.weight, .* and 12 more$"),
        (lambda s: s.update(extra=torch.ones(1)), "unexpected: extra$"),
        (lambda s: s.update({"fc.bias": torch.ones(5)}), r"shape: fc.bias is \[5\], the model's is \[3\]$"),
        (lambda s: s.update({"fc.bias": "text"}), r"shape: fc.bias is str, the model's is \[3\]$"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(edit, message):
    model = small(1)
    before, state = deepcopy(model.state_dict()), small(0).state_dict()
    edit(state)
    with pytest.raises(ValueError, match=f"weights some.pth don't fit ResNet: {message}"):
        load_state_dict(model, state, "some.pth")
    assert same(before, model.state_dict())


def test_old_checkpoints_lack_num_batches_tracked():
    source, target = small(0), small(1)
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    load_state_dict(target, state, "old.pth")
    assert same(source.state_dict(), target.state_dict())


def test_none_loads_nothing():
    model = small()
    before = deepcopy(model.state_dict())
    load_weights(model, None)
    assert same(before, model.state_dict())


# torchvision's enums


def test_every_model_has_torchvisions_enum():
    assert list(TORCHVISION_ENUMS) == list_models()[:10]
    for name, class_name in TORCHVISION_ENUMS.items():
        expected = torchvision.models.get_model_weights(name)
        assert getattr(resnet_fused.models, class_name) is expected
        assert getattr(resnet_fused, class_name) is expected
        assert resolve(name, "DEFAULT").name == f"{class_name}.{expected.DEFAULT.name}"


@pytest.mark.parametrize("given", ["IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.IMAGENET1K_V1", "member"])
def test_cached_torchvision_weights(tmp_path, monkeypatch, given):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    enum = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    file = tmp_path / "hub" / "checkpoints" / enum.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.manual_seed(3)
    source = torchvision.models.resnet18()
    torch.save(source.state_dict(), file)
    model = resnet18(weights=enum if given == "member" else given, progress=False)
    assert same(source.state_dict(), model.state_dict())


def test_a_damaged_file_of_torchvisions_says_how_to_mend_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half of it")
    with pytest.raises(ValueError, match=f"the cached {file} is damaged .*; delete it, it is then fetched anew"):
        resnet18(weights="DEFAULT")


def test_download_that_fails(tmp_path, monkeypatch):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    with pytest.raises(FetchError, match="cannot download https://.*resnet18.*Name or service not known.*local"):
        resnet18(weights="DEFAULT")


def test_enum_of_another_model():
    models = torchvision.models
    for weights in ("ResNet34_Weights.DEFAULT", models.ResNet34_Weights.DEFAULT):
        with pytest.raises(ValueError, match="are of ResNet34_Weights; resnet18 takes ResNet18_Weights"):
            resnet18(weights=weights)
    quantized = models.quantization.ResNet18_QuantizedWeights.DEFAULT
    with pytest.raises(ValueError, match="are of ResNet18_QuantizedWeights; resnet18 takes ResNet18_Weights"):
        resnet18(weights=quantized)
    with pytest.raises(ValueError, match="accepted are"):
        load_weights(small(), quantized)


def test_unknown_member_lists_those_there_are():
    with pytest.raises(ValueError, match="'IMAGENET1K_V9': ResNet50_Weights has IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"):
        resnet50(weights="IMAGENET1K_V9")


@pytest.mark.parametrize("weights", ["some.npz", "VGG16_Weights.DEFAULT", 3, Path("folder")])
def test_anything_else_names_what_is_accepted(weights):
    with pytest.raises(ValueError, match="ResNet50_Weights"):
        resnet50(weights=weights)


def test_a_bare_name_needs_a_model():
    with pytest.raises(
        ValueError, match="full name such as 'ResNet50_Weights.DEFAULT', 'MSRA', a run's folder, or the path"
    ):
        load_weights(small(), "DEFAULT")


def test_without_torchvision_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="ResNet50_Weights is torchvision's, .*pip install torchvision"):
        resnet50(weights="DEFAULT")


def test_topology_and_weights_go_together():
    v1 = get_model("resnet50", stride_in_1x1=True)
    with pytest.raises(ValueError, match="stem='caffe', this one has 'imagenet'"):
        load_weights(v1, "MSRA")
    with pytest.raises(ValueError, match="stride_in_1x1=True, this one has False"):
        load_weights(get_model("resnet50", stem="caffe"), "MSRA")
    with pytest.raises(ValueError, match="stem='imagenet', this one has 'caffe'"):
        load_weights(get_model("resnet50", stem="caffe"), "ResNet50_Weights.DEFAULT")
    with pytest.raises(ValueError, match="stride_in_1x1=False, this one has True"):
        load_weights(v1, "ResNet50_Weights.DEFAULT")
    with pytest.raises(ValueError, match="stride_in_1x1=False, got stride_in_1x1=True"):
        resnet50(weights="DEFAULT", stride_in_1x1=True)


# MSRA


@pytest.mark.parametrize("name", ["resnet18", "resnet101"])
def test_msra_is_of_resnet50(name):
    with pytest.raises(ValueError, match=f"'MSRA' are those of resnet50, not of {name}"):
        get_model(name, weights="MSRA")


CAFFE_MEAN = torch.tensor([103.939, 116.779, 123.68], dtype=torch.float64)  # blue, green, red
MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)


def keras_weights(width=8):
    """A thin ResNet of one block a stage, as Keras lists it: layers, tensors."""
    layers, tensors = [], {}

    def conv_bn(conv, bn, size, inputs, outputs):
        layers.extend([{"name": conv, "class_name": "Conv2D"}, {"name": bn, "class_name": "BatchNormalization"}])
        tensors[f"{conv}/kernel"] = torch.randn(size, size, inputs, outputs) / (size * inputs**0.5)
        tensors[f"{conv}/bias"] = torch.randn(outputs)
        tensors[f"{bn}/gamma"], tensors[f"{bn}/beta"] = torch.rand(outputs) + 0.5, torch.randn(outputs)
        tensors[f"{bn}/moving_mean"], tensors[f"{bn}/moving_variance"] = torch.randn(outputs), torch.rand(outputs) + 0.1

    conv_bn("conv1", "bn_conv1", 7, 3, 64)
    inputs = 64
    for stage in (2, 3, 4, 5):
        planes, outputs = width << (stage - 2), 256 << (stage - 2)
        for branch, size, a, b in (
            ("2a", 1, inputs, planes), ("2b", 3, planes, planes), ("2c", 1, planes, outputs), ("1", 1, inputs, outputs)
        ):  # fmt: skip
            conv_bn(f"res{stage}a_branch{branch}", f"bn{stage}a_branch{branch}", size, a, b)
        inputs = outputs
    layers.append({"name": "fc1000", "class_name": "Dense"})
    tensors["fc1000/kernel"], tensors["fc1000/bias"] = torch.randn(inputs, 10), torch.randn(10)
    return layers, tensors


def keras_forward(tensors, rgb, rim):
    """The Caffe model on RGB in 0..255, [N, 3, H, W], float64; `rim` [3] (BGR) is what surrounds the image."""
    t = {k: v.double() for k, v in tensors.items()}

    def conv_bn(x, conv, bn, stride, padding=0):
        x = F.conv2d(x, t[f"{conv}/kernel"].permute(3, 2, 0, 1), t[f"{conv}/bias"], stride, padding)
        bn = [t[f"{bn}/{k}"] for k in ("moving_mean", "moving_variance", "gamma", "beta")]
        return F.batch_norm(x, *bn, eps=1e-5)

    x = rgb.flip(1) - CAFFE_MEAN.view(3, 1, 1)
    padded = rim.view(1, 3, 1, 1).expand(len(x), 3, x.shape[2] + 6, x.shape[3] + 6).clone()
    padded[:, :, 3:-3, 3:-3] = x
    x = F.max_pool2d(F.relu(conv_bn(padded, "conv1", "bn_conv1", 2)), 3, 2, ceil_mode=True)
    for stage in (2, 3, 4, 5):
        stride = 1 if stage == 2 else 2
        names = {b: (f"res{stage}a_branch{b}", f"bn{stage}a_branch{b}") for b in ("1", "2a", "2b", "2c")}
        y = F.relu(conv_bn(x, *names["2a"], stride))
        y = F.relu(conv_bn(y, *names["2b"], 1, 1))
        x = F.relu(conv_bn(y, *names["2c"], 1) + conv_bn(x, *names["1"], stride))
    return x.mean((2, 3)) @ t["fc1000/kernel"] + t["fc1000/bias"]


def test_msra_conversion_against_the_original_model():
    torch.manual_seed(0)
    layers, tensors = keras_weights()
    papers = resolve("resnet50", "MSRA").model_kwargs
    model = ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=8, **papers | {"num_classes": 10})
    load_state_dict(model, convert_keras(layers, tensors), "converted")
    model = model.double().eval()
    rgb = torch.randint(0, 256, (2, 3, 64, 64)).double()
    with torch.no_grad():
        logits = model((rgb / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))
    # exact where the rim is torchvision's mean, which is what its zero padding stands for
    exact = keras_forward(tensors, rgb, 255 * MEAN.flip(0) - CAFFE_MEAN)
    torch.testing.assert_close(logits, exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    original = keras_forward(tensors, rgb, torch.zeros(3).double())
    torch.testing.assert_close(logits, original, rtol=0, atol=0.01 * original.abs().max().item())


def test_damaged_cache_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_HOME", str(tmp_path))
    folder = fetching._folder("resnet50-msra")
    folder.mkdir()
    group = {"paths": ["shard"], "weights": [{"name": "conv1/bias", "shape": [64], "dtype": "float32"}]}
    (folder / "model.json").write_text(json.dumps({"weightsManifest": [group]}))
    (folder / "shard").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=f"the cached {folder} is damaged .*delete it"):
        resnet50(weights="MSRA")
