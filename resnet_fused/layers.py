"""One call per block: which of the model's steps are fused, and how.

A step is a convolution, its BN, an activation and what is added before it. It is fused only if its modules are exactly
PyTorch's own, without hooks, parametrizations or forwards set on an instance; otherwise they are called as torchvision
calls them.
"""

import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils.checkpoint import checkpoint

from . import _registry
from .ops import batch_norm_act, conv_bn_act
from .ops.batch_norm_act.tape import tape

Recompute = Literal["activations", "blocks"] | None

INPUT: Literal["input"] = "input"

explainer = None  # set by `explain` while it runs a model


class Step(NamedTuple):
    """act(bn(conv(x)) + addend); addend: `INPUT`, the block's input, or a module to send it through."""

    conv: nn.Module
    bn: nn.Module
    act: nn.Module | None = None
    addend: nn.Module | Literal["input"] | None = None


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


def run(x: Tensor, *steps: Step, then: nn.Module | None = None, recompute: Recompute = None) -> Tensor:
    """The block of these steps on x [N, C, H, W], then the module `then`; a leaf to torch.fx.

    recompute: what backward computes again instead of keeping: "activations", the outputs of all BN + ReLU but the
        block's own output; "blocks", everything but x.
    """
    if recompute is not None and _recomputes(steps):
        if recompute == "blocks":
            return _recomputed(lambda x: _block(x, steps, then), x)
        return _keeping_convolutions(x, steps, then)
    return _block(x, steps, then)


def _block(x: Tensor, steps: tuple[Step, ...], then: nn.Module | None) -> Tensor:
    block_input = x
    for step in steps:
        x = _run_step(x, step, block_input)
    return x if then is None else then(x)


def _recomputes(steps: tuple[Step, ...]) -> bool:
    """Compiled graphs decide for themselves what they keep; a module that is called as it is may not run twice."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    addends = [s.addend for s in steps if isinstance(s.addend, nn.Module) and not _repeats(s.addend)]
    inner = [_projection(a) for a in addends]
    return None not in inner and all(_unfusable(s) is None for s in (*steps, *inner))


def _repeats(shortcut: nn.Module) -> bool:
    """Whether a shortcut that is called as it is may run twice."""
    return type(shortcut) is PadShortcut and _called_plainly(shortcut) is None


def _recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of which only x is kept; statistics are gathered and counted once."""
    entries: list = []
    contexts = lambda: (tape.recording(entries), tape.replaying(entries))  # noqa: E731
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _keeping_convolutions(x: Tensor, steps: tuple[Step, ...], then: nn.Module | None) -> Tensor:
    """Every BN + ReLU that a convolution or `then` reads is computed again from the convolution in front of it."""
    z = steps[0].conv(x)
    for step, following in itertools.pairwise(steps):
        z = _recomputed(lambda z, step=step, conv=following.conv: conv(_bn(z, step, x)), z)
    if then is not None:
        return _recomputed(lambda z: then(_bn(z, steps[-1], x)), z)
    return _bn(z, steps[-1], x)


def _run_step(x: Tensor, step: Step, block_input: Tensor) -> Tensor:
    if explainer is not None:
        explainer.begin(step, _unfusable(step))
    plain = not (_registry.fuses(x.device) or _synchronizes(step.bn) or tape.active)
    if plain or _unfusable(step) is not None:
        x = _modules(x, step, block_input)
    elif _batch_statistics(step.bn) or _needs_grad(step.bn):
        x = _bn(step.conv(x), step, block_input)
    else:
        x = _conv_bn(x, step, _shortcut(step, block_input))
    if explainer is not None:
        explainer.end()
    return x


def _modules(x: Tensor, step: Step, block_input: Tensor) -> Tensor:
    """torchvision's own order, addend after the main branch: gradients add up in the same order, to the same bits."""
    x = step.bn(step.conv(x))
    if step.addend is not None:
        x += _shortcut(step, block_input)
    return x if step.act is None else step.act(x)


def _shortcut(step: Step, block_input: Tensor) -> Tensor | None:
    if step.addend is None or step.addend == INPUT:
        return None if step.addend is None else block_input
    inner = _projection(step.addend)
    return step.addend(block_input) if inner is None else _run_step(block_input, inner, block_input)


