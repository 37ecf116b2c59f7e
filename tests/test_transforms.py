"""What leaves by tracing or export under `auto` is plain PyTorch, and forward-mode derivatives are eager's."""

import pytest
import torch
from torch.autograd import forward_ad

import resnet_fused
from resnet_fused.dispatch import registry


@pytest.fixture
def model(monkeypatch):
    """`auto` fuses on the CPU, as on a GPU."""
    monkeypatch.setattr(registry, "_AUTO_DEVICES", ("cpu",))
    torch.manual_seed(0)
    return resnet_fused.cifar_resnet20()


X = torch.randn(2, 3, 16, 16)


def eager(model, x=X):
    with resnet_fused.backend("eager"):
        return model(x)


@pytest.mark.parametrize("training", [False, True])
def test_a_traced_model_is_plain_pytorch(model, training):
    with torch.no_grad():
        traced = torch.jit.trace(model.train(training), X, check_trace=False)
        assert not [k for n in traced.inlined_graph.nodes() if (k := n.kind()).startswith("resnet_fused")]
        torch.testing.assert_close(traced(X), eager(model), rtol=0, atol=0)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_is_plain_pytorch(model, strict):
    program = torch.export.export(model.eval(), (X,), strict=strict)
    assert not [n.target for n in program.graph.nodes if "resnet_fused" in str(n.target)]
    torch.testing.assert_close(program.module()(X), eager(model))


@pytest.mark.parametrize("training", [False, True])
def test_forward_mode_derivatives_are_eagers(model, training):
    model.train(training)
    found = []
    for run in (model, lambda x: eager(model, x)):
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(run(forward_ad.make_dual(X, torch.ones_like(X)))).tangent)
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert found[0].any()


def test_a_forced_backend_says_that_it_has_no_forward_derivative(model):
    with resnet_fused.backend("triton"), forward_ad.dual_level():
        with pytest.raises(resnet_fused.BackendUnavailable, match="forward-mode differentiation"):
            model(forward_ad.make_dual(X, torch.ones_like(X)))
