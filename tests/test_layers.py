"""Which steps are fused, what happens to those that are not, and that no copy of a weight or statistic goes stale."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune

import resnet_fused
from resnet_fused.dispatch import registry

X = torch.randn(2, 3, 33, 35, generator=torch.Generator().manual_seed(0))
FUSED = ["triton"]


@pytest.fixture
def auto_fuses(monkeypatch):
    """`auto` on the CPU as on a GPU: Triton's interpreter serves."""
    monkeypatch.setattr(registry, "_AUTO_DEVICES", ("cpu",))


def twins(**kwargs):
    """ResNet-18 with one block a stage, whose interpreted kernels take half the time."""
    torch.manual_seed(0)
    theirs = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], **kwargs).eval()
    torch.manual_seed(0)
    ours = resnet_fused.ResNet(resnet_fused.BasicBlock, [1, 1, 1, 1], **kwargs).eval()
    for m in (ours, theirs):  # statistics unlike a fresh BN's
        for i, bn in enumerate(b for b in m.modules() if isinstance(b, nn.BatchNorm2d)):
            torch.manual_seed(i)
            if bn.running_mean is not None:
                bn.running_mean.normal_(0, 0.1), bn.running_var.uniform_(0.5, 1.5)
    return ours, theirs


def first_blocks(model, n=1):
    """The model with the first n blocks of each stage."""
    for i in range(1, 5):
        setattr(model, f"layer{i}", getattr(model, f"layer{i}")[:n])
    return model


def images(model):
    return X.to(model.conv1.weight.device)


def assert_same(ours, theirs, backend):
    with resnet_fused.backend(backend), torch.no_grad():
        expected = theirs(images(theirs))
        torch.testing.assert_close(ours(images(ours)), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hook(model):
    model.layer2[0].conv1.register_forward_hook(lambda module, args, out: 3 * out)


def hook_on_projection(model):
    model.layer2[0].downsample.register_forward_hook(lambda module, args, out: 3 * out)


def prune_weight(model):
    prune.ln_structured(model.layer2[0].conv1, "weight", amount=0.5, n=2, dim=0)


def weight_norm(model):
    parametrizations.weight_norm(model.layer2[0].conv1)
    with torch.no_grad():
        model.layer2[0].conv1.parametrizations.weight.original0.mul_(2)


def old_weight_norm(model):
    nn.utils.weight_norm(model.layer2[0].conv1)
    with torch.no_grad():
        model.layer2[0].conv1.weight_g.mul_(2)


def replaced_convolution(model):
    conv = Doubled(64, 128, 3, 2, 1, bias=False)
    conv.load_state_dict(model.layer2[0].conv1.state_dict())
    model.layer2[0].conv1 = conv


def forward_on_an_instance(model):
    conv = model.layer2[0].conv1
    plain = conv.forward
    conv.forward = lambda x: plain(x) + 1


def replaced_activation(model):
    model.layer2[0].relu = nn.ReLU6()


def circular_padding(model):
    model.layer2[0].conv1.padding_mode = "circular"
    model.layer2[0].conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]


def string_padding(model):
    model.layer2[0].conv2.padding = "same"


REASONS = {
    hook: "the convolution (Conv2d) has hooks",
    prune_weight: "the convolution (Conv2d) has hooks",
    weight_norm: "the convolution is ParametrizedConv2d, not exactly Conv2d",
    old_weight_norm: "the convolution (Conv2d) has hooks",
    replaced_convolution: "the convolution is Doubled, not exactly Conv2d",
    forward_on_an_instance: "the convolution (Conv2d) has a forward set on the instance",
    replaced_activation: "the activation is ReLU6, not exactly ReLU",
    circular_padding: "the convolution pads by 'circular'",
    string_padding: "the convolution pads by 'zeros', 'same'",
}


CHANGES = pytest.mark.parametrize("change", [*REASONS, hook_on_projection], ids=lambda c: c.__name__)


@CHANGES
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_changed_module_is_called_as_torchvision_calls_it(change, backend):
    ours, theirs = twins()
    change(ours), change(theirs)
    assert_same(ours, theirs, backend)


@CHANGES
def test_beside_a_changed_module_the_others_are_fused(change, auto_fuses):
    ours, theirs = twins()
    change(ours), change(theirs)
    assert_same(ours, theirs, "auto")
    if change in REASONS:
        with torch.no_grad():
            rows = {r.layer: r for r in resnet_fused.explain(ours, X)}
        row = rows["layer2.0.conv2" if change is string_padding else "layer2.0.conv1"]
        assert row.ran == ["eager"] and REASONS[change] in row.why[0]
        assert rows["layer1.0.conv1"].ran == ["conv_bn_act: triton"]


