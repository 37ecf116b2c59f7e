"""An ImageNet network's stem: 7x7 convolution + BN with running statistics + ReLU + 3x3 max pooling, for inference.

    y = maxpool(relu(s * (conv(v, weight) - running_mean) + bn_bias)),    s = bn_weight / sqrt(running_var + eps)

where
    v        x, or where x is of bytes (x / 255 - mean) / std, rounded once to weight's dtype; the padding is 0 of v
    conv     the cross-correlation by 7x7 pixels with stride 2 and padding 3
    maxpool  over 3x3 pixels with stride 2 and padding 1

Shapes: x [N, C, H, W], weight [K, C, 7, 7], y [N, K, P, Q] with P = ceil(ceil(H / 2) / 2), Q likewise; BN vectors [K],
    mean and std [C].
Dtypes: float16, bfloat16, float32 fused, x of weight's dtype or uint8; every other floating dtype eager.
    Under autocast x and weight are cast as autocast casts a convolution's arguments.
Layout: x is read in any; the fused kernel returns channels_last, eager keeps PyTorch's.
Gradients: by the formula below, for nothing else keeps what they need.
Errors: ValueError naming the argument; BackendUnavailable where a forced backend can't serve the call.

Equivalent to:
    x = (x / 255 - mean[:, None, None]) / std[:, None, None]    # of bytes
    y = F.batch_norm(F.conv2d(x, weight, None, 2, 3), running_mean, running_var, bn_weight, bn_bias, False, 0.0, eps)
    y = F.max_pool2d(F.relu(y), 3, 2, 1)
"""

import torch
from torch import Tensor

from ...dispatch import plans, registry
from .. import _checks
from .._library import register
from .._short import plain, unwatched
from .call import SCHEMA, Call, fake, flops, normalized, out_shape, reference

__all__ = ["Call", "flops", "fuses", "normalized", "out_shape", "reference", "stem"]

_op = register(SCHEMA, Call, fake)


def fuses(device: torch.device) -> bool:
    """Whether a backend that has this operator is to be tried on the device."""
    return registry.fuses(device) and (not registry.forced() or registry.serves(registry.get_backend(), Call.op))


def stem(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    eps: float = 1e-5,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Max pooling of ReLU of BN of a 7x7 convolution, of which only the result is written where a backend serves it.

    A forced backend without a kernel for it gets the convolution, and PyTorch pools.

    Args:
        x: [N, C, H, W] of weight's dtype, normalised, or uint8.
        weight: [K, C, 7, 7], any layout; channels_last needs no copy.
        bn_weight, bn_bias: BN's affine parameters [K], or None.
        running_mean, running_var: [K].
        eps: added to the variance.
        mean, std: float32 [C], of pixels between 0 and 1; given where x is uint8, and only there.

    Returns:
        y [N, K, P, Q] of weight's dtype.

    Raises:
        ValueError: an argument's shape, dtype or value is off.
        BackendUnavailable: a forced backend can't serve the call.
    """
    if torch._C._is_any_autocast_enabled():
        x, weight = _autocast(x, weight)
    call = Call(x, weight, bn_weight, bn_bias, running_mean, running_var, eps, mean, std)
    needs_grad = _checks.needs_grad(call)
    if not needs_grad and unwatched() and plain(call):
        plan = plans.kept.get((call.key(), registry.get_backend()))
        if plan is not None:
            registry.record(call.name, plan.choice, call)
            return plan.run(call)
    _check(call)
    if needs_grad or not fuses(x.device):
        return call.plainly()
    name = registry.get_backend()
    if registry.forced() and (reason := registry.unsupported(name, call)) is not None:
        registry.record(call.name, registry.Choice(registry.PLAIN, ((name, reason),)))
        return call.plainly()
    lacks = _checks.transformed()
    choice = registry.choose(call.name, x.device, lambda n: registry.unsupported(n, call) or lacks, call.order())
    if choice.backend == registry.PLAIN:
        registry.record(call.name, choice)
        return call.plainly()
    return _op(*call)


def _autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The images and the weight cast as autocast casts a convolution's; bytes stay bytes."""
    device = x.device.type
    if weight.dtype == torch.float64 or not (weight.is_floating_point() and torch.is_autocast_enabled(device)):
        return x, weight
    dtype = torch.get_autocast_dtype(device)
    return x if x.dtype in (torch.uint8, torch.float64) else x.to(dtype), weight.to(dtype)


def _check(call: Call) -> None:
    x, weight = call.x, call.weight
    bytes_ = x.dim() == 4 and x.dtype == torch.uint8
    if not bytes_:
        _checks.image("x", x)
    _checks.image("weight", weight)
    if x.dtype not in (torch.uint8, weight.dtype) or weight.device != x.device:
        raise ValueError(
            f"x must be uint8 or of weight's dtype {weight.dtype}, on weight's device {weight.device}; "
            f"got {x.dtype} on {x.device}"
        )
    K, C = weight.shape[0], x.shape[1]
    if weight.shape[1:] != (C, 7, 7):
        raise ValueError(f"weight must have shape [K, {C}, 7, 7] for x's {C} channels, got {tuple(weight.shape)}")
    if not (x.shape[2] and x.shape[3]):
        raise ValueError(f"x must have images of 1 pixel or more, got shape {tuple(x.shape)}")
    for name in ("bn_weight", "bn_bias", "running_mean", "running_var"):
        _checks.vector(name, getattr(call, name), K, x)
    if call.running_mean is None or call.running_var is None:
        raise ValueError("running_mean and running_var must be given, got None")
    for name in ("mean", "std"):
        v = getattr(call, name)
        if (v is not None) != bytes_:
            given = "None" if v is None else "a tensor"
            raise ValueError(f"{name} must be given where x is uint8, and only there; got {given} with {x.dtype}")
        _checks.vector(name, v, C, x)
        if v is not None and v.dtype != torch.float32:
            raise ValueError(f"{name} must be of dtype torch.float32, got {v.dtype}")
