"""The models against torchvision's: the same names, the same bits."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import resnet_fused
from resnet_fused.models import ResNet, get_model, get_model_builder, get_model_weights, list_models

CHANNELS_LAST = torch.channels_last


def twins(name, **kwargs):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, **kwargs)
    torch.manual_seed(0)
    return get_model(name, **kwargs), theirs


def assert_same_bits(ours, theirs, x, mode):
    ours.train(mode), theirs.train(mode)
    ours.zero_grad(), theirs.zero_grad()
    losses = []
    for model in (ours, theirs):
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, torch.arange(len(x)))
        loss.backward()
        losses.append((logits, loss))
    (logits, loss), (their_logits, their_loss) = losses
    assert torch.equal(logits, their_logits) and torch.equal(loss, their_loss)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), f"gradient of {name}"
    for (name, p), q in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(p, q), name


def test_there_are_torchvisions_ten():
    assert list_models()[:10] == [
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "resnext101_32x8d",
        "resnext101_64x4d",
        "wide_resnet50_2",
        "wide_resnet101_2",
    ]


@pytest.mark.parametrize("name", list_models()[:10])
def test_bits_are_torchvisions(name):
    ours, theirs = twins(name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert all(p.stride() == q.stride() for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    x = torch.randn(2, 3, 33, 35)
    halves = name in ("resnet18", "resnet50", "resnext50_32x4d")  # one of each block: the others only have more of them
    for dtype, layout in ((torch.float32, torch.contiguous_format), (torch.bfloat16, CHANNELS_LAST))[: 1 + halves]:
        ours.to(dtype), theirs.to(dtype)
        for mode in (True, False):
            assert_same_bits(ours, theirs, x.to(dtype, memory_format=layout), mode)


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images, weights", [("nchw", "nhwc"), ("nhwc", "nchw"), ("nhwc", "nhwc"), ("nchw", "nchw")])
def test_every_layout_of_images_and_weights_gives_torchvisions_bits(block, dtype, images, weights):
    models = []
    for package in (resnet_fused, torchvision.models.resnet):
        torch.manual_seed(0)
        models.append(package.ResNet(getattr(package, block), [2, 1, 1, 1]).to(dtype))
    ours, theirs = models
    x = torch.randn(2, 3, 33, 35, dtype=dtype)
    if images == "nhwc":
        x = x.contiguous(memory_format=CHANNELS_LAST)
    if weights == "nhwc":
        ours, theirs = (m.to(memory_format=CHANNELS_LAST) for m in (ours, theirs))
    for mode in (True, False):
        assert_same_bits(ours, theirs, x, mode)
        features = create_feature_extractor(theirs, ["layer4"])(x)["layer4"]
        assert ours.forward_features(x).stride() == features.stride()


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(num_classes=10, zero_init_residual=True),
        dict(replace_stride_with_dilation=[False, True, True]),
        dict(norm_layer=lambda c: nn.GroupNorm(4, c)),
        dict(width_per_group=32),
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_torchvisions_arguments(kwargs):
    ours, theirs = twins("resnet50", **kwargs)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=CHANNELS_LAST)
    for mode in (True, False):
        with torch.no_grad():
            assert torch.equal(ours.train(mode)(x), theirs.train(mode)(x))


def test_stride_in_1x1_is_the_papers_v1():
    model = resnet_fused.resnet50(stride_in_1x1=True)
    for stage in (model.layer2, model.layer3, model.layer4):
        assert stage[0].conv1.stride == (2, 2) and stage[0].conv2.stride == (1, 1)
        assert stage[1].conv1.stride == (1, 1)
    assert model.layer1[0].conv1.stride == (1, 1)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    with pytest.raises(ValueError, match="stride_in_1x1"):
        resnet_fused.resnet18(stride_in_1x1=True)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: get_model("resnet49"), "unknown model 'resnet49'; there are: resnet18"),
        (lambda: resnet_fused.resnet50(replace_stride_with_dilation=[True]), "3 elements, got \\[True\\]"),
        (lambda: resnet_fused.resnext50_32x4d(groups=2), "takes groups=32, got groups=2"),
        (lambda: resnet_fused.resnet18(groups=2), "groups=1, base_width=64, got groups=2"),
    ],
)
def test_errors_name_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_block_of_the_users_own():
    class Block(resnet_fused.BasicBlock):
        def __init__(self, inplanes, planes, stride=1, downsample=None, **torchvisions):
            super().__init__(inplanes, planes, stride, downsample, **torchvisions)

    assert ResNet(Block, [1, 1, 1, 1], num_classes=3)(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_weight_enums_are_torchvisions():
    from resnet_fused.models import ResNeXt101_64X4D_Weights

    assert ResNeXt101_64X4D_Weights is torchvision.models.ResNeXt101_64X4D_Weights
    assert resnet_fused.ResNet50_Weights is torchvision.models.ResNet50_Weights
    with pytest.raises(AttributeError):
        _ = resnet_fused.VGG16_Weights


def test_state_dict_goes_both_ways():
    ours, theirs = resnet_fused.resnet18().eval(), torchvision.models.resnet18().eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_feature_extractor(backend):
    ours, theirs = twins("resnet18")
    ours.eval(), theirs.eval()
    nodes = ["bn1", "layer1", "layer2.0.downsample.0", "layer3.1", "layer3.1.conv2", "layer3.1.add", "avgpool", "fc"]
    x = torch.randn(2, 3, 64, 64)
    with resnet_fused.backend(backend), torch.no_grad():  # the graph is PyTorch's, and not forced
        got = create_feature_extractor(ours, nodes)(x)
        expected = create_feature_extractor(theirs, nodes)(x)
        assert list(got) == list(expected) and set(got) == set(nodes)
        for key in got:
            assert torch.equal(got[key], expected[key]), key


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("recompute", [None, "activations"])
def test_torch_fx_sees_torchvisions_graph(name, recompute):
    ours, theirs = twins(name)
    ours.set_recompute(recompute)
    assert get_graph_node_names(ours) == get_graph_node_names(theirs)
    kinds = [[(n.op, n.name, n.target) for n in torch.fx.symbolic_trace(m.eval()).graph.nodes] for m in (ours, theirs)]
    assert kinds[0] == kinds[1]


@pytest.fixture
def traced():
    """(a model in eval mode, images, its logits) before torch.fx comes."""
    model, x = resnet_fused.ResNet(resnet_fused.BasicBlock, [1, 1, 1, 1]).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model.train()(x)
        return model, x, model.eval()(x)


def test_a_traced_graph_shares_the_models_modules(traced):
    model, x, logits = traced
    graph = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        assert torch.equal(graph(x), logits)
        graph.train()(x + 1), model.eval()
        assert torch.equal(graph.eval()(x), model(x))  # train mode reached the traced BN: shared running statistics


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_torch_fx_passes_leave_the_users_model_and_the_numbers_alone(traced):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import fuse_fx, prepare_fx
    from torch.fx.experimental.optimization import fuse

    model, x, logits = traced
    names = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        graph = torch.fx.symbolic_trace(model)
        graph.delete_all_unused_submodules()
        folded = [fuse(model), fuse_fx(copy.deepcopy(model))]
        observed = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
        for result in (graph, observed, *folded):
            torch.testing.assert_close(result(x), logits, rtol=0, atol=1e-5)
        assert all(not any(isinstance(m, torch.nn.BatchNorm2d) for m in result.modules()) for result in folded)
        assert [name for name, _ in model.named_modules()] == names and torch.equal(model(x), logits)


def test_a_subclass_may_call_forward_impl():
    class Doubled(ResNet):
        def forward(self, x):
            return 2 * self._forward_impl(x)

    torch.manual_seed(0)
    doubled, x = Doubled(resnet_fused.BasicBlock, [1, 1, 1, 1]).eval(), torch.randn(1, 3, 32, 32)
    assert torch.equal(doubled(x), 2 * ResNet.forward(doubled, x))
    preact = resnet_fused.models.PreActResNet(resnet_fused.models.PreActBasicBlock, [1, 1, 1, 1]).eval()
    assert torch.equal(preact(x), preact._forward_impl(x))


def test_pretrained_is_taken_as_torchvision_takes_it(monkeypatch):
    asked = []
    monkeypatch.setattr(resnet_fused.models.network, "resolve", lambda name, weights: asked.append((name, weights)))
    with pytest.warns(UserWarning, match="'pretrained' is deprecated; it stands for weights='IMAGENET1K_V1'"):
        resnet_fused.resnet18(pretrained=True)
    with pytest.warns(UserWarning, match="'pretrained' is deprecated; it stands for weights=None"):
        resnet_fused.resnet18(pretrained=False)
    assert asked == [("resnet18", "IMAGENET1K_V1"), ("resnet18", None)]
    with pytest.warns(UserWarning, match="'pretrained' is deprecated; it stands for weights='IMAGENET1K_V1'"):
        resnet_fused.resnet50(True)
    resnet_fused.resnext50_32x4d(None, False)
    assert asked[2:] == [("resnet50", "IMAGENET1K_V1"), ("resnext50_32x4d", None)]
    with pytest.raises(TypeError, match="pretrained"):
        resnet_fused.resnet18(weights="DEFAULT", pretrained=True)


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
def test_what_is_no_tensor_is_named(name):
    with pytest.raises(TypeError, match=r"x must be a tensor \[N, C, H, W\], got ndarray"):
        get_model(name)(torch.zeros(1, 3, 32, 32).numpy())
    if name == "resnet18":
        with pytest.raises(TypeError, match=r"x must be a tensor \[N, C, H, W\], got ndarray"):
            get_model(name, features_only=True)(torch.zeros(1, 3, 32, 32).numpy())


class TestTorchvisionsRegistry:
    def test_names(self):
        assert sorted(list_models(include="wide_*")) == torchvision.models.list_models(include="wide_*")
        kinds = ["resnet*", "wide_*"]
        expected = torchvision.models.list_models(include=kinds, exclude=["*101*", "*_2"])
        assert sorted(list_models(include=kinds, exclude=["*101*", "*_2"])) == expected
        assert list_models(exclude="*resne*") == [n for n in list_models() if "plain" in n]
        assert list_models(torchvision.models) == list_models()[:10] and list_models(resnet_fused) == list_models()

    def test_builders(self):
        assert get_model_builder("resnet50") is get_model_builder("ResNet50") is resnet_fused.resnet50
        with pytest.raises(ValueError, match="unknown model 'resnet49'; there are: resnet18"):
            get_model_builder("resnet49")

    def test_weights(self):
        enum = torchvision.models.ResNet50_Weights
        assert get_model_weights("resnet50") is get_model_weights(resnet_fused.resnet50) is enum
        assert resnet_fused.get_weight("ResNet50_Weights.DEFAULT") is torchvision.models.get_weight(f"{enum.DEFAULT}")
        for name, message in (
            ("VGG16_Weights.DEFAULT", "a full name such as 'ResNet50_Weights.DEFAULT', .* got 'VGG16_Weights.DEFAULT'"),
            ("DEFAULT", "got 'DEFAULT'"),
            ("ResNet50_Weights.V3", "ResNet50_Weights has IMAGENET1K_V1, IMAGENET1K_V2"),
        ):
            with pytest.raises(ValueError, match=message):
                resnet_fused.get_weight(name)
        with pytest.raises(ValueError, match="no weights are published for cifar_resnet20; there are of resnet18, "):
            get_model_weights("cifar_resnet20")


@pytest.fixture
def weights(tmp_path):
    """torchvision's ResNet-18 with ten classes, and a file of its weights."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    return theirs, tmp_path / "resnet18.pth"


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20", "preact_resnet18"])
def test_no_classes_are_features(name):
    model, x = get_model(name, num_classes=0).eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    assert model(x).shape == (2, model.num_features) and "fc.weight" not in model.state_dict()
    with pytest.raises(ValueError, match="num_classes must be 0 or more, got -1"):
        get_model(name, num_classes=-1)


