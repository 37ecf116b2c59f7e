"""A network's stem: one operator with its pooling in inference, else a step and a module; images of bytes."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..ops import _checks
from ..ops.stem import fuses, normalized, stem
from . import block, norms
from .block import as_modules, run_block
from .calls import called_plainly
from .steps import BatchNorm, Step, batch_statistics, fusable, tensor


class Normalization(NamedTuple):
    """Of images of bytes: float32 [C] each, of pixels between 0 and 1."""

    mean: Tensor
    std: Tensor


def as_floating(x: Tensor, conv: nn.Module | None, normalization: Normalization | None) -> Tensor:
    """Images of bytes normalised, in the convolution's dtype; others as they are.

    Raises:
        TypeError: they are no tensor.
        ValueError: they are bytes, and nobody said how they are normalised, or not of as many channels.
    """
    if not isinstance(x, (Tensor, Proxy)):
        raise TypeError(f"x must be a tensor [N, C, H, W], got {type(x).__name__}")
    if isinstance(x, Proxy) or x.dtype != torch.uint8:
        return x
    channels = len(_given(normalization).mean)
    if x.dim() != 4 or x.shape[1] != channels:  # it would broadcast
        raise ValueError(f"x must be [N, {channels}, H, W], got {list(x.shape)}")
    weight = getattr(conv, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32
    return normalized(x, *_given(normalization), dtype)


def _given(normalization: Normalization | None) -> Normalization:
    if normalization is None:
        raise ValueError(
            "x must be of a floating-point dtype, got torch.uint8; call model.set_input_normalization(mean, std) "
            "first, and the model normalises bytes itself"
        )
    return normalization


def pooled_stem(x: Tensor, step: Step, pool: nn.Module, normalization: Normalization | None) -> Tensor | None:
    """pool(act(bn(conv(x)))) as one operator [N, C, H, W] -> [N, K, P, Q], or None where it can't stand for them."""
    if not isinstance(x, Tensor) or not fuses(x.device) or not _stands_for(step, pool):
        return None
    conv, bn = cast(nn.Conv2d, step.conv), cast(BatchNorm, step.bn)  # `_stands_for` has looked
    weight, bn_weight, bn_bias = tensor(conv, "weight"), tensor(bn, "weight"), tensor(bn, "bias")
    mean, var = cast(Tensor, tensor(bn, "running_mean")), cast(Tensor, tensor(bn, "running_var"))
    if _checks.needs_grad((x, weight, bn_weight, bn_bias)):
        return None
    if block.explainer is not None:
        block.explainer.begin(step, None, pool=pool)
    of_bytes = _given(normalization)._asdict() if x.dtype == torch.uint8 else {}
    y = stem(x, weight, bn_weight, bn_bias, mean, var, eps=bn.eps, **of_bytes)
    if block.explainer is not None:
        block.explainer.end()
    return y


def run_stem(x: Tensor, step: Step, pool: nn.Module | None, normalization: Normalization | None) -> Tensor:
    """pool(act(bn(conv(x)))), x normalised first where it is of bytes."""
    y = None if pool is None else pooled_stem(x, step, pool, normalization)
    if y is not None:
        return y
    x = as_modules(x, (step,)) if isinstance(x, Proxy) else run_block(as_floating(x, step.conv, normalization), (step,))
    return x if pool is None else pool(x)


def _stands_for(step: Step, pool: nn.Module) -> bool:
    conv, bn, act, addend = step
    return (
        type(pool) is nn.MaxPool2d
        and called_plainly(pool) is None
        and all(value in (n, (n, n)) for value, n in ((pool.kernel_size, 3), (pool.stride, 2), (pool.padding, 1)))
        and pool.dilation in (1, (1, 1))
        and not (pool.ceil_mode or pool.return_indices)
        and fusable(step)
        and addend is None
        and act is not None
        and bn is not None
        and (type(bn) in norms.OWN or norms.frozen(bn))
        and conv is not None
        and conv.kernel_size == (7, 7)
        and (conv.stride, conv.padding, conv.dilation, conv.groups) == ((2, 2), (3, 3), (1, 1), 1)
        and conv.bias is None
        and not batch_statistics(bn)
    )
