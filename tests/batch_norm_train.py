"""Training cases of batch_norm_act and what they are held against, for every backend."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import resnet_fused
from resnet_fused import ops, testing
from resnet_fused.testing import CASES, Case, largest, make_inputs

EPS = 1e-5
SHAPES = [(5, 1, 4, 3), (2, 3, 33, 31), (3, 10, 7, 5), (2, 48, 7, 5), (2, 64, 15, 13), (2, 2048, 1, 1), (1, 16, 1, 2)]
KINDS = ["bn", "join", "join-recomputed", "two-bn-join", "pre-add"]
BN_CASES = [c for c in CASES if c.op == "batch_norm_act" and not c.large and c.id not in ("bn-empty", "bn-1-pixel")]


@dataclass(frozen=True)
class Setup:
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    kind: str = "bn"  # of KINDS
    relu: bool = True
    frozen: bool = False  # given statistics
    affine: bool = True
    mean: float = 0.5


def draw(setup: Setup, seed: int = 0) -> SimpleNamespace:
    """x, dy, BN vectors, and what the kind asks for; dy is 0 where the sign under the ReLU is in doubt."""
    generator = torch.Generator().manual_seed(seed)
    C = setup.shape[1]

    def image(mean=0.0):
        t = torch.randn(setup.shape, generator=generator) + mean
        return t.to(setup.dtype).contiguous(memory_format=torch.channels_last)

    def bn(mean):
        weight, bias, shift, spread = torch.randn((4, C), generator=generator)
        affine = (1 + weight / 4, bias) if setup.affine else (None, None)
        return (*affine, mean + shift / 4, 1 + spread.tanh() / 2)

    i = SimpleNamespace(x=image(setup.mean), dy=image(), residual=None, pre_add=None, dtotal=None)
    i.bn, i.bn2 = bn(setup.mean), (None,) * 4
    if "join" in setup.kind:
        i.residual = image()
        i.bn2 = bn(0.0) if setup.kind == "two-bn-join" else i.bn2
    if setup.kind == "pre-add":
        i.pre_add, i.dtotal = image(), image()
    if setup.relu:
        doubtful = formula(setup, i, torch.float64, relu=False)["y"].abs() < 0.05
        i.dy[doubtful] = 0
    return i


def formula(
    setup: Setup, i: SimpleNamespace, dtype: torch.dtype | None, relu: bool | None = None
) -> dict[str, torch.Tensor]:
    """PyTorch's results and gradients: in float64, or in the inputs' own types where dtype is None."""
    relu = setup.relu if relu is None else relu
    leaf = lambda t: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()  # noqa: E731
    x, residual, weight, bias, weight2, bias2 = map(leaf, (i.x, i.residual, *i.bn[:2], *i.bn2[:2]))
    mean, var, mean2, var2 = (None if t is None else t.to(dtype or t.dtype) for t in (*i.bn[2:], *i.bn2[2:]))
    z = x if i.pre_add is None else (x + i.pre_add).to(setup.dtype).to(dtype or setup.dtype)  # the sum is rounded
    y = F.batch_norm(z, mean.clone(), var.clone(), weight, bias, not setup.frozen, 0.1, EPS)
    if residual is not None:
        r = residual
        if mean2 is not None:
            r = F.batch_norm(r, mean2.clone(), var2.clone(), weight2, bias2, not setup.frozen, 0.1, EPS)
        y = y + r
    y = F.relu(y) if relu else y
    outputs, grads = [y], [i.dy.to(y.dtype)]
    if i.dtotal is not None:
        outputs, grads = [y, z], grads + [i.dtotal.to(y.dtype)]
    named = {"dx": x, "dresidual": residual, "dweight": weight, "dbias": bias, "dweight2": weight2, "dbias2": bias2}
    named = {k: v for k, v in named.items() if v is not None}
    return {"y": y.detach()} | dict(zip(named, torch.autograd.grad(outputs, list(named.values()), grads), strict=True))


def magnitudes(setup: Setup, i: SimpleNamespace) -> dict[str, torch.Tensor]:
    """The same formulas on absolute values."""
    z = i.x.double() if i.pre_add is None else (i.x + i.pre_add).double()
    n = z.numel() // z.shape[1]
    g = i.dy.double().abs()
    total = 0 if i.dtotal is None else i.dtotal.double().abs()

    def through(z, bn):
        column = lambda v: v.double().abs()[:, None, None]  # noqa: E731
        mean, var = (bn[2], bn[3]) if setup.frozen else (z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0))
        rstd = 1 / (column(var) + EPS).sqrt()
        hat = (z.abs() + column(mean)) * rstd
        scale = rstd if bn[0] is None else rstd * column(bn[0])
        sums = [t.sum((0, 2, 3), keepdim=True) for t in (g, g * hat)]
        dx = scale * (g if setup.frozen else g + sums[0] / n + hat * sums[1] / n)
        return hat * scale / rstd + (0 if bn[1] is None else column(bn[1])), dx, sums[1], sums[0]

    y, dx, dweight, dbias = through(z, i.bn)
    found = {"y": y, "dx": dx + total, "dweight": dweight, "dbias": dbias}
    if i.residual is not None:
        r = i.residual.double()
        r, dresidual, dweight2, dbias2 = (r.abs(), g, g, g) if i.bn2[2] is None else through(r, i.bn2)
        found |= {"y": y + r, "dresidual": dresidual, "dweight2": dweight2, "dbias2": dbias2}
    return found


def fused(setup: Setup, i: SimpleNamespace, kernels: SimpleNamespace) -> dict[str, torch.Tensor]:
    """The same by a backend's launchers, as an autograd function would call them."""
    count = torch.tensor(i.x.numel() / i.x.shape[1], device=i.x.device)

    def with_statistics(z, bn, pre_add=None):
        mean, m2, total = kernels.statistics(z, pre_add)
        return bn if setup.frozen else (*bn[:2], mean, m2 / count), z if pre_add is None else total

    bn, z = with_statistics(i.x, i.bn, i.pre_add)
    bn2 = i.bn2 if i.bn2[2] is None else with_statistics(i.residual, i.bn2)[0]
    if setup.kind == "join" and setup.relu:
        y, relu_mask = kernels.apply_with_mask(z, *bn, EPS, i.residual)
        residual = None  # the mask stands for it
    else:
        y, _ = kernels.apply(z, *bn, EPS, i.residual, *bn2, None, setup.relu)
        relu_mask, residual = None, i.residual
    arguments = (i.dy, z, *bn, EPS, residual, *bn2, relu_mask, setup.relu)
    sums = kernels.backward_sums(*arguments)
    dbias, dweight, dweight2 = sums
    given = (None, None, None) if setup.frozen else (dbias, dweight, dweight2 if bn2[2] is not None else None)
    given = (*given, None if setup.dtype == torch.float16 else count)  # None: the images' own
    dx, dresidual = kernels.backward_dx(*arguments, *given, i.dtotal, True, i.residual is not None)
    assert all(s.dtype == torch.float32 for s in sums) and dx.dtype == setup.dtype
    found = {"y": y, "dx": dx, "dresidual": dresidual, "dweight": dweight, "dbias": dbias}
    return found | {"dweight2": dweight2, "dbias2": dbias}


