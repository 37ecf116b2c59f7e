"""The operators' contracts: numbers, gradients, layouts, registration, errors."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import resnet_fused
from resnet_fused import ops, testing
from resnet_fused.testing import CASES, DTYPES, LAYOUTS, Case, check, make_inputs

SMALL = [case for case in CASES if not case.large]
FUSED = ["triton"]  # what runs without a GPU, in the interpreter
ids = {"ids": lambda v: v.id if isinstance(v, Case) else str(v).removeprefix("torch.")}


@pytest.mark.parametrize("case", SMALL, **ids)
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("backend", ["eager", *FUSED])
def test_within_budget_of_float64(case, dtype, backend):
    with resnet_fused.backend(backend):
        for layout in LAYOUTS:
            check(case, dtype=dtype, layout=layout)


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)),
    inputs=st.sets(st.sampled_from(["residual", "pre_add"])),
    act=st.sampled_from(["relu", "none"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_batch_norm_act_of_any_shape(shape, inputs, act, dtype, seed):
    case = Case("drawn", "batch_norm_act", shape, None, {"training": False, "act": act}, frozenset(inputs))
    with resnet_fused.backend("triton"):
        check(case, dtype=dtype, seed=seed)


def gradients(case, function, args, kwargs, absolute=False):
    """Gradients of a fixed functional of the results for every argument that may have one.

    absolute: the same formula on absolute values, as the budget wants it.
    """
    if absolute:
        args, kwargs = testing.absolute(args, kwargs)
    constants = 2 if case.kernel else 3  # positions from here on: frozen BN vectors, or the statistics
    args, kwargs = testing.map_tensors((args, kwargs), torch.Tensor.detach)
    leaves = [a for a in args[:constants] if a is not None]
    leaves += [kwargs[k] for k in ("residual", "pre_add", "bias") if k in kwargs]
    leaves += [v for v in kwargs.get("residual_bn", ())[:2] if v is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    results = testing.as_tuple(function(*args, **kwargs))
    weights = [torch.randn(r.shape, generator=generator).to(r) for r in results]
    loss = sum((r * (w.abs() if absolute else w)).sum() for r, w in zip(results, weights, strict=True))
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("case", [c for c in SMALL if c.id != "bn-large-mean"], **ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **ids)
def test_gradients_within_budget_of_float64(case, dtype):
    args, kwargs = make_inputs(case, dtype=dtype)
    reference = testing.REFERENCES[case.op]
    double = testing.map_tensors((args, kwargs), torch.Tensor.double)
    oracles, magnitudes = gradients(case, reference, *double), gradients(case, reference, *double, absolute=True)
    plains = gradients(case, reference, args, kwargs)
    with resnet_fused.backend("triton"):
        fused = gradients(case, testing.OPS[case.op], args, kwargs)
    for i, (g, oracle, plain, magnitude) in enumerate(zip(fused, oracles, plains, magnitudes, strict=True)):
        assert g.dtype == plain.dtype and g.shape == plain.shape
        budget = 2 * testing.largest(plain.double() - oracle) + torch.finfo(dtype).eps / 2 * testing.largest(oracle)
        error, budget = testing.largest(g.double() - oracle), budget + 2**-24 * testing.largest(magnitude)
        assert error <= budget, f"{case.id}: gradient {i} is off by {error:.3g}, the budget is {budget:.3g}"


def test_gradcheck_of_the_reference():
    for case in SMALL:
        if case.id in ("bn-pre-add-join", "bn-10-channels", "bn-two-bn-join-none", "conv-3x3-join", "conv-bias"):
            kernel = case.kernel and (3, *case.kernel[1:])
            small = Case("small", case.op, (1, 4, 3, 2), kernel, case.options, case.inputs)
            args, kwargs = make_inputs(small, dtype=torch.float64)
            torch.manual_seed(0)
            args, kwargs = testing.map_tensors((args, kwargs), lambda t: t.double().requires_grad_())
            for bn in (args[-4:], kwargs.get("residual_bn", ())):
                for statistic in bn[2:]:
                    statistic.requires_grad_(False)
            leaves = [t for t in flat(args, kwargs) if t.requires_grad]
            assert torch.autograd.gradcheck(
                lambda *_, c=case, a=args, k=kwargs: testing.REFERENCES[c.op](*a, **k), leaves
            )


def hessian_vector_product(function, case, dtype, training=True):
    """Gradients of the sum of all first gradients' products with themselves, of every leaf: x's and the vectors'."""
    args, kwargs = make_inputs(case, dtype=torch.float32)
    args, kwargs = testing.map_tensors((args, kwargs), lambda t: t.to(dtype).requires_grad_())
    if case.op == "batch_norm_act":
        kwargs["training"] = training
    fixed = (args[-4:], kwargs.get("residual_bn", ()))
    for i, bn in enumerate(fixed):
        for v in bn if case.kernel and i == 0 else bn[2:]:
            if v is not None:
                v.requires_grad_(False)
    leaves = [t for t in flat(args, kwargs) if t.requires_grad]
    loss = sum(y.double().square().sum() for y in testing.as_tuple(function(*args, **kwargs)))
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    return torch.autograd.grad(sum(g.double().square().sum() for g in first), leaves, allow_unused=True)