def test_features_of_weights(weights, monkeypatch):
    theirs, path = weights
    theirs.fc, x = nn.Identity(), torch.randn(2, 3, 32, 32)
    ours = resnet_fused.resnet18(weights=path, num_classes=0).eval()
    assert torch.equal(ours(x), theirs(x))
    published = torchvision.models.ResNet18_Weights.DEFAULT
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(type(published), "get_state_dict", lambda *args, **kwargs: state)
    assert torch.equal(resnet_fused.resnet18(weights="DEFAULT", num_classes=0).conv1.weight, state["conv1.weight"])
    with pytest.raises(ValueError, match="takes num_classes=1000, got num_classes=7"):
        resnet_fused.resnet18(weights="DEFAULT", num_classes=7)


@pytest.mark.parametrize("in_chans", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_channels_get_timms_weights(weights, tmp_path, in_chans, dtype):
    from timm.models import adapt_input_conv

    theirs, path = weights
    torch.save(theirs.to(dtype).state_dict(), path)
    ours = resnet_fused.resnet18(weights=path, in_chans=in_chans, num_classes=10)
    assert torch.equal(ours.conv1.weight, adapt_input_conv(in_chans, theirs.conv1.weight).float())
    x = torch.randn(2, in_chans, 32, 32)
    assert ours(x).shape == (2, 10) and get_model("cifar_resnet20", in_chans=in_chans)(x).shape == (2, 10)
    torch.save(ours.state_dict(), path)  # those are for in_chans already
    assert torch.equal(
        resnet_fused.resnet18(weights=path, in_chans=in_chans, num_classes=10).conv1.weight, ours.conv1.weight
    )
    if in_chans != 3:
        with pytest.raises(ValueError, match="conv1.weight is .*, the model's is .64, 7, 7, 7."):
            resnet_fused.resnet18(weights=path, in_chans=7, num_classes=10)
    with pytest.raises(ValueError, match="in_chans must be at least 1, got 0"):
        resnet_fused.resnet18(in_chans=0)
