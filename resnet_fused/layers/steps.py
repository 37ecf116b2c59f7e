"""Questions about a step's modules: whether they may be fused, which statistics a BN takes, over which processes."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol, TypeGuard, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops._checks import transformed
from ..ops.batch_norm_act.tape import tape
from . import norms
from .calls import called_plainly

INPUT: Literal["input"] = "input"
BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm


class Step(NamedTuple):
    """act(bn(conv(x)) + addend); a first step may lack the convolution, a last one BN and activation.

    addend: `INPUT`, the block's input, or a module or step to send through what the block's first convolution reads.
    """

    conv: nn.Module | None
    bn: nn.Module | None = None
    act: nn.Module | None = None
    addend: "nn.Module | Step | Literal['input'] | None" = None


class Fusable(Protocol):
    """A step whose modules are PyTorch's own: see `fusable`."""

    @property
    def conv(self) -> nn.Conv2d | None: ...

    @property
    def bn(self) -> BatchNorm | None: ...

    @property
    def act(self) -> nn.ReLU | None: ...

    @property
    def addend(self) -> nn.Module | Step | Literal["input"] | None: ...


def synchronizes(bn: nn.Module | None) -> TypeGuard[nn.SyncBatchNorm]:
    """SyncBatchNorm in training; nn.SyncBatchNorm itself refuses the CPU, this package's operator serves it too."""
    return isinstance(bn, nn.SyncBatchNorm) and bn.training


def group(bn: BatchNorm) -> dist.ProcessGroup | None:
    """The processes over which the statistics are gathered, or None for this one alone."""
    if not (synchronizes(bn) and dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def batch_statistics(bn: BatchNorm) -> bool:
    return bn.training and not norms.frozen(bn) or tensor(bn, "running_mean") is None


def statistics(bn: BatchNorm) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics that the call uses, as nn.BatchNorm2d decides: not those that are kept but not tracked."""
    if bn.training and not norms.frozen(bn) and not bn.track_running_stats:
        return None, None
    return tensor(bn, "running_mean"), tensor(bn, "running_var")


@overload
def tensor(module: nn.Conv2d, name: Literal["weight"]) -> Tensor: ...


@overload
def tensor(module: nn.Module, name: str) -> Tensor | None: ...


def tensor(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer; `nn.Module` finds them three times as slowly."""
    if not torch.compiler.is_compiling():
        found: Mapping[str, Tensor | None] = module._parameters
        if name in found:
            return found[name]
        found = module._buffers
        if name in found:
            return found[name]
    return getattr(module, name)


def momentum(bn: BatchNorm) -> float:
    """nn.BatchNorm2d's bookkeeping: counts the batch, and resolves momentum=None to the cumulative average."""
    if norms.frozen(bn):
        return 0.0
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and not tape.replays:
        counter = tensor(bn, "num_batches_tracked")
        if counter is not None and bn.momentum is None:
            counter.add_(1)
            momentum = 1.0 / float(counter)
        elif counter is not None:
            counters.add(counter)
    return momentum


class Counters(threading.local):
    """Counts batches: one by one, or those of a whole model at its end, as one operator."""

    def __init__(self) -> None:
        self._waiting: list[Tensor] | None = None

    def add(self, counter: Tensor) -> None:
        if torch.compiler.is_compiling() or self._waiting is None:
            counter.add_(1)
        else:
            self._waiting.append(counter)

    @contextmanager
    def together(self) -> Iterator[None]:
        if self._waiting is not None:
            yield
            return
        self._waiting = []
        try:
            yield
        finally:
            waiting, self._waiting = self._waiting, None
            twice = len(set(map(id, waiting))) < len(waiting)  # a module that ran twice
            if twice or transformed():  # torch.func knows no _foreach_add_
                for counter in waiting:
                    counter.add_(1)
            elif waiting:
                torch._foreach_add_(waiting, 1)


counters = Counters()


def needs_grad(bn: BatchNorm) -> bool:
    if not torch.is_grad_enabled():
        return False
    weight, bias = tensor(bn, "weight"), tensor(bn, "bias")
    return (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)


def fusable(step: Step) -> TypeGuard[Fusable]:
    """Whether a fused operator may stand for the step's modules."""
    conv, bn, act, _ = step
    return (
        (conv is None or type(conv) is nn.Conv2d and called_plainly(conv) is None and _pads_zeros(conv))
        and (bn is None or (type(bn) in norms.OWN or _other_bn(step)) and called_plainly(bn) is None)
        and (act is None or type(act) is nn.ReLU and called_plainly(act) is None)
    )


def unfusable(step: Step) -> str | None:
    """Why the step's modules have to be called as they are, or None."""
    return None if fusable(step) else obstacle(step)[1]


def _other_bn(step: Step) -> bool:
    """Whether its BN is a known one that is not PyTorch's, and the last to act in the step."""
    return norms.kind(step.bn) is not None and not _acts_too_early(step)


def _acts_too_early(step: Step) -> bool:
    return norms.inner(step.bn) != (False, ()) and (step.act is not None or step.addend is not None)


def _pads_zeros(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def obstacle(step: Step) -> tuple[nn.Module, str]:
    """The first module for whose sake an unfusable step's modules are called as they are, and why."""
    roles = (
        ("convolution", step.conv, type(step.conv) is nn.Conv2d, "Conv2d"),
        ("BN", step.bn, norms.kind(step.bn) is not None, "BatchNorm2d or SyncBatchNorm"),
        ("activation", step.act, type(step.act) is nn.ReLU, "ReLU"),
    )
    for role, module, known, exactly in roles:
        if module is None:
            continue
        if not known:
            return module, f"the {role} is {type(module).__name__}, not exactly {exactly}"
        reason = called_plainly(module)
        if reason is not None:
            return module, f"the {role} ({type(module).__name__}) {reason}"
    conv, bn = step.conv, step.bn
    if bn is not None and _acts_too_early(step):
        return bn, f"the BN ({type(bn).__name__}) has an activation of its own before what follows"
    assert isinstance(conv, nn.Conv2d)  # the others were looked at
    return conv, f"the convolution pads by {conv.padding_mode!r}, {conv.padding!r}; numbers of zeros are fused"