SECOND_DERIVATIVES = [
    pytest.param(c, training, id=f"{c.id}-{'training' if training else 'eval'}")
    for c in SMALL
    if c.mean < 10 and 0 not in c.shape
    for training in ((True, False) if c.op == "batch_norm_act" else (False,))
    if not training or c.shape[0] * c.shape[2] * c.shape[3] > 1
]


@pytest.mark.parametrize(("case", "training"), SECOND_DERIVATIVES)
def test_second_derivatives_are_those_of_the_formula(case, training):
    oracle = hessian_vector_product(testing.REFERENCES[case.op], case, torch.float64, training)
    eager = hessian_vector_product(testing.REFERENCES[case.op], case, torch.float32, training)
    with resnet_fused.backend("triton"):
        fused = hessian_vector_product(testing.OPS[case.op], case, torch.float32, training)
    for theirs, ours, exact in zip(eager, fused, oracle, strict=True):
        if exact is None:
            assert ours is None or not ours.any()
            continue
        limit = 4 * (theirs - exact).abs().max() + 1e-5 * exact.abs().max()
        assert (ours - exact).abs().max() <= limit, (ours - exact).abs().max() / exact.abs().max()


@pytest.mark.parametrize("training", [True, False])
def test_a_models_hessian_vector_product_and_gradient_penalty_are_eagers(training):
    """Also where only parameters are asked for: autograd leaves out what does not lead to them."""

    def norms(backend, dtype=torch.float32):
        torch.manual_seed(0)
        model = resnet_fused.cifar_resnet20().to(dtype).train(training)
        x = torch.randn(4, 3, 16, 16).to(dtype).requires_grad_()
        frozen = () if training else (torch.nn.BatchNorm2d,)  # fused only so
        for m in model.modules():
            if isinstance(m, frozen):
                m.requires_grad_(False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        with resnet_fused.backend(backend):
            gradients = torch.autograd.grad(F.log_softmax(model(x), 1)[:, 0].sum(), parameters, create_graph=True)
            product = torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters)
            (dx,) = torch.autograd.grad(F.log_softmax(model(x), 1)[:, 0].sum(), x, create_graph=True)
            penalty = torch.autograd.grad(dx.norm(), parameters, allow_unused=True)
        return torch.stack(
            [torch.cat([g.double().flatten() for g in gs if g is not None]) for gs in (product, penalty)]
        )

    exact, eager = norms("eager", torch.float64), norms("eager")
    error = (norms("triton") - exact).norm(dim=1)
    assert (error <= 4 * (eager - exact).norm(dim=1) + 1e-6 * exact.norm(dim=1)).all(), error / exact.norm(dim=1)


