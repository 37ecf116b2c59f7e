"""Convolution + BN with running statistics + residual + activation: inference, and fine-tuning with frozen BN.

    y = act(s * (conv(x, weight) + bias - mean) + beta + residual),    s = gamma / sqrt(var + eps)

where
    conv   the 2-D cross-correlation of `torch.nn.functional.conv2d`
    gamma, beta, mean, var    bn_weight, bn_bias, running_mean, running_var; all None: a convolution with an add
    act    max(., 0) or the identity

Shapes: x [N, C, H, W], weight [K, C / groups, R, S], residual and y [N, K, P, Q]; bias and BN vectors [K].
Dtypes: float16, bfloat16, float32 fused, accumulated and finished in float32; every other floating dtype eager.
    Under autocast x, weight, bias and residual are cast as autocast casts a convolution's arguments.
Layout: the fused kernels run channels_last and return it; eager keeps PyTorch's.
Errors: ValueError naming the argument; BackendUnavailable where a forced backend can't serve the call.

Equivalent to:
    y = F.batch_norm(F.conv2d(x, weight, bias, stride, padding, dilation, groups), running_mean, running_var,
                     bn_weight, bn_bias, training=False, eps=eps)
    y = F.relu(y + residual)
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _get_cudnn_deterministic,
    _get_cudnn_enabled,
    _get_deterministic_algorithms,
    _get_deterministic_algorithms_warn_only,
)

from ...dispatch import plans, registry
from .. import _checks
from .._library import register
from .._short import batched, plain, unwatched
from .call import SCHEMA, Call, Pair, fake, out_shape, reference

__all__ = ["Call", "conv_bn_act", "out_shape", "reference"]

_op = register(SCHEMA, Call, fake)


class _ConvBNAct(torch.autograd.Function):
    """Gradients of x, weight, bias and residual; BN is frozen. The backward pass is differentiable itself."""

    @staticmethod
    def forward(ctx, *args):
        call = Call(*args)
        y = _op(*args)
        ctx.eps, ctx.conv_args = call.eps, (call.stride, call.padding, call.dilation, call.groups)
        saved = (call.x, call.weight, call.bn_weight, call.running_mean, call.running_var, y if call.relu else None)
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bn_weight, mean, var, y = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.conv_args
        needs = ctx.needs_input_grad
        dz = dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)
        dconv = dz
        if mean is not None:
            scale = (var.float() + ctx.eps).rsqrt()
            scale = scale if bn_weight is None else scale * bn_weight.float()
            dconv = _scaled(dz, scale[:, None, None])
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            dconv,
            x,
            weight,
            [weight.shape[0]],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [needs[0], needs[1], needs[2]],
        )
        return dx, dweight, dbias, *[None] * 9, dz if needs[12] else None, None


def _scaled(dz: Tensor, scale: Tensor) -> Tensor:
    """dz * scale, rounded once to dz's dtype, in one pass."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or batched(dz):
        return (dz.float() * scale).to(dz.dtype)
    return torch.mul(dz, scale, out=torch.empty_like(dz))


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    act: str = "relu",
) -> Tensor:
    """act(BN(conv(x)) [+ residual]) with BN's running statistics, fused where a backend serves it.

    Args:
        x: [N, C, H, W].
        weight: [K, C / groups, R, S], any layout; channels_last needs no copy.
        bn_weight, bn_bias: BN's affine parameters [K], or None.
        running_mean, running_var: [K]; None together (then bn_weight and bn_bias are None too): no BN.
        bias: the convolution's own bias [K], or None.
        eps: added to the variance.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`, integers or pairs (height, width).
        residual: [N, K, P, Q], added before the activation.
        act: "relu" or "none".

    Returns:
        y [N, K, P, Q].

    Raises:
        ValueError: an argument's shape, dtype or value is off.
        BackendUnavailable: a forced backend can't serve the call.
    """
    images = (x, weight) if residual is None else (x, weight, residual)
    short = not torch.is_grad_enabled() and unwatched() and plain(images)
    if short:
        stride, padding, dilation = _hashable(stride), _hashable(padding), _hashable(dilation)
        if torch._C._is_any_autocast_enabled():
            x, weight, bias, residual = _autocast(x, weight, bias, residual)
        vectors = (bias, bn_weight, bn_bias, running_mean, running_var)
        key = (
            *(x.shape, x.stride(), x.dtype, x.device, x.__class__, x.data_ptr() & 15),
            *(weight.shape, weight.stride(), weight.dtype, weight.device, weight.__class__, weight.data_ptr() & 15),
            *(
                None if v is None else (v.shape, v.stride(), v.dtype, v.device, v.__class__, v.data_ptr() & 15)
                for v in vectors
            ),
            None
            if residual is None
            else (
                residual.shape,
                residual.stride(),
                residual.dtype,
                residual.device,
                residual.__class__,
                residual.data_ptr() & 15,
            ),
            *(eps, stride, padding, dilation, groups, act, registry._forced),
            torch._C._get_fp32_precision_getter("cuda", "conv") if x.dtype is torch.float32 else None,
            *(_get_cudnn_enabled(), _get_cudnn_deterministic()),
            *(_get_deterministic_algorithms(), _get_deterministic_algorithms_warn_only()),
        )
        plan = plans.short.get(key)
        if plan is not None:
            call = Call(x, weight, *vectors, eps, stride, padding, dilation, groups, residual, act == "relu")
            if registry.listener is not None:
                registry.listener(Call.name, plan.choice, call)
            return plan.run(call)

    stride, padding, dilation = _pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1)
    groups = _integer("groups", groups)
    _check(x, weight, bn_weight, bn_bias, running_mean, running_var, bias, padding, dilation, groups, act)
    x, weight, bias, residual = _autocast(x, weight, bias, residual)
    if residual is not None:
        _checks.like("residual", residual, out_shape(x, weight, stride, padding, dilation), x)

    call = Call(
        *(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, eps),
        *(stride, padding, dilation, groups, residual, act == "relu"),
    )
    needs_grad = _checks.needs_grad(call)
    lacks: str | None
    if _checks.needs_grad((bn_weight, bn_bias)):
        lacks = "bn_weight or bn_bias requires a gradient, which needs the convolution's output; use batch_norm_act"
    else:
        lacks = _checks.transformed(needs_grad)
    choice = registry.choose(call.name, x.device, lambda n: registry.unsupported(n, call) or lacks, call.order())
    if choice.backend == registry.PLAIN:
        registry.record(call.name, choice)
        return call.reference()
    y = (_ConvBNAct.apply if needs_grad else _op)(*call)
    plan = plans.kept.get((call.key(), registry.get_backend())) if short else None
    if plan is not None and plain(call):
        plans.keep(plans.short, key, plan)
    return y


