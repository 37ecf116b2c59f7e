"""The onednn backend: numbers, and a folded copy of the weights that is never stale."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchvision
from torch import nn

import resnet_fused
from resnet_fused import BackendUnavailable, ops, testing
from resnet_fused.backends.onednn import conv_bn_act as onednn
from resnet_fused.testing import CASES, DTYPES, LAYOUTS, Case, check, make_inputs

CONVS = [case for case in CASES if case.op == "conv_bn_act" and not case.large]
JOIN = next(case for case in CONVS if case.id == "conv-3x3-join")
SERVED = [dtype for dtype in DTYPES if onednn.dtype_unsupported(dtype) is None]
X = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(0))
ids = {"ids": lambda v: v.id if isinstance(v, Case) else str(v).removeprefix("torch.")}


@pytest.fixture(autouse=True)
def _onednn_without_gradients():
    resnet_fused.set_backend("onednn")
    with torch.no_grad():
        yield


@pytest.fixture
def folds(monkeypatch):
    """A list that grows by one whenever BN is folded."""
    calls, fold = [], onednn._fold
    monkeypatch.setattr(onednn, "_fold", lambda *args: calls.append(args) or fold(*args))
    return calls


def eager(function, *args, **kwargs):
    with resnet_fused.backend("eager"):
        return function(*args, **kwargs)


def trained(name="resnet18", dtype=torch.float32, seed=0):
    """A model whose running statistics are those of its inputs, as after training, in eval mode."""
    torch.manual_seed(seed)
    model = resnet_fused.get_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    eager(model, torch.randn(8, 3, 64, 64))
    return model.eval().to(dtype)


@pytest.mark.parametrize("case", CONVS, **ids)
@pytest.mark.parametrize("dtype", SERVED, **ids)
def test_within_budget_of_float64(case, dtype):
    for layout in LAYOUTS:
        check(case, dtype=dtype, layout=layout)


@pytest.mark.parametrize("case", [c for c in CONVS if c.id.endswith(("1x1-join", "3x3", "3x3-s2", "7x7-s2"))], **ids)
@pytest.mark.parametrize("dtype", SERVED, **ids)
def test_within_budget_far_from_zero(case, dtype):
    """After ReLU x is positive: the roundings of a folded weight add up where its filter has a mean."""
    (x, weight, *affine, _, _), kwargs = make_inputs(case, dtype=dtype)
    conv_args = {k: v for k, v in kwargs.items() if k in ("stride", "padding")}
    for sums_to in (1, 10, 100):
        positive, filters = x.relu(), (weight.float() + sums_to / weight[0].numel()).to(dtype)
        z = nn.functional.conv2d(positive.float(), filters.float(), **conv_args)
        args = positive, filters, *affine, z.mean((0, 2, 3)), z.var((0, 2, 3))
        testing.assert_within_budget(case, (ops.conv_bn_act(*args, **kwargs),), args, kwargs)


@pytest.mark.parametrize("dtype", SERVED, **ids)
@pytest.mark.parametrize("case", CONVS, **ids)
def test_nan_and_infinity_go_where_eager_sends_them(case, dtype):
    args, kwargs = make_inputs(case, dtype=dtype)
    images = [args[0], *[kwargs[k] for k in ("residual",) if k in kwargs]]
    for i, t in enumerate(images):
        if t.numel():
            t[0, 0, 0, 0] = (float("nan"), float("inf"))[i]
            t[-1, -1, -1, -1] = (float("inf"), float("nan"))[i]
    y, expected = ops.conv_bn_act(*args, **kwargs), eager(ops.conv_bn_act, *args, **kwargs)
    assert y.isnan().equal(expected.isnan()) and y.isinf().equal(expected.isinf())
    assert y.isnan().any() or not y.numel()


@pytest.mark.parametrize("dtype", SERVED, **ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_keep_their_bits(layout, dtype):
    for case in CONVS:
        inputs = make_inputs(case, dtype=dtype, layout=layout)
        before = copy.deepcopy(inputs)
        for _ in range(2):
            y = ops.conv_bn_act(*inputs[0], **inputs[1])
        testing.map_tensors(inputs, lambda t, y=y: assert_apart(t, y))
        for t, kept in zip(tensors(inputs), tensors(before), strict=True):
            assert t.nan_to_num(7).equal(kept.nan_to_num(7)), case.id
        assert y.is_contiguous(memory_format=torch.channels_last), case.id


def tensors(inputs):
    found = []
    testing.map_tensors(inputs, found.append)
    return found


def assert_apart(t, y):
    assert not y.numel() or t.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
@pytest.mark.parametrize("dtype", SERVED, **ids)
def test_models_against_torchvisions(name, dtype):
    ours = trained(name, dtype)
    theirs = torchvision.models.get_model(name).eval().to(dtype, memory_format=torch.channels_last)
    theirs.load_state_dict(ours.state_dict())
    x = X.to(dtype)
    y, plain, oracle = ours(x), theirs(x), theirs.double()(x.double())
    budget = 2 * testing.largest(plain.double() - oracle) + torch.finfo(dtype).eps * testing.largest(oracle)
    assert testing.largest(y.double() - oracle) <= budget
    ran = resnet_fused.explain(ours, x)
    assert {r for row in ran for r in row.ran} == {"conv_bn_act: onednn", "PyTorch"}


EDITS = {  # a variance stays one
    "in place": lambda t: t.mul_(1.5),
    "through .data": lambda t: t.data.mul_(1.5),
    "permuted through .data": lambda t: t.data.copy_(t.flatten().flip(0).reshape(t.shape)),
    "one value through .data": lambda t: t.data.view(-1)[-1:].add_(5),
    "through numpy": lambda t: t.numpy().__imul__(2),
    "through a view": lambda t: t.detach().view(-1)[:3].add_(4),
    ".data replaced": lambda t: setattr(t, "data", t.data * 2),
    ".data replaced, strided": lambda t: setattr(t, "data", torch.stack([t.data * 2] * 2, -1)[..., 0]),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference tensors"])
def test_no_edit_is_missed(edit, inference):
    case = Case("edited", "conv_bn_act", (2, 16, 7, 5), (16, 3, 3), {"act": "none", "padding": 1}, frozenset({"bias"}))
    with torch.inference_mode(inference):
        (x, *operands), kwargs = make_inputs(case, dtype=torch.float32)
        operands[0] = operands[0].contiguous()
        for i, t in enumerate([*operands, kwargs["bias"]]):
            before = ops.conv_bn_act(x, *operands, **kwargs)
            edit(t)
            after = ops.conv_bn_act(x, *operands, **kwargs)
            assert not after.equal(before), f"operand {i}"
            testing.assert_within_budget(case, (after,), (x, *operands), kwargs)


def assert_fresh(model, stale=None):
    """The model computes what eager does from its present values, and not what it did before."""
    y = model(X)
    torch.testing.assert_close(y, eager(model, X), rtol=1e-4, atol=1e-4)
    assert stale is None or not torch.allclose(y, stale, rtol=1e-3, atol=1e-3)
    return y


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_is_seen(assign):
    model, other = trained(), trained(seed=1)
    y = assert_fresh(model)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    torch.testing.assert_close(assert_fresh(model, y), other(X))


def test_an_ema_swap_is_seen():
    model = trained()
    average = [p.clone() for p in trained(seed=1).parameters()]
    y = assert_fresh(model)
    for _ in range(2):
        for p, a in zip(model.parameters(), average, strict=True):
            p.data, a.data = a.data, p.data
        last = assert_fresh(model)
    torch.testing.assert_close(last, y, rtol=0, atol=0)


def test_eval_train_eval_is_seen():
    model = trained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    y = assert_fresh(model)
    model.train()
    with torch.enable_grad():
        eager(model, X).logsumexp(1).sum().backward()
    optimizer.step()
    model.eval()
    y = assert_fresh(model, y)
    model.train()
    eager(model, 3 * X)  # moves the running statistics alone
    model.eval()
    assert_fresh(model, y)


def test_a_deepcopy_is_a_model_of_its_own():
    model = trained()
    y = model(X)
    twin = copy.deepcopy(model)
    assert twin(X).equal(y)
    for p in twin.parameters():
        p.data.mul_(0.5)
    assert_fresh(twin, y)
    assert model(X).equal(y)


def test_a_change_of_dtype_is_seen():
    model = trained()
    y = model(X)
    for dtype in SERVED:
        model.to(dtype)
        torch.testing.assert_close(model(X.to(dtype)).float(), y, rtol=0, atol=0.05 * testing.largest(y))
    assert_fresh(model.float())


def test_bn_is_folded_once_and_the_copy_dies_with_the_model(folds):
    gc.collect()
    before = len(onednn._cache)
    model = trained()
    model(X), model(X), copy.deepcopy(model)
    assert len(folds) == 20 and len(onednn._cache) == before + 20
    with torch.inference_mode():
        model(X)
    assert len(folds) == 20
    model.layer1[0].bn1.bias.data += 1
    model(X)
    assert len(folds) == 21
    del model
    folds.clear()
    gc.collect()
    assert len(onednn._cache) == before


@pytest.mark.skipif(torch.bfloat16 not in SERVED, reason="oneDNN has no bfloat16 on this CPU")
def test_autocast_does_not_fold_in_every_call(folds):
    model = trained()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(X), model(X)
    assert len(folds) == 20


def test_copies_for_other_shapes_are_bounded(folds):
    (x, *operands), kwargs = make_inputs(JOIN, dtype=torch.float32)
    x, residual = (t[:1].expand(7, -1, -1, -1) for t in (x, kwargs.pop("residual")))
    for n in [*range(1, 8), *range(7, 3, -1)]:
        y = ops.conv_bn_act(x[:n], *operands, residual=residual[:n], **kwargs)
        torch.testing.assert_close(y[-1], y[0])
    assert len(folds) == 7
    assert len(onednn._cache[operands[-1]].packed) == onednn.SHAPES == 4


def test_one_weight_under_two_bns():
    (x, *operands), kwargs = make_inputs(JOIN, dtype=torch.float32)
    others = [operands[0], *(v + 1 for v in operands[1:])]
    for _ in range(2):
        for arguments in (operands, others):
            result = ops.conv_bn_act(x, *arguments, **kwargs)
            testing.assert_within_budget(JOIN, (result,), (x, *arguments), kwargs)


def test_one_bn_behind_two_convolutions():
    (x, *operands), kwargs = make_inputs(JOIN, dtype=torch.float32)
    for _ in range(2):
        for weight, padding, dilation in ((operands[0], 1, 1), (operands[0], 2, 2), (operands[0].neg(), 1, 1)):
            settings = kwargs | {"padding": padding, "dilation": dilation}
            result = ops.conv_bn_act(x, weight, *operands[1:], **settings)
            testing.assert_within_budget(JOIN, (result,), (x, weight, *operands[1:]), settings)


def test_threads_share_a_model():
    model = trained()
    images = [X[:1], X, X.repeat(2, 1, 1, 1)]
    expected = [eager(model, x) for x in images]
    with ThreadPoolExecutor(6) as pool:
        for y, e in zip(pool.map(_forward, [model] * 12, images * 4), expected * 4, strict=True):
            torch.testing.assert_close(y, e, rtol=1e-4, atol=1e-4)


def _forward(model, x):
    with torch.no_grad():
        return model(x)


def test_compile_and_export_keep_the_operator():
    model = trained()
    y = eager(model, X)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), y, rtol=1e-4, atol=1e-4)
    model.conv1.weight.data.neg_()
    torch.testing.assert_close(compiled(X), eager(model, X), rtol=1e-4, atol=1e-4)
    program = torch.export.export(model, (X,))
    assert sum("resnet_fused.conv_bn_act" in str(n.target) for n in program.graph.nodes) == 20
    torch.testing.assert_close(program.module()(X), eager(model, X), rtol=1e-4, atol=1e-4)


def test_opcheck():
    for case in (JOIN, next(c for c in CONVS if c.id == "conv-3x3-g4-s2")):
        (x, weight, *bn), kwargs = make_inputs(case, dtype=torch.float32)
        pairs = [[kwargs.get(k, d)] * 2 for k, d in (("stride", 1), ("padding", 0), ("dilation", 1))]
        args = (x, weight, None, *bn, 1e-5, *pairs, kwargs.get("groups", 1), kwargs.get("residual"), True)
        torch.library.opcheck(torch.ops.resnet_fused.conv_bn_act.default, args)


@pytest.mark.parametrize("i", range(4))
def test_gradients_are_refused(i):
    args, kwargs = make_inputs(JOIN, dtype=torch.float32)
    args[i].requires_grad_()
    with torch.enable_grad(), pytest.raises(BackendUnavailable, match="conv_bn_act: .*'onednn'.*torch.no_grad()"):
        ops.conv_bn_act(*args, **kwargs)


def test_training_is_refused():
    with torch.enable_grad(), pytest.raises(BackendUnavailable, match="'onednn'"):
        resnet_fused.resnet18().train()(X)


@pytest.mark.parametrize("dtype", [d for d in (*DTYPES, torch.float64) if d not in SERVED], **ids)
def test_dtypes_that_are_refused(dtype):
    args, kwargs = make_inputs(JOIN, dtype=dtype)
    with pytest.raises(BackendUnavailable, match=f"conv_bn_act: .*'onednn'.*{dtype}"):
        ops.conv_bn_act(*args, **kwargs)


def test_auto_stays_eager_on_the_cpu():
    resnet_fused.set_backend("auto")
    args, kwargs = make_inputs(JOIN, dtype=torch.float32)
    assert ops.conv_bn_act(*args, **kwargs).equal(eager(ops.conv_bn_act, *args, **kwargs))