@pytest.mark.parametrize("case", SMALL, **ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(case, layout):
    name = {"batch_norm_act": "batch_norm_act_apply"}.get(case.op, case.op)
    op = getattr(torch.ops.resnet_fused, name).default
    with resnet_fused.backend("triton"):
        torch.library.opcheck(op, testing.fields(case, *make_inputs(case, dtype=torch.float32, layout=layout)))


TRAINED = [c for c in SMALL if c.op == "batch_norm_act" and c.id != "bn-empty"]
JOINS = [c for c in TRAINED if c.id in ("bn-join", "bn-two-bn-join", "bn-pre-add-join")]
ORDERS = ["NCHW", "CNHW", "NWHC", "HWNC", "WCNH"]


def in_order(t, order):
    """The same tensor, dense in memory in that order of dimensions."""
    if not isinstance(t, torch.Tensor) or t.dim() != 4:
        return t
    dims = ["NCHW".index(d) for d in order]
    return t.permute(dims).contiguous().permute([dims.index(d) for d in range(4)])


@pytest.mark.parametrize(
    "case, order",
    [(c, "NHWC") for c in TRAINED] + [(c, o) for c in JOINS for o in ORDERS],
    ids=lambda p: getattr(p, "id", p),
)
def test_opcheck_of_the_training_operators(case, order):
    from resnet_fused.ops.batch_norm_act import calls as steps

    args, kwargs = testing.map_tensors(make_inputs(case, dtype=torch.float32), lambda t: in_order(t, order))
    x, weight, bias, mean, var = args
    residual, bn2, pre_add = kwargs.get("residual"), kwargs.get("residual_bn", (None,) * 4), kwargs.get("pre_add")
    relu = kwargs.get("act", "relu") == "relu"
    mask = relu and residual is not None and bn2[2] is None
    count, sums = torch.tensor(float(x.numel() // x.shape[1])), torch.ones(x.shape[1])
    with resnet_fused.backend("triton"):
        torch.library.opcheck(steps.statistics, (x, pre_add))
        torch.library.opcheck(steps.apply, (*args, 1e-5, residual, *bn2, pre_add, relu, mask))
        bits = steps.apply(*args, 1e-5, residual, *bn2, pre_add, relu, mask)[1] if mask else None
        kept = None if bn2[2] is None else residual
        common = (x + 1, *args, 1e-5, kept, *bn2, bits, relu)
        torch.library.opcheck(steps.backward_sums, common)
        rhat = None if bn2[2] is None else sums
        torch.library.opcheck(steps.backward_dx, (*common, sums, sums, rhat, count, None, True, residual is not None))


@pytest.mark.parametrize("case", SMALL, **ids)
def test_inputs_are_left_alone_and_layout_is_kept(case):
    for backend in ("eager", *FUSED):
        args, kwargs = make_inputs(case, dtype=torch.float32, layout="contiguous")
        before = testing.map_tensors((args, kwargs), torch.Tensor.clone)
        with resnet_fused.backend(backend):
            y = testing.as_tuple(testing.OPS[case.op](*args, **kwargs))[0]
        for now, then in zip(flat(args, kwargs), flat(*before), strict=True):
            assert torch.equal(now, then)
        if backend == "eager" and case.kernel is None:
            assert y.is_contiguous()
        if backend != "eager":
            assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", FUSED)
def test_strided_bn_vectors(backend):
    for case in (c for c in SMALL if c.id in ("bn-two-bn-join", "conv-3x3-join")):
        args, kwargs = make_inputs(case, dtype=torch.float32)
        spread = [torch.stack([v, v + 7], 1)[:, 0] for v in args[-4:]]
        with resnet_fused.backend(backend), torch.no_grad():
            expected = testing.OPS[case.op](*args, **kwargs)
            assert torch.equal(testing.OPS[case.op](*args[:-4], *spread, **kwargs), expected)


def flat(args, kwargs):
    found = []
    testing.map_tensors((args, kwargs), found.append)
    return found


@pytest.mark.parametrize("backend", ["eager", *FUSED])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_propagate_as_in_eager(backend, value):
    for case in SMALL:
        args, kwargs = make_inputs(case, dtype=torch.float32)
        if args[0].numel():
            args[0][-1, 0, 0, 0] = value
            with resnet_fused.backend(backend):
                results = testing.as_tuple(testing.OPS[case.op](*args, **kwargs))
            expected = testing.as_tuple(testing.REFERENCES[case.op](*args, **kwargs))
            for r, e in zip(results, expected, strict=True):
                assert torch.equal(r.isnan(), e.isnan()) and torch.equal(r.isposinf(), e.isposinf()), case.id


def test_two_runs_give_the_same_bits():
    for case in SMALL:
        args, kwargs = make_inputs(case, dtype=torch.bfloat16)
        with resnet_fused.backend("triton"):
            first, second = (testing.as_tuple(testing.OPS[case.op](*args, **kwargs)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_training_is_batch_norms():
    for kwargs in (dict(), dict(momentum=0.3), dict(act="none")):
        case = next(c for c in SMALL if c.id == "bn-two-bn-join")
        (x, w, b, mean, var), inputs = make_inputs(case, dtype=torch.float32)
        r, (w2, b2, mean2, var2) = inputs["residual"], inputs["residual_bn"]
        stats = [t.clone() for t in (mean, var, mean2, var2)]
        momentum = kwargs.get("momentum", 0.1)
        y = ops.batch_norm_act(
            x, w, b, mean, var, residual=r, residual_bn=(w2, b2, mean2, var2), training=True, **kwargs
        )
        expected = F.batch_norm(x, *stats[:2], w, b, True, momentum)
        expected = expected + F.batch_norm(r, *stats[2:], w2, b2, True, momentum)
        assert torch.equal(y, expected if kwargs.get("act") == "none" else expected.relu())
        assert all(torch.equal(a, b) for a, b in zip((mean, var, mean2, var2), stats, strict=True))


def test_one_value_per_channel_is_no_statistic():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.batch_norm_act(torch.randn(1, 3, 1, 1), None, None, None, None, training=True)


X, V = torch.randn(2, 4, 5, 5), torch.ones(4)
W = torch.randn(6, 4, 3, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.batch_norm_act(X[0], V, V, V, V), r"x must have 4 dimensions .* got shape \(4, 5, 5\)"),
        (lambda: ops.batch_norm_act(X.long(), V, V, V, V), "x must be of a floating-point dtype, got torch.int64"),
        (lambda: ops.batch_norm_act(X, V[:3], V, V, V), r"weight must have shape \(4,\).*got \(3,\)"),
        (lambda: ops.batch_norm_act(X, V, V, V, None), "given together, got running_mean and running_var=None"),
        (lambda: ops.batch_norm_act(X, V, V, V, V, act="gelu"), 'act must be "relu" or "none", got \'gelu\''),
        (lambda: ops.batch_norm_act(X, V, V, V, V, residual=X[:1]), r"residual must have shape \(2, 4, 5, 5\)"),
        (lambda: ops.batch_norm_act(X, V, V, V, V, pre_add=X.double()), "pre_add must have .* torch.float32"),
        (lambda: ops.batch_norm_act(X, V, V, V, V, residual_bn=(V, V, V, V)), "residual_bn needs a residual"),
        (lambda: ops.batch_norm_act(X, V, V, V, V, residual=X, residual_bn=(V, V, V)), "residual_bn must be .*, got 3"),
        (
            lambda: ops.batch_norm_act(X, V, V, V, V, residual=X, residual_bn=(V,) * 5, training=False),
            r"residual_bn must be the four of \(weight, bias, running_mean, running_var\), got 5",
        ),
        (lambda: ops.batch_norm_act(X, V, V, V, V, residual=X, residual_bn=0.1), "residual_bn must be .*, got float"),
        (
            lambda: ops.batch_norm_act(X, V, V, V, V, residual=X, residual_bn=(V, V, V[:2], V)),
            r"residual_bn's running_mean must have shape \(4,\)",
        ),
        (lambda: ops.conv_bn_act(X, W[:, :3], V, V, V, V), r"weight must have shape .*got \(6, 3, 3, 3\)"),
        (lambda: ops.conv_bn_act(X, W, V, V, V, V), r"bn_weight must have shape \(6,\)"),
        (lambda: ops.conv_bn_act(X, W, *[None] * 4, stride=0), "stride must be .* at least 1, got 0"),
        (lambda: ops.conv_bn_act(X, W, *[None] * 4, padding=(1, 1, 1)), "padding must be .* a pair"),
        (lambda: ops.conv_bn_act(X, W, *[None] * 4, residual=X), r"residual must have shape \(2, 6, 3, 3\)"),
        (lambda: ops.conv_bn_act(X, W, torch.ones(6), None, None, None), "running_mean and running_var must be given"),
        (lambda: ops.conv_bn_act(X, W, *[None] * 4, groups=3), "divisible by groups=3"),
        (lambda: ops.conv_bn_act(X, W, *[None] * 4, groups=0), "groups must be an integer of at least 1, got 0"),
        (lambda: ops.conv_bn_act(X, W, *[None] * 4, stride=(1.5, 1)), r"stride must be .* integers.* got \(1.5, 1\)"),
    ],
)
def test_errors_name_the_argument_and_what_is_accepted(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("backend", ["eager", *FUSED])
def test_a_kernel_larger_than_the_image_is_an_error_that_later_calls_survive(backend):
    small, weight = torch.randn(1, 4, 2, 3), torch.randn(6, 4, 3, 2)
    with resnet_fused.backend(backend), torch.no_grad():
        with pytest.raises(ValueError, match=r"kernel \(3, 2\) .* \(2, 3\) pixels .* must be \(3, 2\) pixels or more"):
            ops.conv_bn_act(small, weight, *[None] * 4)
        assert ops.conv_bn_act(small, weight, *[None] * 4, padding=(1, 0)).shape == (1, 6, 2, 2)
        assert ops.conv_bn_act(X, weight, *[None] * 4).shape == (2, 6, 3, 4)


def test_integers_of_any_kind():
    two = np.int64(2)
    y = ops.conv_bn_act(X, W[:, :2], *[None] * 4, stride=two, padding=(two, 1), groups=two)
    assert torch.equal(y, F.conv2d(X, W[:, :2], None, 2, (2, 1), groups=2).relu())


def leaves_of(case):
    args, kwargs = make_inputs(case, dtype=torch.float32)
    args = tuple(a.requires_grad_() if i < (1 if case.op == "conv_bn_act" else 3) else a for i, a in enumerate(args))
    return args, kwargs


@pytest.mark.parametrize("id", ["bn-relu", "bn-join", "bn-two-bn-join", "bn-pre-add", "conv-3x3-join"])
@pytest.mark.parametrize("training", [True, False])
def test_batched_gradients_are_those_of_one_by_one(id, training):
    case = next(c for c in CASES if c.id == id)
    args, kwargs = leaves_of(case)
    kwargs |= {"training": training} if case.op == "batch_norm_act" else {}
    leaves = [a for a in args if a.requires_grad]
    with resnet_fused.backend("triton"):
        y = testing.as_tuple(testing.OPS[case.op](*args, **kwargs))[0]
        dy = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(0))
        together = torch.autograd.grad(y, leaves, dy, is_grads_batched=True, retain_graph=True)
        one_by_one = [torch.autograd.grad(y, leaves, d, retain_graph=True) for d in dy]
    for batch, *singles in zip(together, *one_by_one, strict=True):
        torch.testing.assert_close(batch, torch.stack(singles), rtol=1e-4, atol=1e-4 * batch.abs().max().item())


def test_saved_tensors_may_come_back_in_another_layout():
    """save_on_cpu gives back NCHW copies: the backward plan of the steps before does not read those."""
    case = next(c for c in CASES if c.id == "bn-two-bn-join")

    def gradients(*contexts):
        args, kwargs = leaves_of(case)
        kwargs["residual"].requires_grad_()
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            y = testing.OPS[case.op](*args, **kwargs)
        return torch.autograd.grad(y.square().sum(), [*args[:3], kwargs["residual"]])

    nchw = torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t)
    with resnet_fused.backend("triton"):
        expected = [gradients() for _ in range(3)][-1]
        torch.testing.assert_close(gradients(nchw), expected)


class Traffic(TorchDispatchMode):
    """Bytes that PyTorch's operators read and write, views left out."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **kwargs or {})
        tensors = tree_leaves((args, kwargs, results))
        if not func.is_view and "empty" not in func.name():
            unique = {id(t): t for t in tensors if isinstance(t, torch.Tensor)}
            self.bytes += sum(t.numel() * t.element_size() for t in unique.values())
        return results


def test_a_frozen_bns_backward_moves_no_more_than_torchvisions():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 16, 16, 16).bfloat16(), torch.randn(16, 16, 1, 1).bfloat16()
    bn = [torch.rand(16) + 0.5 for _ in range(4)]

    def ours(x, weight):
        return ops.conv_bn_act(x, weight, *bn)

    def theirs(x, weight):
        scale = bn[0] * (bn[3] + 1e-5).rsqrt()
        y = F.conv2d(x, weight) * scale[:, None, None] + (bn[1] - bn[2] * scale)[:, None, None]
        return F.relu(y.bfloat16())

    found = []
    for function in (ours, theirs):
        leaves = [t.clone().contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, weight)]
        with resnet_fused.backend("triton"):
            y = function(*leaves)
        dy = torch.ones_like(y)
        with Traffic() as traffic:
            gradients = torch.autograd.grad(y, leaves, dy)
        found.append((traffic.bytes, *gradients))
    assert found[0][0] <= found[1][0]
    for mine, their in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(mine, their, rtol=2e-2, atol=2e-2 * their.abs().max().item())