@CHANGES
def test_a_forced_backend_refuses_a_changed_module_by_its_name(change):
    ours, _ = twins()
    change(ours)
    name = {string_padding: "conv2", replaced_activation: "relu", hook_on_projection: "downsample"}.get(change, "conv1")
    kind = type(ours.get_submodule(f"layer2.0.{name}")).__name__
    reason = REASONS.get(change, "the shortcut's projection has hooks")
    with resnet_fused.backend("triton"), pytest.raises(resnet_fused.BackendUnavailable) as caught, torch.no_grad():
        ours(X)
    message = str(caught.value)
    assert message.startswith(f"layer2.0.{name}, {kind}(") and len(message.splitlines()) == 1
    assert f"backend 'triton' was asked for and can't serve this: {reason}" in message
    remedy = 'Use backend("auto"), which leaves it to PyTorch, on the command line neither --backend nor '
    assert message.endswith(f"{remedy}RESNET_FUSED_BACKEND, or mend that.")


class OwnBN(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize("backend", ["cuda", "cudnn", "triton", "onednn"])
def test_a_forced_backend_refuses_a_bn_of_ones_own(backend):
    ours, _ = twins(norm_layer=OwnBN)
    message = f"^bn1, OwnBN.*{backend!r}.*the BN is OwnBN, not exactly BatchNorm2d"
    with resnet_fused.backend(backend), pytest.raises(resnet_fused.BackendUnavailable, match=message):
        ours(X)
    with pytest.raises(resnet_fused.BackendUnavailable, match="^OwnBN"), resnet_fused.backend(backend):
        ours.layer1(torch.randn(1, 64, 9, 9))  # no name without the model


@pytest.mark.parametrize("backend", ["auto", *FUSED])
@pytest.mark.parametrize("mode", [True, False])
def test_frozen_bns_are_fused(backend, mode):
    ours, theirs = (m.train(mode) for m in twins(norm_layer=torchvision.ops.FrozenBatchNorm2d))
    assert_same(ours, theirs, backend)
    if backend != "auto":
        with resnet_fused.backend(backend), torch.no_grad():
            rows = [r for r in resnet_fused.explain(ours, X) if "FrozenBatchNorm2d" in r.modules]
        assert len(rows) == 12 and all(r.ran[0].startswith(("stem", "conv_bn_act")) for r in rows)
    gradients = []
    for m in (ours, theirs):
        with resnet_fused.backend(backend):
            m(images(m)).square().sum().backward()
        gradients.append([p.grad for p in m.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_what_is_not_ours_is_not_forced():
    ours, theirs = twins()
    assert_same(theirs, theirs, "cudnn")
    ours.layer1[0].downsample = nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)).eval()
    ours.maxpool.register_forward_hook(lambda *args: None)
    with torch.no_grad():
        expected = ours(X)
        with resnet_fused.backend("triton"):
            torch.testing.assert_close(ours(X), expected)


@pytest.mark.parametrize("backend", ["auto", *FUSED])
def test_unstructured_pruning(backend):
    ours, theirs = twins()
    for model in (ours, theirs):
        prune.l1_unstructured(model.layer2[0].conv1, "weight", amount=0.5)
        prune.remove(model.layer2[0].conv1, "weight")
    assert_same(ours, theirs, backend)


def test_group_norm_runs_as_it_is(auto_fuses):
    ours, theirs = twins(norm_layer=lambda c: nn.GroupNorm(4, c))
    assert_same(ours, theirs, "auto")
    reason = "the BN is GroupNorm, not exactly BatchNorm2d or SyncBatchNorm"
    assert reason in resnet_fused.explain(ours, X)[0].why
    with resnet_fused.backend("triton"):  # explained, where a plain call raises
        assert reason in resnet_fused.explain(ours, X)[0].why


def test_a_projection_with_a_hook_is_called_whole(auto_fuses):
    ours, _ = twins()
    calls = []
    ours.layer2[0].downsample.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        ours(X)
    assert calls == [1]


def test_global_hooks_are_honoured(auto_fuses):
    ours, _ = twins()
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: called.append(type(module)))
    try:
        with torch.no_grad():
            ours(X)
    finally:
        handle.remove()
    assert called.count(nn.Conv2d) == 12 and called.count(nn.BatchNorm2d) == 12


def edit_in_place(model):
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(1.5), model.layer1[0].bn1.running_mean.add_(0.5)


