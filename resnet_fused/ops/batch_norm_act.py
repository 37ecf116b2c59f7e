"""BN + activation, with the residual's add and the residual's own BN: everything between two convolutions.

    y = act(s * (z - mean) + bias + r),    s = weight / sqrt(var + eps)

where
    z      x, or x + pre_add
    mean, var    the running statistics, or in training those of z over N, H and W
    r      nothing, the residual, or the residual through its own BN: s2 * (residual - mean2) + bias2
    act    max(., 0) or the identity

Shapes: x, residual, pre_add and y [N, C, H, W] of one dtype; BN vectors [C] in float32 or x's dtype.
Dtypes: float16, bfloat16, float32 fused; every other floating dtype eager.
Layout: the fused kernels run channels_last and return it; eager keeps x's.
Errors: ValueError naming the argument; BackendUnavailable where a forced backend can't serve the call.

Equivalent to:
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = F.relu(y + F.batch_norm(residual, *residual_bn...))
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _cuda, _registry, _triton, _trust
from . import _checks, _numerics
from ._library import register

if _triton.IMPORT_ERROR is None:
    from .._triton import batch_norm_act as _triton_kernels

BN = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # weight, bias, running_mean, running_var

SCHEMA = (
    "batch_norm_act_apply(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, "
    "Tensor? residual, Tensor? residual_weight, Tensor? residual_bias, Tensor? residual_mean, Tensor? residual_var, "
    "Tensor? pre_add, bool relu) -> (Tensor, Tensor)"
)


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    residual_bn: BN | None = None,
    pre_add: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
) -> Tensor | tuple[Tensor, Tensor]:
    """`batch_norm_act` in plain PyTorch, in torchvision's order."""
    if pre_add is not None:
        x = x + pre_add
    y = _batch_norm(x, (weight, bias, running_mean, running_var), training, momentum, eps)
    if residual is not None:
        if residual_bn is not None:
            residual = _batch_norm(residual, residual_bn, training, momentum, eps)
        y = y + residual
    if act == "relu":
        y = F.relu(y)
    return y if pre_add is None else (y, x)


def _batch_norm(x: Tensor, bn: BN, training: bool, momentum: float, eps: float) -> Tensor:
    weight, bias, mean, var = bn
    return F.batch_norm(x, mean, var, weight, bias, training or mean is None, momentum, eps)


def fake(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.channels_last)
    return y, x.new_empty(0) if args[10] is None else torch.empty_like(y)


def supported(backend: str, x: Tensor, vectors: tuple[Tensor | None, ...], batch_statistics: bool) -> str | None:
    """Why a backend can't serve the call, or None; from metadata alone."""
    if backend not in ("cuda", "triton"):
        return f"{backend} serves convolutions in eval mode without gradients only; call it under torch.no_grad()"
    if batch_statistics:
        return "it has no kernel for batch statistics (train mode)"
    return _checks.kernel_dtypes(x, vectors)


