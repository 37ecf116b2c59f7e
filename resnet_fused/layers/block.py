"""A block's steps, one after the other: fused, or as torchvision calls their modules."""

from typing import NamedTuple

from torch import Tensor, nn

from ..dispatch import registry
from ..ops import batch_norm_act, conv_bn_act
from ..ops.batch_norm_act.tape import tape
from .steps import (
    INPUT,
    Step,
    batch_statistics,
    called_plainly,
    group,
    momentum,
    needs_grad,
    statistics,
    synchronizes,
    tensor,
    unfusable,
)

explainer = None  # set by `explain` while it runs a model


class Sum(NamedTuple):
    """Two tensors [N, C, H, W], which the next BN adds in its own pass."""

    x: Tensor
    pre_add: Tensor


def run_block(x: Tensor | Sum, steps: tuple[Step, ...], hand_over: bool = False) -> Tensor | Sum:
    block_input = entry = x
    if steps[0].conv is None:
        entry, block_input = pre_activation(x, steps[0])
        x, steps = entry, steps[1:]
    for step in steps:
        x = run_step(x, step, block_input if step.addend == INPUT else entry, hand_over)
    return x


def explained_bn(z: Tensor, step: Step, source: Tensor) -> Tensor:
    if explainer is not None:
        explainer.begin(step, None)
    z = _bn(z, step, source)
    if explainer is not None:
        explainer.end()
    return z


def pre_activation(x: Tensor | Sum, step: Step) -> tuple[Tensor, Tensor]:
    """act(bn(x)) and x, the sum where it comes as a `Sum`."""
    x, pre_add = x if isinstance(x, Sum) else (x, None)
    if pre_add is not None and pre_add.dtype != x.dtype:  # under autocast
        x, pre_add = x + pre_add, None
    if explainer is not None:
        explainer.begin(step, unfusable(step), takes_over=pre_add is not None)
    if _plain(x, step):
        x = x if pre_add is None else x + pre_add
        y = _modules(x, step, x)
    else:
        y = _bn(x, step, x, pre_add)
        y, x = (y, x) if pre_add is None else y
    if explainer is not None:
        explainer.end()
    return y, x


def run_step(x: Tensor, step: Step, source: Tensor, hand_over: bool = False) -> Tensor | Sum:
    """source: what the step's addend is, or goes through its module."""
    plain = _plain(x, step)
    if hand_over and step.bn is None and step.addend is not None and not plain:
        return Sum(step.conv(x), _shortcut(step, source))
    if explainer is not None:
        explainer.begin(step, unfusable(step))
    if plain:
        x = _modules(x, step, source)
    elif step.bn is not None and (batch_statistics(step.bn) or needs_grad(step.bn)):
        x = _bn(step.conv(x), step, source)
    else:
        x = _conv_bn(x, step, _shortcut(step, source))
    if explainer is not None:
        explainer.end()
    return x


def _plain(x: Tensor, step: Step) -> bool:
    """Whether the step's modules are called as they are."""
    return not (registry.fuses(x.device) or synchronizes(step.bn) or tape.active) or unfusable(step) is not None


def _modules(x: Tensor, step: Step, source: Tensor) -> Tensor:
    """torchvision's own order, addend after the main branch: gradients add up in the same order, to the same bits."""
    for module in (step.conv, step.bn):
        x = x if module is None else module(x)
    if step.addend is not None:
        shortcut = _shortcut(step, source)
        x = x + shortcut if step.bn is None else x.add_(shortcut)
    return x if step.act is None else step.act(x)


def _shortcut(step: Step, source: Tensor) -> Tensor | None:
    if step.addend is None or step.addend == INPUT:
        return None if step.addend is None else source
    inner = projection(step.addend)
    return step.addend(source) if inner is None else run_step(source, inner, source)


def projection(shortcut: nn.Module) -> Step | None:
    """The step that a `Sequential(conv, bn)` without hooks stands for."""
    if type(shortcut) is nn.Sequential and len(shortcut) == 2 and called_plainly(shortcut) is None:
        return Step(shortcut[0], shortcut[1])
    return None


def _conv_bn(x: Tensor, step: Step, residual: Tensor | None) -> Tensor:
    conv, bn = step.conv, step.bn
    vectors = (None,) * 4
    if bn is not None:
        vectors = (tensor(bn, "weight"), tensor(bn, "bias"), tensor(bn, "running_mean"), tensor(bn, "running_var"))
    return conv_bn_act(
        x,
        tensor(conv, "weight"),
        *vectors,
        bias=tensor(conv, "bias"),
        eps=0.0 if bn is None else bn.eps,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        residual=residual,
        act="none" if step.act is None else "relu",
    )


def _bn(x: Tensor, step: Step, source: Tensor, pre_add: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """After the step's convolution: BN, the shortcut's BN where it may join, add and ReLU as one."""
    bn = step.bn
    residual, residual_bn = None, None
    inner = projection(step.addend) if isinstance(step.addend, nn.Module) else None
    if inner is not None and _joins(bn, inner):
        if explainer is not None:
            explainer.joined(inner)
        residual = inner.conv(source)
        residual_bn = (tensor(inner.bn, "weight"), tensor(inner.bn, "bias"), *statistics(inner.bn))
        momentum(inner.bn)
    else:
        residual = _shortcut(step, source)
        residual = None if residual is None else residual.to(x.dtype)  # under autocast the block's input may be float32
    return batch_norm_act(
        x,
        tensor(bn, "weight"),
        tensor(bn, "bias"),
        *statistics(bn),
        residual=residual,
        residual_bn=residual_bn,
        pre_add=pre_add,
        training=batch_statistics(bn),
        momentum=momentum(bn),
        eps=bn.eps,
        act="none" if step.act is None else "relu",
        group=group(bn),
    )


def _joins(bn: nn.Module, inner: Step) -> bool:
    """Whether the shortcut's BN can run in the main BN's pass: one operator takes one mode, momentum and eps."""
    other = inner.bn
    return (
        unfusable(inner) is None
        and batch_statistics(bn) == batch_statistics(other)
        and (bn.training, bn.eps, bn.momentum, bn.track_running_stats)
        == (other.training, other.eps, other.momentum, other.track_running_stats)
        and bn.momentum is not None
        and group(bn) is group(other)
    )
