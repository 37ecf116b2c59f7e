"""Training on the fused kernels, in the interpreter, against plain PyTorch and torchvision."""

import copy
import gc
import threading

import pytest
import torch
import torchvision
from batch_norm_train import BN_CASES, check_case, train
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused
from resnet_fused import explain, ops, testing
from resnet_fused.testing import make_inputs

MODES = [None, "activations", "blocks"]
X = torch.randn(4, 3, 33, 33, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(4)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", BN_CASES, ids=lambda c: c.id)
def test_batch_statistics_within_budget_of_float64(case, dtype):
    check_case(case, dtype, "triton")


def test_large_mean_keeps_five_digits():
    torch.manual_seed(0)
    x = (torch.randn(8, 16, 15, 15) + 1e3).contiguous(memory_format=torch.channels_last)
    with resnet_fused.backend("triton"):
        y = ops.batch_norm_act(x, None, None, None, None, training=True, act="none")
    exact = nn.functional.batch_norm(x.double(), None, None, training=True)
    assert (y - exact).abs().max() <= 5e-4


def test_constant_tiny_and_nan_channels():
    x = torch.randn(4, 4, 6, 6)
    x[:, 0], x[:, 1] = 3.0, 1 + 1e-4 * x[:, 1]
    x[0, 2, 0, 0] = float("nan")
    with resnet_fused.backend("triton"):
        y = ops.batch_norm_act(x, None, None, None, None, training=True, act="none")
    expected = nn.functional.batch_norm(x.double(), None, None, training=True)
    assert y[:, 2].isnan().all() and not y[:, [0, 1, 3]].isnan().any()
    assert y[:, 0].abs().max() < 1e-3
    torch.testing.assert_close(y[:, [1, 3]].double(), expected[:, [1, 3]], rtol=0, atol=2e-3)


def test_one_value_per_channel_raises_as_batch_norm_does():
    with resnet_fused.backend("triton"), pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ops.batch_norm_act(torch.randn(1, 3, 1, 1), None, None, None, None, training=True)


def test_two_runs_give_the_same_bits():
    case = next(c for c in BN_CASES if c.id == "bn-two-bn-join")
    args, kwargs = make_inputs(case, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        with resnet_fused.backend("triton"):
            first, second = (train(case, ops.batch_norm_act, args, kwargs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def twins(name=None, **kwargs):
    """ResNet-18 with one block a stage by default, whose interpreted kernels take half the time."""
    torch.manual_seed(0)
    if name is None:
        theirs = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 8, **kwargs).train()
        ours = resnet_fused.ResNet(resnet_fused.BasicBlock, [1, 1, 1, 1], 8, **kwargs).train()
    else:
        theirs = torchvision.models.get_model(name, num_classes=8, **kwargs).train()
        ours = resnet_fused.get_model(name, num_classes=8, **kwargs).train()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs.to(memory_format=torch.channels_last)


def losses(model, steps=3, step=None, x=X, lr=1e-3):
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    found = []
    for i in range(steps):
        optimizer.zero_grad()
        logits = (model if step is None else step)(x + 0.1 * i)
        loss = nn.functional.cross_entropy(logits, TARGET)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def assert_follows(ours, theirs, rtol=1e-3, **kwargs):
    with resnet_fused.backend("triton"):
        found = losses(ours, **kwargs)
    torch.testing.assert_close(found, losses(theirs, **kwargs), rtol=rtol, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_ten_steps_follow_eager(name):
    ours, theirs = twins(name, zero_init_residual=True)  # else rounding errors grow in a few steps, eager's too
    with resnet_fused.backend("triton"):
        rows = [r for r in explain(ours, X) if "BatchNorm2d" in r.modules]
    assert all(r.ran == ["batch_norm_act: triton"] or "'s pass" in r.ran[0] for r in rows) and not any(
        r.why for r in rows
    )
    assert_follows(ours, theirs, steps=10, lr=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layouts_of_the_images(layout):
    assert_follows(*twins(), x=X.contiguous(memory_format=layout))


def test_gradient_accumulation_and_ema():
    ours, theirs = twins()
    averages = [torch.optim.swa_utils.AveragedModel(m, use_buffers=True) for m in (ours, theirs)]
    for model, average, backend in zip((ours, theirs), averages, ("triton", "eager"), strict=True):
        with resnet_fused.backend(backend):
            optimizer = torch.optim.SGD(model.parameters(), 1e-3)
            for i in range(3):
                for half in (X, X + 0.1 * i):
                    nn.functional.cross_entropy(model(half), TARGET).backward()
                optimizer.step()
                optimizer.zero_grad()
                average.update_parameters(model)
    for (name, p), q in zip(averages[0].state_dict().items(), averages[1].state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3, msg=name)


def test_functional_call_and_gradient_checkpointing():
    ours, theirs = twins()

    def functional(model):
        return lambda x: torch.func.functional_call(model, dict(model.named_parameters()), (x,))

    def checkpointed(model):
        return lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    for wrap in (functional, checkpointed):
        a, b = copy.deepcopy(ours), copy.deepcopy(theirs)
        with resnet_fused.backend("triton"):
            found = losses(a, step=wrap(a))
        torch.testing.assert_close(found, losses(b, step=wrap(b)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_grad_scaler(dtype):
    found = {}
    ours, theirs = twins()
    for model, backend in ((ours, "triton"), (theirs, "eager")):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        found[backend] = []
        for i in range(3):
            optimizer.zero_grad()
            with resnet_fused.backend(backend):
                with torch.autocast("cpu", dtype):
                    loss = nn.functional.cross_entropy(model(X + 0.1 * i), TARGET)
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            found[backend].append(loss.item())
    torch.testing.assert_close(torch.tensor(found["triton"]), torch.tensor(found["eager"]), rtol=3e-2, atol=0)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compile_of_a_train_step(backend):
    ours, theirs = twins()
    torch._dynamo.reset()
    with resnet_fused.backend(backend):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        found = losses(ours, step=compiled)
    torch.testing.assert_close(found, losses(theirs), rtol=1e-3, atol=0)
    assert ours.bn1.num_batches_tracked == 3
    torch.testing.assert_close(ours.bn1.running_var, theirs.bn1.running_var, rtol=1e-4, atol=0)


def gradients(model):
    model.zero_grad()
    nn.functional.cross_entropy(model(X), TARGET).backward()
    return [p.grad.clone() for p in model.parameters()], [b.clone() for b in model.buffers()]


@pytest.mark.parametrize(
    "name, backend, bn",
    [
        ("basic", "eager", dict(momentum=None)),
        ("resnet50", "eager", dict()),
        ("basic", "triton", dict()),
        ("basic", "triton", dict(momentum=None)),
    ],
)
def test_recompute_changes_nothing_but_memory(name, backend, bn):
    torch.manual_seed(0)
    layers = [1, 1, 1, 1] if name == "basic" else [3, 4, 6, 3]
    block = resnet_fused.BasicBlock if name == "basic" else resnet_fused.Bottleneck
    model = resnet_fused.ResNet(block, layers, norm_layer=lambda c: nn.BatchNorm2d(c, **bn)).train()
    found = []
    with resnet_fused.backend(backend):
        for mode in MODES:
            twin = copy.deepcopy(model)
            twin.set_recompute(mode)
            found.append(gradients(twin))
    for other in found[1:]:
        for ours, plain in zip(other, found[0], strict=True):
            for a, b in zip(ours, plain, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * testing.largest(b.float()))


def recomputing(mode, **kwargs):
    torch.manual_seed(0)
    model = resnet_fused.ResNet(resnet_fused.BasicBlock, [1, 1, 1, 1], 8, recompute=mode, **kwargs).train()
    return model


@pytest.mark.parametrize("mode", MODES[1:])
def test_recompute_again_for_a_second_backward_outside_the_backends_block(mode):
    model = recomputing(mode)
    with resnet_fused.backend("triton"):
        loss = model(X[:, :, ::2, ::2]).logsumexp(1).sum()
    first, second = (torch.autograd.grad(loss, model.parameters(), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert model.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("mode", MODES[1:])
def test_recompute_leaves_another_module_behind_the_stem_alone(mode):
    found = []
    for m in (None, mode):
        model = recomputing(m)
        model.maxpool = nn.Dropout(0.5)
        torch.manual_seed(1)
        found.append(torch.autograd.grad(model(X).logsumexp(1).sum(), model.parameters()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_recompute_in_one_thread_leaves_others_alone():
    models = [recomputing(None), recomputing("blocks")]
    ready = threading.Barrier(2)

    def train(model):
        for _ in range(4):
            ready.wait()
            model(X[:, :, ::2, ::2]).sum().backward()

    threads = [threading.Thread(target=train, args=(m,)) for m in models]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [m.bn1.num_batches_tracked.item() for m in models] == [4, 4]
    for a, b in zip(*(m.buffers() for m in models), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_explain_names_every_step_of_a_recomputing_model(mode):
    with resnet_fused.backend("triton"):
        rows = [r for r in explain(recomputing(mode), X) if "BatchNorm2d" in r.modules]
    assert len(rows) == 12 and all(r.ran == ["batch_norm_act: triton"] or "'s pass" in r.ran[0] for r in rows)


def test_recompute_takes_three_values():
    assert resnet_fused.resnet50(recompute="blocks").layer1[0].recompute == "blocks"
    with pytest.raises(ValueError, match='recompute must be None, "activations" or "blocks", got True'):
        resnet_fused.resnet18().set_recompute(True)


class Storages(TorchDispatchMode):
    """Every storage that an operator returns."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.found[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes(), t.numel())
        return result


def kept_bytes(model, x):
    """What is alive after the forward pass because of the autograd graph; weights and their casts do not count."""
    weights = {p.numel() for p in model.parameters() if p.dim() > 1}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    with Storages() as storages, torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().logsumexp(1).sum()
    gc.collect()
    alive = {p: (n, e) for p, (ref, n, e) in storages.found.items() if not ref.expired() and p not in own}
    assert loss.requires_grad
    return sum(n for n, elements in alive.values() if elements not in weights)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_memory_kept_for_backward(backend):
    """As a share of torchvision's, ResNet-50 under bf16 autocast; the bounds are 1.03, 0.83 and 0.35."""
    x = torch.randn(3, 3, 64, 64)  # three images: no activation has the size of a weight
    theirs = kept_bytes(torchvision.models.resnet50().to(memory_format=torch.channels_last), x)
    model = resnet_fused.resnet50()
    for mode, share in zip(MODES, (1.03, 0.83, 0.35), strict=True):
        model.set_recompute(mode)
        with resnet_fused.backend(backend):
            found = kept_bytes(model, x) / theirs
        assert found <= share, f"{mode}: {found:.3f} of torchvision's"
