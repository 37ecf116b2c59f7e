"""fuse: which chains are found in other people's modules, that no answer changes, and what is refused."""

import collections
import copy
import io
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
import zoo
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

import resnet_fused

X = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0))


def trained(model):
    """Statistics and affine parameters unlike a fresh BN's."""
    generator = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d, FrozenBatchNormAct2d)):
            for t, low in ((m.weight, 0.5), (m.bias, -0.5), (m.running_mean, -0.5), (m.running_var, 0.5)):
                t.data.copy_(low + torch.rand(t.shape, generator=generator))
    return model


def steps(model, *inputs):
    """Outputs, gradients of everything and statistics of a train step, then outputs in eval mode."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    model.train()
    outputs = zoo.tensors(model(*[x * 1 for x in inputs]))
    sum(((i + 1) * y * y).sum() for i, y in enumerate(outputs)).backward()
    found = {f"train {i}": y.detach() for i, y in enumerate(outputs)} | {
        f"dx {i}": x.grad for i, x in enumerate(inputs)
    }
    found |= {n: p.grad for n, p in model.named_parameters()} | {n: b.clone() for n, b in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        found |= {f"eval {i}": y for i, y in enumerate(zoo.tensors(model(*[x.detach().clone() for x in inputs])))}
    return found


def report_of(model):
    return resnet_fused.fuse(model, report=True)[1]


def same(model, *inputs):
    """Fuse it and hold it against itself, to the bit; the report."""
    model = trained(model)
    fused = copy.deepcopy(model)
    report = report_of(fused)
    expected = steps(model, *(inputs or (X,)))
    with zoo.rewritten():
        found = steps(fused, *(inputs or (X,)))
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        assert (found[name] is None and e is None) or torch.equal(found[name], e), name
    return report


def ran(model, *inputs):
    """The chains that ran as one call, by the rewritten graphs."""
    rows = resnet_fused.explain(model, *inputs)
    return {r.layer: r.modules for r in rows if " + " in r.modules}


class Net(nn.Module):
    """conv1, bn1, conv2, bn2 and relu, and a forward."""

    def __init__(self, run, norm=nn.BatchNorm2d, **conv):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, **conv)
        self.bn1 = norm(8)
        self.conv2 = nn.Conv2d(8, 8, 1, bias=False)
        self.bn2 = norm(8)
        self.relu = nn.ReLU()
        self.inplace = nn.ReLU(inplace=True)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def iadd(a, b):
    a += b
    return a


CHAINS = {  # the forward, and what its last chain is made of
    "relu module": (lambda m, x: m.relu(m.bn1(m.conv1(x))), "Conv2d + BatchNorm2d + ReLU"),
    "inplace module": (lambda m, x: m.inplace(m.bn1(m.conv1(x))), "Conv2d + BatchNorm2d + ReLU"),
    "F.relu": (lambda m, x: F.relu(m.bn1(m.conv1(x))), "Conv2d + BatchNorm2d + relu"),
    "F.relu inplace": (lambda m, x: F.relu(m.bn1(m.conv1(x)), inplace=True), "Conv2d + BatchNorm2d + relu"),
    "torch.relu": (lambda m, x: torch.relu(m.bn1(m.conv1(x))), "Conv2d + BatchNorm2d + relu"),
    "torch.relu_": (lambda m, x: torch.relu_(m.bn1(m.conv1(x))), "Conv2d + BatchNorm2d + relu"),
    "method": (lambda m, x: m.bn1(m.conv1(x)).relu(), "Conv2d + BatchNorm2d + relu"),
    "method_": (lambda m, x: m.bn1(m.conv1(x)).relu_(), "Conv2d + BatchNorm2d + relu"),
    "no relu": (lambda m, x: m.bn1(m.conv1(x)), "Conv2d + BatchNorm2d"),
    "add": (lambda m, x: m.relu(m.bn1(m.conv1(x)) + x), "Conv2d + BatchNorm2d + add + ReLU"),
    "add, other order": (lambda m, x: m.relu(x + m.bn1(m.conv1(x))), "Conv2d + BatchNorm2d + add + ReLU"),
    "operator.add": (lambda m, x: F.relu(operator.add(m.bn1(m.conv1(x)), x)), "Conv2d + BatchNorm2d + add + relu"),
    "torch.add": (lambda m, x: F.relu(torch.add(m.bn1(m.conv1(x)), x)), "Conv2d + BatchNorm2d + add + relu"),
    "method add": (lambda m, x: F.relu(m.bn1(m.conv1(x)).add(x)), "Conv2d + BatchNorm2d + add + relu"),
    "method add_": (lambda m, x: F.relu(m.bn1(m.conv1(x)).add_(x)), "Conv2d + BatchNorm2d + add + relu"),
    "+=": (lambda m, x: m.inplace(iadd(m.bn1(m.conv1(x)), x)), "Conv2d + BatchNorm2d + add + ReLU"),
    "add without relu": (lambda m, x: m.bn1(m.conv1(x)) + x, "Conv2d + BatchNorm2d + add"),
    "sum used twice": (lambda m, x: (lambda y: y + m.relu(y))(m.bn1(m.conv1(x)) + x), "Conv2d + BatchNorm2d + add"),
    "bn and relu": (lambda m, x: m.relu(m.bn1(x)), "BatchNorm2d + ReLU"),
    "bn, relu, conv": (lambda m, x: m.conv1(m.inplace(m.bn1(x))), "BatchNorm2d + ReLU"),
    "bn alone": (lambda m, x: m.bn1(x), "BatchNorm2d"),
}


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


def shared(m, x):
    return m.relu(m.bn1(m.conv1(x))) + m.bn2(m.conv1(x))


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


def normed(m):
    parametrizations.weight_norm(m.conv1)


def normed_as_of_old(m):
    nn.utils.weight_norm(m.conv1)


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


# The errors of other fusers that nobody is told of.


class TestSilentErrorsOfOtherFusers:
    def test_pytorch_104593_a_convolution_that_is_called_with_and_without_bn(self):
        report = same(Net(lambda m, x: m.conv1(x) + m.bn1(m.conv1(2 * x))))
        assert report[0].modules == "BatchNorm2d + add"  # the convolution is left

    def test_pytorch_197539_one_convolution_in_two_chains(self):
        report = same(Net(shared))
        assert all("Conv2d" not in c.modules for c in report)
        report = same(Net(lambda m, x: (m.bn1(m.conv1(x)), m.conv1(2 * x))))
        assert report[0].modules == "BatchNorm2d"

    def test_one_convolution_under_two_names(self):
        block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        model = nn.Sequential(block, nn.Sequential(block[0], nn.BatchNorm2d(8)))
        assert all("Conv2d" not in c.modules for c in same(model))

    @pytest.mark.parametrize("compiled", [False, True])
    def test_pytorch_108863_training_between_two_evaluations_is_seen(self, compiled):
        model = trained(Net(CHAINS["relu module"][0])).eval()
        fused = resnet_fused.fuse(copy.deepcopy(model))
        call = torch.compile(fused, backend="aot_eager") if compiled else fused
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, fused)]
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(call.eval()(X), model.eval()(X))
            for m, optimizer in zip((model, call), optimizers, strict=True):
                m.train()(X).square().mean().backward()
                optimizer.step()

    def test_pytorch_118829_the_relu_behind_the_add_of_a_bottleneck(self):
        block = torchvision.models.resnet.Bottleneck(8, 2)  # one relu, called three times
        report = same(block)
        assert [c.modules for c in report] == [
            *["Conv2d + BatchNorm2d + ReLU"] * 2,
            "Conv2d + BatchNorm2d + add + ReLU",
        ]

    @pytest.mark.parametrize("backend", ["auto", "triton"])
    def test_pytorch_62926_the_addend_is_the_convolutions_input(self, backend):
        model = trained(Net(lambda m, x: m.inplace(iadd(m.bn1(m.conv1(x)), x)))).eval()
        fused, x = resnet_fused.fuse(copy.deepcopy(model)), X.clone()
        with resnet_fused.backend(backend), torch.no_grad():
            torch.testing.assert_close(fused(x), model(X))
        assert torch.equal(x, X)

    def test_pytorch_178096_dynamic_shapes_under_compile(self):
        model = trained(Net(lambda m, x: m.conv1(m.bn1(x)))).eval()
        torch.compiler.reset()
        compiled = torch.compile(resnet_fused.fuse(copy.deepcopy(model)), dynamic=True, backend="aot_eager")
        with torch.no_grad():
            for x in (X, X[:1, :, :4], torch.cat([X, X])):
                assert torch.equal(compiled(x), model(x))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        return -dy


class Named(dict):
    pass


class TestForwards:
    """What a forward does beside calling modules."""

    @pytest.mark.parametrize(
        "run, why",
        [
            (lambda m, x: m.bn1(m.conv1(x + torch.rand(1))), "makes a tensor of its own"),
            (lambda m, x: m.bn1(m.conv1(x)) if torch.rand(1).item() < 2 else x, "draws random numbers"),
            (lambda m, x: m.bn1(m.conv1(x)) if x.sum() > 0 else x, "can't be traced"),
            (lambda m, x: setattr(m, "kept", x) or m.bn1(m.conv1(x)), "writes to self.kept"),
            (lambda m, x: torch.no_grad()(lambda: m.bn1(m.conv1(x)))(), "changes or asks for the grad mode"),
            (lambda m, x: torch.enable_grad()(lambda: m.bn1(m.conv1(x)))(), "changes or asks for the grad mode"),
            (lambda m, x: torch.autocast("cpu")(lambda: m.bn1(m.conv1(x)))(), "changes or asks for the grad mode"),
            (lambda m, x: m.bn1(m.conv1(x)) if torch.is_grad_enabled() else x, "changes or asks for the grad mode"),
            (lambda m, x: m.bn1(m.conv1(Reversed.apply(x))), "a backward of its own"),
            (lambda m, x: checkpoint(lambda x: m.bn1(m.conv1(x)), x, use_reentrant=False), "recomputes"),
            (lambda m, x: m.bn1(m.conv1.forward(x)), "calls a module's forward by itself"),
            (lambda m, x: Named(y=m.bn1(m.conv1(x))), "makes a Named"),
            (lambda m, x: m.bn1(m.conv1(x)) if isinstance(m.conv2(x), tuple) else x, "asks for the type"),
        ],
    )
    def test_what_a_graph_can_not_say_is_left(self, run, why):
        model = Net(run)
        before, state = set(vars(model)), torch.get_rng_state()
        report = report_of(model)
        assert why in report[0].why
        assert set(vars(model)) == before and torch.equal(torch.get_rng_state(), state)

    def test_a_forward_that_takes_tensors_and_lists(self):
        model = trained(Net(lambda m, x: m.bn1(m.conv1(x if isinstance(x, torch.Tensor) else torch.cat(x))))).eval()
        fused = resnet_fused.fuse(copy.deepcopy(model))
        with zoo.rewritten():
            assert ran(fused, X) == ran(fused, [X, X]) == {"conv1": "Conv2d + BatchNorm2d"}
            assert torch.equal(fused([X, 2 * X]), model([X, 2 * X])) and torch.equal(fused(X), model(X))
            assert torch.equal(fused((X, X)), model((X, X)))  # a tuple: not what was traced

    def test_the_kind_of_dictionary_is_kept(self):
        fused = resnet_fused.fuse(Net(lambda m, x: collections.OrderedDict(y=m.bn1(m.conv1(x)))))
        with zoo.rewritten():
            assert type(fused(X)) is collections.OrderedDict and "forward" in vars(fused)

    def test_modes_numbers_and_lists_that_were_read_are_read_again(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn, self.skip, self.scale = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), False, [1.0]
                self.more = nn.ModuleList()

            def forward(self, x):
                y = self.bn(self.conv(x))
                y = F.dropout(y, 0.0 if self.skip else 0.5, self.training) * self.scale[0]
                for m in self.more:
                    y = m(y)
                return y if self.training else y + 1

        model = trained(Model())
        fused = resnet_fused.fuse(copy.deepcopy(model))

        def check():
            for mode in (True, False):
                outputs = []
                for m in (model.train(mode), fused.train(mode)):
                    torch.manual_seed(0)
                    outputs.append(m(X))
                assert torch.equal(*outputs)

        with zoo.rewritten():
            check()
            for m in (model, fused):
                m.skip = True
            check()
            for m in (model, fused):
                m.scale[0] = 3.0
            check()
            for m in (model, fused):
                m.more.append(nn.Hardtanh())
            check()
            for m in (model, fused):
                del m.bn
                m.bn = nn.Identity()
            check()

    def test_a_sequential_that_grows(self):
        fused = resnet_fused.fuse(trained(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())).eval())
        fused.append(nn.Hardtanh(-0.1, 0.1))
        with zoo.rewritten():
            assert fused(X).max() <= 0.1

    def test_buffers_are_not_touched_by_tracing(self):
        class Counting(Net):
            def __init__(self, run):
                super().__init__(run)
                self.register_buffer("calls", torch.zeros(()))

        model = Counting(lambda m, x: (m.calls.add_(1), m.bn1(m.conv1(x)))[1])
        resnet_fused.fuse(model)
        assert model.calls == 0
        with zoo.rewritten():
            model(X)
        assert model.calls == 1

    def test_arguments_beside_the_images(self):
        class Model(Net):
            def forward(self, x, scale=None, *, twice=False):
                y = self.relu(self.bn1(self.conv1(x)))
                y = y if scale is None else y * scale
                return 2 * y if twice else y

        model = trained(Model(None)).eval()
        fused = resnet_fused.fuse(copy.deepcopy(model))
        with zoo.rewritten():
            for args, kwargs in (
                ((X,), {}),
                ((X, 3.0), {}),
                ((X,), {"scale": X}),
                ((X,), {"twice": True}),
                ((), {"x": X}),
            ):
                assert torch.equal(fused(*args, **kwargs), model(*args, **kwargs))


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


class TestTheModelStaysWhatItWas:
    def model(self):
        torch.manual_seed(0)
        return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)

    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def test_fuse_and_unfuse(self):
        model = self.model()
        before = {n: dict(vars(m)) for n, m in model.named_modules()}
        parameters, keys = list(map(id, model.parameters())), list(model.state_dict())
        assert resnet_fused.fuse(model) is model and "forward" in vars(model.layer1[0])
        assert list(map(id, model.parameters())) == parameters and list(model.state_dict()) == keys
        assert type(model) is torchvision.models.ResNet
        assert resnet_fused.unfuse(model) is model
        assert {n: dict(vars(m)) for n, m in model.named_modules()} == before

    def test_twice_is_once(self):
        model = self.model()
        first, second = report_of(model), report_of(model)
        assert first == second and all(c.why is None for c in second)
        resnet_fused.unfuse(model)
        assert not any("forward" in vars(m) for m in model.modules())

    def test_training_gives_the_same_losses_and_a_checkpoint_that_loads(self):
        original = self.model()
        model = copy.deepcopy(original)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (original, model)]
        model = resnet_fused.fuse(model)  # behind the optimizer
        with zoo.rewritten():
            for _ in range(3):
                losses = []
                for m, optimizer in zip((original, model), optimizers, strict=True):
                    loss = F.cross_entropy(m(self.x), torch.tensor([0, 1]))
                    optimizer.zero_grad(), loss.backward(), optimizer.step()
                    losses.append(loss)
                assert torch.equal(*losses)
        file = io.BytesIO()
        torch.save(resnet_fused.unfuse(model).state_dict(), file)
        file.seek(0)
        fresh = self.model()
        fresh.load_state_dict(torch.load(file))
        assert torch.equal(fresh.eval()(self.x), original.eval()(self.x))

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "saved"])
    def test_copies_are_fused_and_stand_alone(self, how):
        model = resnet_fused.fuse(trained(self.model()).eval())
        if how == "saved":
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        else:
            other = how(model)
        expected = model(self.x)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        with zoo.rewritten():
            assert torch.equal(other(self.x), expected)
            assert "Conv2d + BatchNorm2d + add + ReLU" in ran(other, self.x).values()
        assert vars(other.layer1[0])["forward"].module is other.layer1[0]

    def test_replicas_of_data_parallel_run_their_own_parameters(self):
        model = resnet_fused.fuse(trained(self.model()).eval())
        replica = model._replicate_for_data_parallel()
        assert vars(replica)["forward"].module is replica
        assert vars(replica)["forward"].plans is vars(model)["forward"].plans

    def test_weights_swapped_by_functional_call_are_used(self):
        model = resnet_fused.fuse(trained(self.model()).eval())
        other = {n: 2 * p for n, p in model.named_parameters()}
        plain = resnet_fused.unfuse(copy.deepcopy(model))
        expected = torch.func.functional_call(plain, other, (self.x,))
        with zoo.rewritten():
            assert torch.equal(torch.func.functional_call(model, other, (self.x,)), expected)

    def test_averaged_models_and_checkpoints(self):
        model = resnet_fused.fuse(trained(self.model()))
        plain = resnet_fused.unfuse(copy.deepcopy(model))
        with zoo.rewritten():
            averaged = torch.optim.swa_utils.AveragedModel(model)
            averaged.update_parameters(model)
            assert torch.equal(averaged.eval()(self.x), copy.deepcopy(plain).eval()(self.x))
            x = self.x.clone().requires_grad_()
            torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
        y = self.x.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(plain, y, use_reentrant=False).sum().backward()
        assert torch.equal(x.grad, y.grad)

    def test_tracers_and_compilers_see_the_model_itself(self):
        model = resnet_fused.fuse(trained(self.model()).eval())
        expected = model(self.x)
        with zoo.rewritten():
            features = torchvision.models.feature_extraction.create_feature_extractor(model, ["layer1.0.relu_1", "fc"])
            assert torch.equal(features(self.x)["fc"], expected)
            traced = torch.jit.trace(model, self.x)
            assert torch.equal(traced(self.x), expected)
            exported = torch.export.export(model, (self.x,)).module()
            torch.testing.assert_close(exported(self.x), expected)

    def test_a_trace_records_no_operator_of_ours(self):
        model = resnet_fused.fuse(trained(Net(CHAINS["relu module"][0])).eval())
        with resnet_fused.backend("triton"), torch.no_grad():
            assert "resnet_fused" not in str(torch.jit.trace(model, X).inlined_graph)

    def test_explain_shows_the_chains(self):
        model = resnet_fused.fuse(self.model().eval())
        rows = {r.layer: r for r in resnet_fused.explain(model, self.x)}
        assert rows["layer1.0.conv2"].modules == "Conv2d + BatchNorm2d + add + ReLU"
        assert rows["layer1.0.conv2"].ran == ["eager"] and "'auto' is eager on cpu" in rows["layer1.0.conv2"].why[0]
        assert rows["fc"].ran == ["PyTorch"]

    def test_the_signature_is_the_models(self):
        import inspect

        model = self.model()
        before = inspect.signature(model.forward)
        assert inspect.signature(resnet_fused.fuse(model).forward) == before


class TestBadInput:
    def untouched(self, model, error, match):
        before = {n: set(vars(m)) for n, m in model.named_modules()}
        with pytest.raises(error, match=match):
            resnet_fused.fuse(model)
        assert {n: set(vars(m)) for n, m in model.named_modules()} == before

    def test_no_module(self):
        with pytest.raises(TypeError, match="model must be an nn.Module, got dict"):
            resnet_fused.fuse({})

    def test_on_the_meta_device(self):
        with torch.device("meta"):
            model = torchvision.models.resnet18()
        resnet_fused.fuse(model)
        with zoo.rewritten():
            assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_in_other_precisions_on_the_cpu(self, dtype):
        model = trained(Net(CHAINS["+="][0])).eval().to(dtype)
        fused = resnet_fused.fuse(copy.deepcopy(model))
        with zoo.rewritten():
            assert torch.equal(fused(X.to(dtype)), model(X.to(dtype)))

    @pytest.mark.parametrize("backend", ["auto", "triton"])
    def test_frozen_bns_in_float32_keep_making_float32_of_half(self, backend):
        model = trained(Net(CHAINS["relu module"][0], FrozenBatchNorm2d)).eval()
        model.conv1.bfloat16()
        fused, x = resnet_fused.fuse(copy.deepcopy(model)), X.bfloat16()
        with resnet_fused.backend(backend), torch.no_grad():
            assert fused(x).dtype == model(x).dtype == torch.float32

    def test_lazy_modules(self):
        self.untouched(nn.Sequential(nn.LazyConv2d(8, 1), nn.BatchNorm2d(8)), ValueError, "0 .LazyConv2d. is not init")

    def test_scripted(self):
        self.untouched(torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))), ValueError, "scripted")

    def test_a_scripted_part_is_left(self):
        part = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval())
        model = nn.Sequential(part, nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval()
        expected = model(X)
        assert report_of(model)[-1].modules == "Conv2d + BatchNorm2d"
        with zoo.rewritten():
            assert torch.equal(model(X), expected)

    @pytest.mark.parametrize("part", [False, True])
    def test_compiled(self, part):
        model = Net(CHAINS["+="][0])
        self.untouched(nn.Sequential(torch.compile(model)) if part else torch.compile(model), ValueError, "is compiled")
        model.compile()
        self.untouched(nn.Sequential(model) if part else model, ValueError, "is compiled: fuse first")

    def test_wrapped_in_data_parallel(self):
        model = trained(Net(CHAINS["+="][0])).eval()
        wrapped = resnet_fused.fuse(nn.DataParallel(copy.deepcopy(model)))
        with zoo.rewritten():
            assert torch.equal(wrapped(X), model(X))
        assert "forward" in vars(wrapped.module)

    def test_parametrized_and_weight_normed(self):
        for change in (normed, normed_as_of_old):
            model = Net(CHAINS["relu module"][0])
            change(model)
            chain = report_of(model)[0]
            assert (chain.modules, chain.why) == ("BatchNorm2d + ReLU", None)

    def test_our_own_models_fuse_themselves(self):
        model = resnet_fused.resnet18()
        report = report_of(model)
        assert not any("forward" in vars(m) for m in model.modules())
        assert all("resnet_fused's own" in c.why for c in report)

    def test_a_forward_on_the_instance_is_left(self):
        model = Net(CHAINS["relu module"][0])
        own = model.forward = lambda x: x
        assert "has a forward set on the instance" in report_of(model)[0].why
        assert resnet_fused.unfuse(model).forward is own

    def test_strict(self):
        model = Net(CHAINS["relu module"][0])
        with pytest.raises(ValueError, match="1 left\n  bn2: BatchNorm2d: no forward that was traced calls it"):
            resnet_fused.fuse(model, strict=True)
        assert "forward" not in vars(model)
        resnet_fused.fuse(torchvision.models.resnet18(), strict=True)

    def test_three_dimensions_raise_as_they_did(self):
        model = Net(CHAINS["relu module"][0]).eval()
        with pytest.raises(ValueError, match="expected 4D input"):
            model(X[0])
        with pytest.raises(ValueError, match="expected 4D input"), resnet_fused.backend("triton"):
            resnet_fused.fuse(model)(X[0])


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
