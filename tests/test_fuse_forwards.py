"""fuse: forwards that do more than call modules, and errors of other fusers that nobody is told of."""

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
import zoo
from fused_nets import CHAINS, Net, X, iadd, ran, report_of, same, shared, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

import resnet_fused


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