def _impl(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    weight, bias, mean, var, _, _, *residual_bn, _, _ = args
    vectors = (weight, bias, mean, var, *residual_bn)

    def serves(name: str) -> str | None:
        reason = supported(name, x, vectors, False)
        return reason or _trust.refused(_class(name, x, args), x.device, lambda: _compare(name, x, args))

    choice = _registry.choose("batch_norm_act", x.device, serves, "batch_norm")
    _registry.record("batch_norm_act", choice)
    if choice.backend == "eager":  # the check failed after the graph, or the caller, had settled on this operator
        y, *total = _numerics.as_tuple(_reference_of(x, args))
        y = y.contiguous(memory_format=torch.channels_last)
        return y, total[0].contiguous(memory_format=torch.channels_last) if total else x.new_empty(0)
    return launch(choice.backend, x, *args)


def _class(backend: str, x: Tensor, args: tuple) -> str:
    """Calls that run the same compiled kernel share a class."""
    given = "".join("-" if a is None else str(a.dtype)[6] if isinstance(a, Tensor) else "" for a in args)
    return f"batch_norm_act/{backend}/{x.dtype}/C{min(x.shape[1], 128)}/{x.shape[1] % 16}/{given}/{args[-1]}"


def _compare(backend: str, x: Tensor, args: tuple) -> str | None:
    """What is wrong with a backend's numbers on random inputs like these, or None."""
    draw = _numerics.Draw(x.device)
    args = list(args)
    for i, a in enumerate(args):
        if isinstance(a, Tensor):
            args[i] = draw.like(a, positive=i in (3, 9))  # var, residual_var
    x = draw.like(x)
    results = launch(backend, x, *args)
    args_, kwargs = _reference_arguments(x, args)
    return _numerics.mismatch(results[: 1 + (args[10] is not None)], reference, args_, kwargs)


def _reference_arguments(x: Tensor, args: tuple) -> tuple[tuple, dict]:
    """The registered operator's arguments as those of `reference`."""
    weight, bias, mean, var, eps, residual, *residual_bn, pre_add, relu = args
    bn2 = None if residual_bn[2] is None else tuple(residual_bn)
    kwargs = dict(residual=residual, residual_bn=bn2, pre_add=pre_add, training=False, eps=eps)
    return (x, weight, bias, mean, var), kwargs | {"act": "relu" if relu else "none"}


def _reference_of(x: Tensor, args: tuple) -> Tensor | tuple[Tensor, Tensor]:
    positional, kwargs = _reference_arguments(x, args)
    return reference(*positional, **kwargs)


def launch(backend: str, x: Tensor, *args) -> tuple[Tensor, Tensor]:
    """Run the kernel of one backend; arguments as in SCHEMA, of any layout."""
    x, *args = (a if not isinstance(a, Tensor) else _dense(a) for a in (x, *args))
    return {"cuda": _cuda.batch_norm_act, "triton": _triton_kernels.apply}[backend](x, *args)


def _dense(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.contiguous_format)


_apply_op = register(SCHEMA, _impl, fake)


class _BatchNormAct(torch.autograd.Function):
    """Gradients with given statistics: the statistics are constants."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, pre_add, relu):
        y, total = _apply_op(x, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, pre_add, relu)
        ctx.eps, ctx.has_total = eps, pre_add is not None
        ctx.save_for_backward(
            x if pre_add is None else total, weight, mean, var, residual, weight2, mean2, var2, y if relu else None
        )
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtotal):
        z, weight, mean, var, residual, weight2, mean2, var2, y = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dz = dy if y is None else torch.where(y <= 0, 0, dy)
        dx, dweight, dbias = _affine_backward(dz, z, weight, mean, var, ctx.eps, needs[1])
        if ctx.has_total:
            dx = dx + dtotal
        dresidual = dweight2 = dbias2 = None
        if residual is not None:
            dresidual, dweight2, dbias2 = _affine_backward(dz, residual, weight2, mean2, var2, ctx.eps, needs[7])
        return (
            dx,
            dweight,
            dbias if needs[2] else None,
            None,
            None,
            None,
            dresidual,
            dweight2,
            dbias2 if needs[8] else None,
            None,
            None,
            dx if needs[11] else None,
            None,
        )


def _affine_backward(dz, x, weight, mean, var, eps, weight_needs_grad):
    """Gradients of weight * (x - mean) / sqrt(var + eps) + bias; of x itself where mean is None."""
    if mean is None:
        return dz, None, None
    rstd = (var.float() + eps).rsqrt()
    scale = rstd if weight is None else rstd * weight.float()
    g = dz.float()
    dx = (g * scale[:, None, None]).to(dz.dtype)
    dbias = g.sum((0, 2, 3))
    dweight = None
    if weight_needs_grad:
        dweight = ((x.float() - mean.float()[:, None, None]) * g).sum((0, 2, 3)).mul(rstd).to(mean.dtype)
    return dx, dweight, dbias.to(mean.dtype)


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    residual_bn: BN | None = None,
    pre_add: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
) -> Tensor | tuple[Tensor, Tensor]:
    """act(BN(x [+ pre_add]) [+ residual | + BN2(residual)]) in one pass over memory where a backend serves it.

    Args:
        x: [N, C, H, W].
        weight, bias: BN's affine parameters [C], or None.
        running_mean, running_var: [C], or None together: then the batch's own statistics serve, as in nn.BatchNorm2d.
        residual: shaped like x; added before the activation.
        residual_bn: (weight, bias, running_mean, running_var) that the residual still has to go through.
        pre_add: shaped like x; added to x before BN, and the sum is returned too.
        training: normalise by the batch's statistics and update the running ones in place.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance.
        act: "relu" or "none".

    Returns:
        y [N, C, H, W]; with `pre_add` the pair (y, x + pre_add).

    Raises:
        ValueError: an argument's shape, dtype or value is off; training on one value per channel.
        BackendUnavailable: a forced backend can't serve the call.
    """
    _checks.image("x", x)
    _checks.act(act)
    bn2 = (None,) * 4 if residual_bn is None else residual_bn
    _check_bn("", (weight, bias, running_mean, running_var), x)
    if residual is not None:
        _checks.like("residual", residual, x.shape, x)
        _check_bn("residual_bn's ", bn2, x)
    elif residual_bn is not None:
        raise ValueError("residual_bn needs a residual, got residual=None")
    if pre_add is not None:
        _checks.like("pre_add", pre_add, x.shape, x)

    batch_statistics = training or running_mean is None or (residual_bn is not None and bn2[2] is None)
    vectors = (weight, bias, running_mean, running_var, *bn2)
    choice = _registry.choose(
        "batch_norm_act", x.device, lambda name: supported(name, x, vectors, batch_statistics), "batch_norm"
    )
    if choice.backend == "eager":
        _registry.record("batch_norm_act", choice)
        return reference(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            residual=residual,
            residual_bn=residual_bn,
            pre_add=pre_add,
            training=training,
            momentum=momentum,
            eps=eps,
            act=act,
        )
    args = (x, weight, bias, running_mean, running_var, eps, residual, *bn2, pre_add, act == "relu")
    y, total = (_BatchNormAct.apply if _checks.needs_grad(args) else _apply_op)(*args)
    return y if pre_add is None else (y, total)


def _check_bn(owner: str, bn: BN, x: Tensor) -> None:
    for name, v in zip(("weight", "bias", "running_mean", "running_var"), bn, strict=True):
        _checks.vector(owner + name, v, x.shape[1], x)
    _checks.statistics(owner + "running_mean", bn[2], owner + "running_var", bn[3])
