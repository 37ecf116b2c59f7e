"""One call per block: which of the model's steps are fused, and how.

A step is a convolution, its BN, an activation and what is added before it. Pre-activation blocks begin with a step
without a convolution and end in one without a BN, whose add the next block's first BN may take over. A step is fused
only if its modules are exactly PyTorch's own, without hooks, parametrizations or forwards set on an instance; otherwise
they are called as torchvision calls them.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import _registry
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
    unfusable,
)

Recompute = Literal["activations", "blocks"] | None

explainer = None  # set by `explain` while it runs a model


class Sum(NamedTuple):
    """Two tensors [N, C, H, W], which the next BN adds in its own pass."""

    x: Tensor
    pre_add: Tensor


class PadShortcut(nn.Module):
    """The shortcut without parameters (option A): every stride-th pixel, and zeros for the new channels.

    Shape: [N, C, H, W] -> [N, channels, ceil(H / stride), ceil(W / stride)], in x's layout.
    """

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, 1, self.stride)  # pooling's gradient keeps channels_last, slicing's does not
        return F.pad(x, (0, 0, 0, 0, 0, self.channels - x.shape[1]))

    def extra_repr(self) -> str:
        return f"{self.channels}, stride={self.stride}"


def run(
    x: Tensor | Sum, *steps: Step, then: nn.Module | None = None, recompute: Recompute = None, hand_over: bool = False
) -> Tensor | Sum:
    """The block of these steps on x [N, C, H, W], then the module `then`; a leaf to torch.fx.

    recompute: what backward computes again instead of keeping: "activations", the outputs of all BN + ReLU but the
        block's own output; "blocks", everything but x.
    hand_over: return a `Sum` where the last step has no BN and is fused: the next call begins with one.
    """
    if recompute is None or not _recomputes(steps):
        return _then(then)(_block(x, steps, hand_over))
    inner, outer = (then, None) if type(then) in _REPEATABLE and called_plainly(then) is None else (None, then)
    if recompute == "blocks":
        return _then(outer)(_recomputed(lambda x: _then(inner)(_block(x, steps)), x))
    return _then(outer)(_keeping_convolutions(x, steps, inner))


_REPEATABLE = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Identity)  # the same again, and nothing else


def _then(module: nn.Module | None) -> Callable[[Tensor], Tensor]:
    return (lambda x: x) if module is None else module


def hands_over(x: Tensor, modules: Iterable[nn.Module]) -> bool:
    """Whether `Sum`s may pass between the modules: something is fused, and no hook looks on."""
    return isinstance(x, Tensor) and _registry.fuses(x.device) and all(called_plainly(m) is None for m in modules)


def _block(x: Tensor | Sum, steps: tuple[Step, ...], hand_over: bool = False) -> Tensor | Sum:
    block_input = entry = x
    if steps[0].conv is None:
        entry, block_input = _pre_activation(x, steps[0])
        x, steps = entry, steps[1:]
    for step in steps:
        x = _run_step(x, step, block_input if step.addend == INPUT else entry, hand_over)
    return x


def _recomputes(steps: tuple[Step, ...]) -> bool:
    """Compiled graphs decide for themselves what they keep; a module that is called as it is may not run twice."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    addends = [s.addend for s in steps if isinstance(s.addend, nn.Module) and not _repeats(s.addend)]
    inner = [_projection(a) for a in addends]
    return None not in inner and all(unfusable(s) is None for s in (*steps, *inner))


def _repeats(shortcut: nn.Module) -> bool:
    """Whether a shortcut that is called as it is may run twice."""
    return type(shortcut) in (PadShortcut, nn.Conv2d) and called_plainly(shortcut) is None


def _recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of which only x is kept; statistics are gathered and counted once."""
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False, context_fn=tape.contexts)


def _keeping_convolutions(x: Tensor, steps: tuple[Step, ...], then: nn.Module | None) -> Tensor:
    """Every BN + ReLU that a convolution or `then` reads is computed again from the convolution in front of it."""
    if steps[0].conv is None and isinstance(steps[-1].addend, nn.Module):  # read twice: kept
        (x, _), steps = _pre_activation(x, steps[0]), steps[1:]
    z = x if steps[0].conv is None else steps[0].conv(x)
    for step, following in itertools.pairwise(steps):
        end = following.conv if following.bn is not None else lambda y: _run_step(y, steps[-1], x)
        z = _recomputed(lambda z, step=step, end=end: end(_explained_bn(z, step, x)), z)
    if steps[-1].bn is None:
        return z
    if then is not None:
        return _recomputed(lambda z: then(_explained_bn(z, steps[-1], x)), z)
    return _explained_bn(z, steps[-1], x)


def _explained_bn(z: Tensor, step: Step, source: Tensor) -> Tensor:
    if explainer is not None:
        explainer.begin(step, None)
    z = _bn(z, step, source)
    if explainer is not None:
        explainer.end()
    return z


def _pre_activation(x: Tensor | Sum, step: Step) -> tuple[Tensor, Tensor]:
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


def _run_step(x: Tensor, step: Step, source: Tensor, hand_over: bool = False) -> Tensor | Sum:
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
    return not (_registry.fuses(x.device) or synchronizes(step.bn) or tape.active) or unfusable(step) is not None


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
    inner = _projection(step.addend)
    return step.addend(source) if inner is None else _run_step(source, inner, source)


def _projection(shortcut: nn.Module) -> Step | None:
    """The step that a `Sequential(conv, bn)` without hooks stands for."""
    if type(shortcut) is nn.Sequential and len(shortcut) == 2 and called_plainly(shortcut) is None:
        return Step(shortcut[0], shortcut[1])
    return None


def _conv_bn(x: Tensor, step: Step, residual: Tensor | None) -> Tensor:
    conv, bn = step.conv, step.bn
    vectors = (None,) * 4 if bn is None else (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return conv_bn_act(
        x,
        conv.weight,
        *vectors,
        bias=conv.bias,
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
    inner = _projection(step.addend) if isinstance(step.addend, nn.Module) else None
    if inner is not None and _joins(bn, inner):
        if explainer is not None:
            explainer.joined(inner)
        residual = inner.conv(source)
        residual_bn = (inner.bn.weight, inner.bn.bias, *statistics(inner.bn))
        momentum(inner.bn)
    else:
        residual = _shortcut(step, source)
        residual = None if residual is None else residual.to(x.dtype)  # under autocast the block's input may be float32
    return batch_norm_act(
        x,
        bn.weight,
        bn.bias,
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