def _hashable(value: Any) -> Sequence[int]:
    """A pair of an integer, a list as a tuple."""
    if value.__class__ is int:
        return value, value
    return tuple(value) if isinstance(value, list) else value


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments cast as autocast casts a convolution's."""
    floating = x.is_floating_point() and weight.is_floating_point()
    if not floating or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias, residual
    dtype = torch.get_autocast_dtype(x.device.type)
    bias, residual = (None if t is None else t.to(dtype) for t in (bias, residual))
    return x.to(dtype), weight.to(dtype), bias, residual


def _pair(name: str, value: Pair, least: int) -> list[int]:
    try:
        pair = [operator.index(v) for v in (value if isinstance(value, (tuple, list)) else (value, value))]
    except TypeError:  # not integral
        pair = []
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name} must be an integer or a pair of integers of at least {least}, got {value!r}")
    return pair


def _integer(name: str, value: int) -> int:
    try:
        integer = operator.index(value)
    except TypeError:
        integer = 0
    if integer < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return integer


def _check(x, weight, bn_weight, bn_bias, running_mean, running_var, bias, padding, dilation, groups, act) -> None:
    _checks.image("x", x)
    _checks.image("weight", weight)
    _checks.act(act)
    K, C_group, *kernel = weight.shape
    if K % groups or x.shape[1] != C_group * groups:
        raise ValueError(
            f"weight must have shape [K, C / groups, R, S] with K divisible by groups={groups} and C={x.shape[1]} "
            f"the channels of x, got {tuple(weight.shape)}"
        )
    least = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(kernel, padding, dilation, strict=True)]
    if min(kernel) < 1 or x.shape[2] < least[0] or x.shape[3] < least[1]:
        raise ValueError(
            f"weight's kernel {tuple(kernel)} must hold a pixel and, with dilation={dilation}, fit into x's "
            f"{tuple(x.shape[2:])} pixels with padding={padding}; x must be {tuple(least)} pixels or more"
        )
    if weight.device != x.device:
        raise ValueError(f"weight must be on {x.device} as x is, got {weight.device}")
    names = ("bias", "bn_weight", "bn_bias", "running_mean", "running_var")
    for name, v in zip(names, (bias, bn_weight, bn_bias, running_mean, running_var), strict=True):
        _checks.vector(name, v, K, x)
    _checks.statistics("running_mean", running_mean, "running_var", running_var)
    if running_mean is None and (bn_weight is not None or bn_bias is not None):
        raise ValueError("running_mean and running_var must be given where bn_weight or bn_bias is, got None")
