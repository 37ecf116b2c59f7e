"""What backward computes again instead of keeping it."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops.batch_norm_act.tape import tape
from .block import explained_bn, pre_activation, projection, run_step
from .pad_shortcut import PadShortcut
from .steps import Step, called_plainly, fusable

REPEATABLE = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Identity)  # the same again, and nothing else


def recomputes(steps: tuple[Step, ...]) -> bool:
    """Compiled graphs decide for themselves what they keep; a module that is called as it is may not run twice."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    addends = [s.addend for s in steps if isinstance(s.addend, nn.Module) and not _repeats(s.addend)]
    inner = [projection(a) for a in addends]
    return all(s is not None and fusable(s) for s in (*steps, *inner))


def _repeats(shortcut: nn.Module) -> bool:
    """Whether a shortcut that is called as it is may run twice."""
    return type(shortcut) in (PadShortcut, nn.Conv2d) and called_plainly(shortcut) is None


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of which only x is kept; statistics are gathered and counted once."""
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False, context_fn=tape.contexts)


def keeping_convolutions(x: Tensor, steps: tuple[Step, ...], then: nn.Module | None) -> Tensor:
    """Every BN + ReLU that a convolution or `then` reads is computed again from the convolution in front of it."""
    if steps[0].conv is None and isinstance(steps[-1].addend, nn.Module):  # read twice: kept
        (x, _), steps = pre_activation(x, steps[0]), steps[1:]
    z = x if steps[0].conv is None else steps[0].conv(x)
    last = steps[-1]
    for step, following in itertools.pairwise(steps):
        end = following.conv if following.bn is not None else lambda y: run_step(y, last, x)
        z = recomputed(_bn_then(end, step, x), z)
    if last.bn is None:
        return z
    return explained_bn(z, last, x) if then is None else recomputed(_bn_then(then, last, x), z)


def _bn_then(end: Callable[[Tensor], Tensor] | None, step: Step, source: Tensor) -> Callable[[Tensor], Tensor]:
    assert end is not None  # a step after the first has a convolution
    return lambda z: end(explained_bn(z, step, source))
