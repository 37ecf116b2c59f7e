"""A chain as one call: fused, or module by module where that would not be the same."""

from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import registry
from ..layers import INPUT, Step, block, norms
from ..layers.steps import batch_statistics, fusable, needs_grad, unfusable
from ..ops._short import PLAIN
from ..ops.conv_bn_act import out_shape

RELU = nn.ReLU()  # for those that are called as a function


Done = tuple[int, Tensor] | None  # of a chain that was begun: 1, the convolution's output; 2, the BN's


def ahead(conv: nn.Module | None, bn: nn.Module, x: Tensor) -> Done:
    """What of bn(conv(x)) runs in its own place, before other nodes, and not with the rest of its chain.

    Where the order of nodes stays, gradients add up in the same order.
    """
    if block.explainer is not None:
        return None
    if not registry.fuses(x.device):
        return 2, bn(x if conv is None else conv(x))
    step = Step(conv, bn)
    alone = fusable(step) and step.bn is not None and (batch_statistics(step.bn) or needs_grad(step.bn))
    return (1, conv(x)) if conv is not None and alone else None


def chain(
    conv: nn.Module | None,
    bn: nn.Module,
    act: nn.Module | bool | None,
    x: Tensor,
    residual: Tensor | None,
    conv2: nn.Module | None,
    bn2: nn.Module | None,
    in_place: bool,
    done: Done,
    done2: Done,
) -> Tensor:
    """act(bn(conv(x)) + bn2(conv2(residual))), as far as they are there: fused, or module by module.

    in_place: the add writes to the main branch, whose dtype and shape it keeps.
    done, done2: what `ahead` gave for the main branch and the residual's.
    """
    if done2 is not None:
        stage, residual = done2
        conv2, bn2 = None, bn2 if stage == 1 else None
    if done is not None:
        stage, x = done
        if stage == 2:
            return _rest(x, act, residual, conv2, bn2, in_place)
        conv = None
    addend = None if residual is None else INPUT if bn2 is None else Step(conv2, bn2)
    step = Step(conv, bn, RELU if isinstance(act, bool) else act, addend)
    reason = unfusable(step) or _unlike(step, x, residual)
    if reason is None:
        y = block.run_step(x, step, x if residual is None else residual)
        keeps = registry.fuses(x.device) and not _channels_last(x, conv)
        return y.contiguous() if keeps else y
    if block.explainer is not None:
        block.explainer.begin(step, reason)
    y = _rest(bn(x if conv is None else conv(x)), act, residual, conv2, bn2, in_place)
    if block.explainer is not None:
        block.explainer.end()
    return y


def _rest(
    y: Tensor,
    act: nn.Module | bool | None,
    residual: Tensor | None,
    conv2: nn.Module | None,
    bn2: nn.Module | None,
    in_place: bool,
) -> Tensor:
    """The modules behind the BN, called as they are."""
    if residual is not None:
        r = residual if bn2 is None else bn2(residual if conv2 is None else conv2(residual))
        y = y.add_(r) if in_place else y + r
    act = RELU if isinstance(act, bool) else act
    return y if act is None else act(y)


def _unlike(step: Step, x: Tensor, residual: Tensor | None) -> str | None:
    """Why these tensors are not what the fused operators take or return, where PyTorch's would; None if they are."""
    conv, addend = step.conv, step.addend
    bn: Any = step.bn
    if type(x) not in PLAIN or x.dim() != 4:
        return f"the input is a {type(x).__name__} of {x.dim()} dimensions, not a Tensor of 4"
    dtype, shape = _after(conv, x)
    if norms.frozen(bn) and bn.weight.dtype != dtype:
        return f"{type(bn).__name__} in {bn.weight.dtype} makes {bn.weight.dtype} of {dtype}"
    if residual is not None:
        if type(residual) not in PLAIN:
            return f"the addend is a {type(residual).__name__}, not a Tensor"
        inner = addend if isinstance(addend, Step) else None
        if inner is not None and (reason := unfusable(inner) or _unlike(inner, residual, None)):
            return f"the shortcut: {reason}"
        other = (residual.dtype, residual.shape) if inner is None else _after(inner.conv, residual)
        if other != (dtype, shape):
            return f"the addend is {other[0]} {tuple(other[1])}, what it is added to {dtype} {tuple(shape)}"
    if registry.fuses(x.device) and registry.get_backend() == "auto" and not _channels_last(x, conv):
        return "x lies in NCHW and the kernels run channels_last: model.to(memory_format=torch.channels_last)"
    return None


def _after(conv: Any, x: Tensor) -> tuple[torch.dtype, torch.Size]:
    """dtype and shape of the convolution's output."""
    if conv is None:
        return x.dtype, x.shape
    dtype, device = x.dtype, x.device.type
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return dtype, torch.Size(out_shape(x, conv.weight, conv.stride, conv.padding, conv.dilation))


def _channels_last(x: Tensor, conv: Any) -> bool:
    """Whether PyTorch's own operators would return channels_last."""
    last = torch.channels_last
    return x.is_contiguous(memory_format=last) or conv is not None and _strided_last(conv.weight)


def _strided_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
