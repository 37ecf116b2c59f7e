"""fuse: what it leaves of a model as it was, and what it refuses."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
import zoo
from fused_nets import CHAINS, Net, X, normed, normed_as_of_old, ran, report_of, trained
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import resnet_fused


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