def edit_data(model):
    model.layer1[0].conv1.weight.data.mul_(1.5)
    model.layer1[0].bn1.running_var.data.mul_(2)
    model.layer2[0].bn2.weight.data = model.layer2[0].bn2.weight.data * 2


def load_other_state(model):
    torch.manual_seed(5)
    other = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    model.load_state_dict(other.state_dict())


def swap_to_ema(model):
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    edit_in_place(model)
    average.update_parameters(model)
    for p, q in zip(model.parameters(), average.module.parameters(), strict=True):
        p.data, q.data = q.data, p.data


def train_a_while(model):
    with resnet_fused.backend("eager"):
        model.train()(images(model))
    model.eval()


def train_a_child(model):
    with resnet_fused.backend("eager"):
        model.layer1[0].bn1.train()
        model(images(model))
        model.layer1[0].bn1.eval()


EDITS = [edit_in_place, edit_data, load_other_state, swap_to_ema, train_a_while, train_a_child]


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.__name__)
@pytest.mark.parametrize("backend", ["auto", *FUSED])
def test_the_next_pass_sees_every_edit(edit, backend):
    ours, theirs = twins()
    assert_same(ours, theirs, backend)
    with torch.no_grad():
        before = ours(X)
    edit(ours), edit(theirs)
    assert_same(ours, theirs, backend)
    with torch.no_grad():
        assert (ours(X) - before).abs().max() > 1e-2


@pytest.mark.parametrize("backend", FUSED)
def test_fine_tuning_with_frozen_bn(backend):
    ours, theirs = twins()
    for model in (ours, theirs):
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.requires_grad_(False)
    with resnet_fused.backend(backend):
        rows = {r.layer: r for r in resnet_fused.explain(ours, X)}
        assert rows["layer2.0.downsample.0"].ran == [f"conv_bn_act: {backend}"]
        ours(X).logsumexp(1).sum().backward()
    theirs(X).logsumexp(1).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("backend", FUSED)
def test_fine_tuning_with_eval_mode_bn(backend):
    ours, theirs = twins()
    with resnet_fused.backend(backend):
        rows = {r.layer: r for r in resnet_fused.explain(ours, X)}
        assert rows["layer2.0.downsample.0"].ran == ["in layer2.0.conv2's pass"]
        ours(X).logsumexp(1).sum().backward()
    theirs(X).logsumexp(1).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("bn", [dict(momentum=None), dict(track_running_stats=False), dict(momentum=0.3), "no longer"])
@pytest.mark.parametrize("backend", ["auto", *FUSED])
def test_train_mode_keeps_batch_norms_books(backend, bn):
    kwargs = {} if bn == "no longer" else bn
    ours, theirs = twins(norm_layer=lambda c: nn.BatchNorm2d(c, **kwargs))
    logits = []
    for model in (ours.train(), theirs.train()):
        with resnet_fused.backend(backend):
            model(X)
            if bn == "no longer":
                model.bn1.track_running_stats = model.layer2[0].bn2.track_running_stats = False
            logits.append(model(X + 1))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    for (name, p), q in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("backend", ["auto", *FUSED])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_float32_block_input_under_autocast(backend, mode):
    ours, theirs = twins()
    x = torch.randn(2, 64, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), resnet_fused.backend(backend):
        y = getattr(ours, mode)().layer1(x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = getattr(theirs, mode)().layer1(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_function_transforms_take_pytorchs_operators(mode, monkeypatch):
    ours, theirs = twins(norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=mode == "eval"))
    monkeypatch.setattr(registry, "_AUTO_DEVICES", ("cpu",))
    monkeypatch.setattr(registry, "_ORDER", dict.fromkeys(registry._ORDER, ("triton",)))
    found = []
    for model in (ours, theirs):
        block = getattr(model, mode)().layer2
        loss = lambda p, b=block: torch.func.functional_call(b, p, (X.repeat(1, 22, 1, 1)[:, :64, ::4, ::4],)).sum()  # noqa: E731
        found.append(torch.func.grad(loss)({k: v.detach() for k, v in block.named_parameters()}))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-4, msg=name)


def test_deepcopies_are_independent():
    ours, theirs = twins()
    twin = copy.deepcopy(ours)
    edit_in_place(ours)
    assert_same(twin, theirs, "triton")


@pytest.mark.parametrize("backend", ["auto", *FUSED])
def test_a_frozen_bn_without_bias_is_served(backend):
    ours, theirs = twins()
    for m in (*ours.modules(), *theirs.modules()):
        if isinstance(m, nn.BatchNorm2d):
            m.bias = None
            m.requires_grad_(False)
    with resnet_fused.backend(backend):
        torch.testing.assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-4)