def _projection(shortcut: nn.Module) -> Step | None:
    """The step that a `Sequential(conv, bn)` without hooks stands for."""
    if type(shortcut) is nn.Sequential and len(shortcut) == 2 and _called_plainly(shortcut) is None:
        return Step(shortcut[0], shortcut[1])
    return None


def _conv_bn(x: Tensor, step: Step, residual: Tensor | None) -> Tensor:
    conv, bn = step.conv, step.bn
    return conv_bn_act(
        x,
        conv.weight,
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        bias=conv.bias,
        eps=bn.eps,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        residual=residual,
        act="none" if step.act is None else "relu",
    )


def _bn(x: Tensor, step: Step, block_input: Tensor) -> Tensor:
    """After the step's convolution: BN, the shortcut's BN where it may join, add and ReLU as one."""
    bn = step.bn
    residual, residual_bn = None, None
    inner = _projection(step.addend) if isinstance(step.addend, nn.Module) else None
    if inner is not None and _joins(bn, inner):
        if explainer is not None:
            explainer.joined(inner)
        residual = inner.conv(block_input)
        residual_bn = (inner.bn.weight, inner.bn.bias, *_statistics(inner.bn))
        _momentum(inner.bn)
    else:
        residual = _shortcut(step, block_input)
    return batch_norm_act(
        x,
        bn.weight,
        bn.bias,
        *_statistics(bn),
        residual=residual,
        residual_bn=residual_bn,
        training=_batch_statistics(bn),
        momentum=_momentum(bn),
        eps=bn.eps,
        act="none" if step.act is None else "relu",
        group=_group(bn),
    )


def _joins(bn: nn.Module, inner: Step) -> bool:
    """Whether the shortcut's BN can run in the main BN's pass: one operator takes one mode, momentum and eps."""
    other = inner.bn
    return (
        _unfusable(inner) is None
        and _batch_statistics(bn) == _batch_statistics(other)
        and (bn.training, bn.eps, bn.momentum, bn.track_running_stats)
        == (other.training, other.eps, other.momentum, other.track_running_stats)
        and bn.momentum is not None
        and _group(bn) is _group(other)
    )


def _synchronizes(bn: nn.Module) -> bool:
    """SyncBatchNorm in training; nn.SyncBatchNorm itself refuses the CPU, this package's operator serves it too."""
    return type(bn) is nn.SyncBatchNorm and bn.training


def _group(bn: nn.Module) -> dist.ProcessGroup | None:
    """The processes over which the statistics are gathered, or None for this one alone."""
    if not (_synchronizes(bn) and dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _batch_statistics(bn: nn.Module) -> bool:
    return bn.training or bn.running_mean is None


def _statistics(bn: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics that the call uses, as nn.BatchNorm2d decides: not those that are kept but not tracked."""
    if bn.training and not bn.track_running_stats:
        return None, None
    return bn.running_mean, bn.running_var


def _momentum(bn: nn.Module) -> float:
    """nn.BatchNorm2d's bookkeeping: counts the batch, and resolves momentum=None to the cumulative average."""
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None and not tape.replays:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    return momentum


def _needs_grad(bn: nn.Module) -> bool:
    return torch.is_grad_enabled() and bn.weight is not None and (bn.weight.requires_grad or bn.bias.requires_grad)


def _unfusable(step: Step) -> str | None:
    """Why the step's modules have to be called as they are, or None."""
    kinds = (("convolution", step.conv, (nn.Conv2d,)), ("BN", step.bn, (nn.BatchNorm2d, nn.SyncBatchNorm)))
    for role, module, types in kinds if step.act is None else (*kinds, ("activation", step.act, (nn.ReLU,))):
        if type(module) not in types:
            return f"the {role} is {type(module).__name__}, not exactly {' or '.join(t.__name__ for t in types)}"
        reason = _called_plainly(module)
        if reason is not None:
            return f"the {role} ({type(module).__name__}) {reason}"
    if step.conv.padding_mode != "zeros" or isinstance(step.conv.padding, str):
        return f"the convolution pads by {step.conv.padding_mode!r}, {step.conv.padding!r}; numbers of zeros are fused"
    return None


def _called_plainly(module: nn.Module) -> str | None:
    """Why calling the module is more than running its class's forward, or None where it is not."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    if "forward" in module.__dict__ or module._compiled_call_impl is not None:
        return "has a forward set on the instance"
    return "is called under global module hooks" if _module._has_any_global_hook() else None
