"""fuse: which chains are found in other people's modules, and that no answer changes."""

import copy

import pytest
import torch
import torchvision
import zoo
from fused_nets import CHAINS, Net, X, iadd, normed, normed_as_of_old, report_of, same, trained
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torch.nn.utils import prune
from torchvision.ops import FrozenBatchNorm2d

import resnet_fused


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_found_and_change_nothing(name):
    run, modules = CHAINS[name]
    report = same(Net(run))
    assert [(c.layer, c.modules, c.why) for c in report][0] == ("bn1", modules, None)


@pytest.mark.parametrize("name", ["relu module", "+=", "bn and relu", "add, other order", "no relu"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_chains_are_within_the_budget_of_the_fused_kernels(name, mode):
    model = trained(Net(CHAINS[name][0])).train(mode == "train").to(memory_format=torch.channels_last)
    x = X.contiguous(memory_format=torch.channels_last)
    fused = resnet_fused.fuse(copy.deepcopy(model))
    expected, exact = model(x), copy.deepcopy(model).double()(x.double())
    with resnet_fused.backend("triton"):
        y = fused(x)
        assert any("triton" in entry for row in resnet_fused.explain(fused, x) for entry in row.ran)
    limit = 2 * (expected - exact).abs().max() + torch.finfo(x.dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= limit
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_two_branches_are_added_in_one_pass():
    def run(m, x):
        return m.relu(m.bn1(m.conv1(x)) + m.bn2(m.conv2(x)))

    report = same(Net(run))
    assert [c.modules for c in report] == ["Conv2d + BatchNorm2d + add + ReLU", "Conv2d + BatchNorm2d"]
    model = resnet_fused.fuse(trained(Net(run)).to(memory_format=torch.channels_last)).train()
    with resnet_fused.backend("triton"):
        rows = resnet_fused.explain(model, X.contiguous(memory_format=torch.channels_last))
    assert next(r for r in rows if r.layer == "conv2").ran == ["in conv1's pass"]


@pytest.mark.parametrize("conv", [{"groups": 8}, {"groups": 2, "bias": False}, {"padding_mode": "circular"}])
def test_other_convolutions_keep_their_bn_and_relu_fused(conv):
    [chain, _] = same(Net(CHAINS["relu module"][0], **conv))
    front = "" if "padding_mode" in conv else "Conv2d + "
    assert chain.modules == front + "BatchNorm2d + ReLU"


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, BatchNormAct2d, FrozenBatchNormAct2d, nn.SyncBatchNorm])
@pytest.mark.parametrize("name", ["relu module", "+=", "bn and relu"])
def test_other_bns(norm, name):
    acts = norm in (BatchNormAct2d, FrozenBatchNormAct2d)
    model = trained(Net(CHAINS[name][0], (lambda c: norm(c, apply_act=False)) if acts else norm)).eval()
    fused = copy.deepcopy(model)
    report = report_of(fused)
    assert report[0].modules == CHAINS[name][1].replace("BatchNorm2d", norm.__name__)
    fused.to(memory_format=torch.channels_last)
    x = X.contiguous(memory_format=torch.channels_last)
    with zoo.rewritten():
        assert torch.equal(fused(x), model.to(memory_format=torch.channels_last)(x))
    with resnet_fused.backend("triton"):
        torch.testing.assert_close(fused(x), model(x))
        rows = resnet_fused.explain(fused, x)
    assert any("triton" in entry for row in rows for entry in row.ran)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Identity])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_bn_with_its_own_activation(act, backend):
    model = Net(lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(x)))), lambda c: BatchNormAct2d(c, act_layer=act))
    same(model)
    model = trained(model).to(memory_format=torch.channels_last)
    x, fused = X.contiguous(memory_format=torch.channels_last), resnet_fused.fuse(copy.deepcopy(model))
    with resnet_fused.backend(backend):
        for mode in (True, False):
            torch.testing.assert_close(fused.train(mode)(x), model.train(mode)(x))


