"""torch.compile, torch.export and autocast go through the operators and give the same numbers."""

import pytest
import torch
import torchvision

import resnet_fused
from resnet_fused.dispatch import registry
from resnet_fused.ops.batch_norm_act import formulas

X = torch.randn(2, 3, 33, 35, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def twins():
    torch.manual_seed(0)
    ours = resnet_fused.ResNet(resnet_fused.BasicBlock, [1, 1, 1, 1]).eval()
    theirs = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_of_the_eval_model(backend, compiler):
    ours, theirs = twins()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    with resnet_fused.backend(backend), torch.no_grad():
        y = torch.compile(ours, fullgraph=True, backend=keep)(X)
        torch.testing.assert_close(y, theirs(X), rtol=0, atol=2e-5)
    calls = sum("resnet_fused." in str(n.target) for n in graphs[0].graph.nodes)
    assert len(graphs) == 1 and calls == (0 if backend == "auto" else 12)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compile_with_gradients(backend):
    ours, theirs = twins()
    with resnet_fused.backend(backend):
        torch.compile(ours, fullgraph=True, backend="aot_eager")(X).logsumexp(1).sum().backward()
    theirs(X).logsumexp(1).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_training_is_left_to_the_compiler_where_nothing_is_forced(backend, monkeypatch):
    """As on a GPU: `auto` tries the fused backends."""
    monkeypatch.setattr(registry, "_AUTO_DEVICES", ("cpu",))
    ours, _ = twins()
    graphs = []
    compiled = torch.compile(ours, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    with resnet_fused.backend(backend):
        compiled.train()(X).sum().backward()
        with torch.no_grad():
            compiled.eval()(X)
        explanation = resnet_fused.explain(compiled.train(), X)
    trained, evaluated = (" ".join(str(n.target) for n in graph.graph.nodes) for graph in graphs)
    assert ("autograd_function_apply" in trained) == (backend == "triton")
    assert evaluated.count("resnet_fused.") == 12
    assert ("left to torch.compile" in explanation.summary) == (backend == "auto")


def test_the_formula_of_the_mask_compiles():
    """SyncBatchNorm's, where no fused backend serves."""
    passes = X > 0
    torch._dynamo.reset()
    compiled = torch.compile(formulas._pack, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(passes), formulas._pack(passes))
    assert torch.equal(formulas._unpack(compiled(passes), X.shape), passes)


def test_a_forced_backend_recompiles():
    ours, _ = twins()
    graphs = []
    compiled = torch.compile(ours, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        auto = compiled(X)
        with resnet_fused.backend("triton"):
            torch.testing.assert_close(compiled(X), auto, rtol=0, atol=2e-5)
        assert torch.equal(compiled(X), auto)
    calls = [sum("resnet_fused." in str(n.target) for n in graph.graph.nodes) for graph in graphs]
    assert calls == [0, 12]


def test_a_backend_is_forced_inside_a_compiled_function():
    graphs = []

    @torch.compile(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    def twice(x):
        with resnet_fused.backend("triton"):
            y = resnet_fused.ops.batch_norm_act(x, *[torch.ones(3)] * 4, training=False)
        return y, resnet_fused.ops.batch_norm_act(x, *[torch.ones(3)] * 4, training=False)

    for outside in ("auto", "eager"):
        with resnet_fused.backend(outside):
            torch.testing.assert_close(*twice(X))
            assert resnet_fused.get_backend() == outside
        assert sum("resnet_fused.batch_norm_act" in str(n.target) for n in graphs.pop().graph.nodes) == 1
    assert resnet_fused.get_backend() == "auto"


def test_a_compiled_model_refuses_for_a_forced_backend():
    compiled = torch.compile(twins()[0].requires_grad_(False), backend="eager")
    compiled.conv1.register_forward_hook(lambda *args: None)
    said = r"^(conv1, )?Conv2d\(3, 64.*has hooks"  # Dynamo of older torch keeps the model's part from naming the module
    with resnet_fused.backend("triton"), pytest.raises(resnet_fused.BackendUnavailable, match=said):
        compiled(X)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_export(backend):
    ours, theirs = twins()
    with resnet_fused.backend(backend), torch.no_grad():
        program = torch.export.export(ours, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        nodes = [n for n in program.graph.nodes if "resnet_fused." in str(n.target)]
        assert len(nodes) == (0 if backend == "auto" else 12)
        larger = torch.cat([X, X + 1])
        torch.testing.assert_close(program.module()(larger), theirs(larger), rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast(backend, grad):
    ours, theirs = twins()
    with resnet_fused.backend(backend), torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(X), theirs(X)
    with torch.no_grad():
        exact = theirs.double()(X.double())
    assert y.dtype == expected.dtype == torch.bfloat16
    error, theirs_error = ((t.double() - exact).abs().max() for t in (y, expected))
    assert error <= 2 * theirs_error + torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_autocast_of_the_operator():
    x, w = torch.randn(2, 8, 6, 6), torch.randn(4, 8, 3, 3)
    v = torch.ones(4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for backend in ("eager", "triton"):
            with resnet_fused.backend(backend):
                y = resnet_fused.ops.conv_bn_act(x, w, v, v, v, v, residual=torch.randn(2, 4, 4, 4))
            assert y.dtype == torch.bfloat16