def assert_within_budget(setup: Setup, i: SimpleNamespace, results: dict[str, torch.Tensor]) -> None:
    oracles, plains, absolutes = formula(setup, i, torch.float64), formula(setup, i, None), magnitudes(setup, i)
    for name, oracle in oracles.items():
        error, rounding = largest(results[name].double() - oracle), torch.finfo(results[name].dtype).eps / 2
        budget = 2 * largest(plains[name].double() - oracle) + rounding * largest(oracle)
        budget += 2**-24 * largest(absolutes[name])
        assert results[name].shape == oracle.shape
        assert error <= budget, f"{setup}: {name} is off by {error:.3g}, the budget is {budget:.3g}"


def check(setup: Setup, kernels: SimpleNamespace, seed: int = 0) -> None:
    i = draw(setup, seed)
    with testing.nan_filled_memory():
        results = fused(setup, i, kernels)
    assert_within_budget(setup, i, results)


def train(case: Case, function, args, kwargs, absolute=False):
    """Results, running statistics afterwards, and gradients, of a call in training."""
    if absolute:
        args, kwargs = testing.absolute(args, kwargs)
    args, kwargs = testing.map_tensors((args, kwargs), lambda t: t.detach().clone(memory_format=torch.preserve_format))
    kwargs["training"] = True
    leaves = [a for a in args[:3] if a is not None] + [kwargs[k] for k in ("residual", "pre_add") if k in kwargs]
    leaves += [v for v in kwargs.get("residual_bn", ())[:2] if v is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    results = testing.as_tuple(function(*args, **kwargs))
    generator = torch.Generator().manual_seed(1)
    loss = sum((r * torch.randn(r.shape, generator=generator).to(r)).sum() for r in results)
    gradients = torch.autograd.grad(loss, leaves)
    statistics = [*args[3:5], *kwargs.get("residual_bn", ())[2:]]
    return [*results, *statistics, *gradients]


def check_case(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """The public operator in training, under one backend, within the budget of float64."""
    args, kwargs = make_inputs(case, dtype=dtype, device=device)
    reference = testing.REFERENCES[case.op]
    oracles = train(case, reference, *testing.map_tensors((args, kwargs), torch.Tensor.double))
    plains = train(case, reference, args, kwargs)
    with resnet_fused.backend(backend), testing.nan_filled_memory():
        fused = train(case, ops.batch_norm_act, args, kwargs)
    N, C, H, W = case.shape
    for i, (result, oracle, plain) in enumerate(zip(fused, oracles, plains, strict=True)):
        assert result.dtype == plain.dtype and result.shape == plain.shape
        # a sum of N * H * W terms of size 1: 2^-24 times the formula on absolute values
        magnitude = N * H * W if oracle.dim() == 1 else largest(oracle) + abs(case.mean)
        budget = 2 * largest(plain.double() - oracle) + torch.finfo(result.dtype).eps * largest(oracle)
        budget += 2**-24 * magnitude
        error = largest(result.double() - oracle)
        assert error <= budget, f"{case.id}: tensor {i} is off by {error:.3g}, the budget is {budget:.3g}"