LEFT = {
    "the convolution's output is used elsewhere": lambda m, x: (lambda z: m.relu(m.bn1(z)) + z)(m.conv1(x)),
    "the BN's output is used elsewhere": lambda m, x: (lambda z: m.relu(z) + z)(m.bn1(m.conv1(x))),
    "x + x": lambda m, x: (lambda z: z + z)(m.bn1(m.conv1(x))),
    "an addend that broadcasts": lambda m, x: m.bn1(m.conv1(x)) + m.conv2(x.mean((2, 3), keepdim=True)),
    "a main branch that broadcasts": lambda m, x: m.bn1(m.conv1(x[:, :, :1, :1])) + m.conv2(x),
    "a number": lambda m, x: m.relu(m.bn1(m.conv1(x)) + x.detach().sum().item()),
    "alpha": lambda m, x: m.relu(torch.add(m.bn1(m.conv1(x)), x, alpha=2)),
    "relu between conv and bn": lambda m, x: m.bn1(m.inplace(m.conv1(x))),
}


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_what_else_uses_or_writes_decides(name, backend):
    if backend == "auto":
        same(Net(LEFT[name]))
        return
    model = trained(Net(LEFT[name])).eval().to(memory_format=torch.channels_last)
    fused = resnet_fused.fuse(copy.deepcopy(model))
    with resnet_fused.backend(backend), torch.no_grad():
        torch.testing.assert_close(fused(X.clone()), model(X.clone()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_an_addend_that_is_written_to_is_written_to(backend):
    model = trained(Net(lambda m, x: m.relu(iadd(x, m.bn1(m.conv1(x)))) + x)).eval()
    fused, report = resnet_fused.fuse(copy.deepcopy(model), report=True)
    assert report[0].modules == "Conv2d + BatchNorm2d"
    with torch.no_grad(), resnet_fused.backend(backend), zoo.rewritten():
        x, y = X.clone(), X.clone()
        torch.testing.assert_close(fused(x), model(y))
    torch.testing.assert_close(x, y)
    assert not torch.equal(x, X)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_convolution_whose_input_is_written_to_later_runs_before_that(backend):
    down = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    block = torchvision.models.resnet.BasicBlock(8, 8, downsample=down)
    for model in (
        block,
        Net(lambda m, x: (lambda z: m.relu(m.bn1(z) + x.relu_()))(m.conv1(x))),
        Net(lambda m, x: (lambda z: m.relu(m.bn1(z) + m.inplace(x)))(m.conv1(x))),
    ):
        model = trained(model).eval()
        fused = resnet_fused.fuse(copy.deepcopy(model))
        with torch.no_grad(), resnet_fused.backend(backend), zoo.rewritten():
            torch.testing.assert_close(fused(X.clone()), model(X.clone()))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_bn_whose_input_is_written_to_later_is_left(backend):
    model = trained(Net(lambda m, x: (lambda y: x.relu_() + m.relu(y))(m.bn1(x)))).eval()
    fused = resnet_fused.fuse(copy.deepcopy(model))
    with torch.no_grad(), resnet_fused.backend(backend), zoo.rewritten():
        torch.testing.assert_close(fused(X.clone()), model(X.clone()))


def hooked(m):
    m.conv1.register_forward_hook(lambda module, args, y: 3 * y)


def hooked_bn(m):
    m.bn1.register_forward_hook(lambda module, args, y: 3 * y)


def hooked_relu(m):
    m.relu.register_forward_hook(lambda module, args, y: 3 * y)


def pruned(m):
    prune.ln_structured(m.conv1, "weight", amount=0.5, n=2, dim=0)


def set_forward(m):
    plain = m.conv1.forward
    m.conv1.forward = lambda x: plain(x) + 1


def replaced(m):
    m.conv1 = nn.Conv2d(8, 8, 1)
    m.bn1 = nn.GroupNorm(2, 8)


def replaced_relu(m):
    m.relu = nn.SiLU()


@pytest.mark.parametrize(
    "change",
    [hooked, hooked_bn, hooked_relu, pruned, normed, normed_as_of_old, set_forward, replaced, replaced_relu],
    ids=lambda c: c.__name__,
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_module_is_called_as_it_is(change, when):
    model = trained(Net(CHAINS["relu module"][0])).eval()
    fused = copy.deepcopy(model)
    if when == "before":
        torch.manual_seed(0), change(fused)
        resnet_fused.fuse(fused)
    else:
        resnet_fused.fuse(fused)
        torch.manual_seed(0), change(fused)
    torch.manual_seed(0), change(model)
    for backend in ("auto", "triton"):
        with resnet_fused.backend(backend), torch.no_grad():
            torch.testing.assert_close(fused(X), model(X))


def test_hooks_on_a_module_that_is_looked_into_are_called():
    block = torchvision.models.resnet.BasicBlock(8, 8, downsample=nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    fused = resnet_fused.fuse(trained(block).eval())
    calls = []
    fused.downsample.register_forward_hook(lambda *args: calls.append(1))
    fused.register_forward_hook(lambda *args: calls.append(2))
    with zoo.rewritten():
        fused(X)
    assert calls == [1, 2]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "timm/regnetx_002", "timm/resnetv2_50"])
def test_models_that_nobody_here_wrote(name):
    row = zoo.check(name)
    assert row.wrong is None and row.found == row.fused > 0


def test_a_detector_with_frozen_bns_and_lists_of_images():
    torch.manual_seed(0)
    backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=3
    )
    model = torchvision.models.detection.FasterRCNN(trained(backbone), 3, min_size=64, max_size=64).eval()
    fused, report = resnet_fused.fuse(copy.deepcopy(model), report=True)
    assert report.fused and not report.left and "FrozenBatchNorm2d" in report[0].modules
    images = [torch.rand(3, 64, 64), torch.rand(3, 60, 50)]
    with zoo.rewritten():
        for found, expected in zip(fused(images), model(images), strict=True):
            assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_the_model_within_the_budget_under_forced_kernels():
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    model = trained(model).eval().to(memory_format=torch.channels_last)
    fused = resnet_fused.fuse(copy.deepcopy(model))
    x = torch.randn(1, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected, exact = model(x), copy.deepcopy(model).double()(x.double())
        with resnet_fused.backend("triton"):
            y = fused(x)
            rows = resnet_fused.explain(fused, x)
    limit = 2 * (expected - exact).abs().max() + torch.finfo(x.dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= limit
    assert all(r.ran == ["conv_bn_act: triton"] for r in rows if "BatchNorm2d" in r.modules)


def test_nchw_stays_nchw():
    model = trained(Net(CHAINS["+="][0])).eval()
    fused = resnet_fused.fuse(copy.deepcopy(model))
    assert all(p.is_contiguous() for p in fused.parameters())
    with resnet_fused.backend("triton"), torch.no_grad():
        y = fused(X)
    assert y.is_contiguous() and fused(X).stride() == y.stride()
    torch.testing.assert_close(y, model(X))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_on_a_device_chains_are_fused_without_being_asked_for(mode):
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    model = trained(model).train(mode == "train").to("cuda", memory_format=torch.channels_last)
    fused = resnet_fused.fuse(copy.deepcopy(model))
    x = torch.randn(2, 3, 32, 32).to("cuda", memory_format=torch.channels_last)
    rows = [r for r in resnet_fused.explain(fused, x) if "BatchNorm2d" in r.modules]
    assert len(rows) == 12 and all("eager" not in entry for r in rows for entry in r.ran)
    exact = copy.deepcopy(model).double()
    results = []
    for m, images in ((exact, x.double()), (model, x), (fused, x)):
        y = m(images)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in m.parameters()), *m.buffers()])
    assert results[2][0].stride() == results[1][0].stride()
    for tensors in zip(*results, strict=True):
        e, theirs, ours = (t.double() for t in tensors)
        assert (ours - e).norm() <= 4 * (theirs - e).norm() + 1e-6 * e.norm()


@pytest.mark.gpu
def test_on_a_device_nchw_runs_as_it_is():
    model = trained(Net(CHAINS["+="][0])).eval().to("cuda")
    fused = resnet_fused.fuse(copy.deepcopy(model))
    x = X.to("cuda")
    with torch.no_grad():
        assert torch.equal(fused(x), model(x))
        row = next(r for r in resnet_fused.explain(fused, x) if r.layer == "conv1")
    assert row.why == ["x lies in NCHW and the kernels run channels_last: model.to(memory_format=torch.channels_last)"]
