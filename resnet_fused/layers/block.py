"""A block's steps, one after the other: fused, or as torchvision calls their modules."""

from typing import Any, Literal, NamedTuple, Protocol, TypeGuard, cast, overload

from torch import Tensor, nn

from ..dispatch import registry
from ..ops import batch_norm_act, conv_bn_act
from ..ops.batch_norm_act.tape import tape
from . import norms
from .steps import (
    INPUT,
    BatchNorm,
    Fusable,
    Step,
    batch_statistics,
    called_plainly,
    fusable,
    group,
    momentum,
    needs_grad,
    obstacle,
    statistics,
    synchronizes,
    tensor,
    unfusable,
)

Addend = nn.Module | Step | Literal["input"] | None


class Explainer(Protocol):
    """Is told what runs."""

    def begin(self, step: Step, unfusable: str | None, takes_over: bool = False, pool: nn.Module | None = None) -> None:
        """Until `end`, operators are the step's.

        takes_over: its BN adds what the block before left unadded.
        pool: the pooling that is part of it.
        """

    def end(self) -> None: ...

    def joined(self, inner: Fusable) -> None:
        """The shortcut's BN runs in the pass of the step that is open."""


explainer: Explainer | None = None  # set by `explain` while it runs a model


class Sum(NamedTuple):
    """Tensors [N, C, H, W], of which the next BN adds the second in its own pass."""

    x: Tensor
    pre_add: Tensor | None


class Projection(Fusable, Protocol):
    """A fusable step of a convolution and its BN."""

    @property
    def conv(self) -> nn.Conv2d | None: ...

    @property
    def bn(self) -> BatchNorm: ...


@overload
def run_block(x: Tensor, steps: tuple[Step, ...], pre_add: Tensor | None = None) -> Tensor: ...


@overload
def run_block(x: Tensor, steps: tuple[Step, ...], pre_add: Tensor | None, hand_over: Literal[True]) -> Sum: ...


def run_block(
    x: Tensor, steps: tuple[Step, ...], pre_add: Tensor | None = None, hand_over: bool = False
) -> Tensor | Sum:
    block_input = entry = x
    if steps[0].conv is None:
        entry, block_input = pre_activation(x, steps[0], pre_add)
        x, steps = entry, steps[1:]
    for step in steps:
        source = block_input if step.addend == INPUT else entry
        last = hand_over and step.bn is None and step.addend is not None
        if last and _fuses(step, x) and step.conv is not None:
            return Sum(step.conv(x), _shortcut(step.addend, source))
        x = run_step(x, step, source)
    return Sum(x, None) if hand_over else x


def as_modules(x: Any, steps: tuple[Step, ...]) -> Any:
    """The steps' modules on a `torch.fx.Proxy`, in torchvision's order: the graph that torch.fx has of its blocks."""
    y = read = x  # read: by the shortcut's module
    for step in steps:
        for module in (step.conv, step.bn):
            y = y if module is None else module(y)
        if step.addend is not None:
            assert not isinstance(step.addend, Step)  # a module's own forward is no block of ours
            y = y + (x if step.addend == INPUT else step.addend(read))
        y = y if step.act is None else step.act(y)
        if step.conv is None:
            read = y
    return y


def explained_bn(z: Tensor, step: Step, source: Tensor) -> Tensor:
    if explainer is not None:
        explainer.begin(step, None)
    z = _bn(z, cast(BatchNorm, step.bn), step.act, step.addend, source)
    if explainer is not None:
        explainer.end()
    return z


def pre_activation(x: Tensor, step: Step, pre_add: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """act(bn(x + pre_add)) and x + pre_add."""
    if pre_add is not None and pre_add.dtype != x.dtype:  # under autocast
        x, pre_add = x + pre_add, None
    if explainer is not None:
        explainer.begin(step, unfusable(step), takes_over=pre_add is not None)
    if not _fuses(step, x):
        x = x if pre_add is None else x + pre_add
        y = _modules(x, step, x)
    else:
        assert step.bn is not None  # what has neither convolution nor BN is no step
        if pre_add is None:
            y = _bn(x, step.bn, step.act, step.addend, x)
        else:
            y, x = _bn(x, step.bn, step.act, step.addend, x, pre_add)
    if explainer is not None:
        explainer.end()
    return y, x


def run_step(x: Tensor, step: Step, source: Tensor) -> Tensor:
    """source: what the step's addend is, or goes through its module."""
    if explainer is not None:
        explainer.begin(step, unfusable(step))
    if not _fuses(step, x):
        x = _modules(x, step, source)
    else:
        conv, bn = step.conv, step.bn
        if bn is not None and (conv is None or batch_statistics(bn) or needs_grad(bn)):
            x = _bn(x if conv is None else conv(x), bn, step.act, step.addend, source)
        else:
            assert conv is not None  # what has neither convolution nor BN is no step
            x = _conv_bn(x, conv, bn, step.act, _shortcut(step.addend, source))
    if explainer is not None:
        explainer.end()
    return x


def _fuses(step: Step, x: Tensor) -> TypeGuard[Fusable]:
    """Whether the step is an operator's, not its modules called as they are.

    Raises:
        BackendUnavailable: they have to be called as they are, and a forced backend should have the step.
    """
    if not (registry.fuses(x.device) or synchronizes(step.bn) or tape.active):
        return False
    if fusable(step):
        return True
    _not_forced(*obstacle(step))
    return False


def _not_forced(module: nn.Module, reason: str) -> None:
    """A forced backend can't have the step of this module: a plain call raises, `explain` says why."""
    if registry.forced() and explainer is None:
        error = registry.not_served(f"{type(module).__name__}({module.extra_repr()})", reason)
        error.module = module
        raise error


def _modules(x: Tensor, step: Step, source: Tensor) -> Tensor:
    """torchvision's own order, addend after the main branch: gradients add up in the same order, to the same bits."""
    for module in (step.conv, step.bn):
        x = x if module is None else module(x)
    shortcut = _shortcut(step.addend, source)
    if shortcut is not None:
        x = x + shortcut if step.bn is None else x.add_(shortcut)
    return x if step.act is None else step.act(x)


def _shortcut(addend: Addend, source: Tensor) -> Tensor | None:
    if addend is None or addend == INPUT:
        return None if addend is None else source
    inner = projection(addend)
    if inner is not None:
        return run_step(source, inner, source)
    assert isinstance(addend, nn.Module)
    if _projects(addend):
        _not_forced(addend, f"the shortcut's projection {called_plainly(addend)}")
    return addend(source)


def projection(shortcut: nn.Module | Step) -> Step | None:
    """The step that a `Sequential(conv, bn)` without hooks stands for."""
    if isinstance(shortcut, Step):
        return shortcut
    return Step(*shortcut) if _projects(shortcut) and called_plainly(shortcut) is None else None


def _projects(shortcut: nn.Module) -> TypeGuard[nn.Sequential]:
    return type(shortcut) is nn.Sequential and len(shortcut) == 2


def _conv_bn(x: Tensor, conv: nn.Conv2d, bn: BatchNorm | None, act: nn.ReLU | None, residual: Tensor | None) -> Tensor:
    padding: Any = conv.padding  # not by a name: `fusable` has looked
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = (None, None, None, None)
    if bn is not None:
        vectors = (tensor(bn, "weight"), tensor(bn, "bias"), tensor(bn, "running_mean"), tensor(bn, "running_var"))
    relu, rest = _activation(bn, act)
    y = conv_bn_act(
        x,
        tensor(conv, "weight"),
        *vectors,
        bias=tensor(conv, "bias"),
        eps=0.0 if bn is None else bn.eps,
        stride=conv.stride,
        padding=padding,
        dilation=conv.dilation,
        groups=conv.groups,
        residual=residual,
        act="relu" if relu else "none",
    )
    return _called(rest, y)


def _activation(bn: BatchNorm | None, act: nn.Module | None) -> tuple[bool, tuple[nn.Module, ...]]:
    """Whether the step ends in ReLU, and what its BN calls after that."""
    if act is not None or bn is None or type(bn) in norms.OWN:
        return act is not None, ()
    return norms.inner(bn)


def _called(modules: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


@overload
def _bn(x: Tensor, bn: BatchNorm, act: nn.Module | None, addend: Addend, source: Tensor) -> Tensor: ...


@overload
def _bn(
    x: Tensor, bn: BatchNorm, act: nn.Module | None, addend: Addend, source: Tensor, pre_add: Tensor
) -> tuple[Tensor, Tensor]: ...


def _bn(
    x: Tensor, bn: BatchNorm, act: nn.Module | None, addend: Addend, source: Tensor, pre_add: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """After the step's convolution: BN, the shortcut's BN where it may join (in inference `_conv_bn`), add, ReLU."""
    residual, residual_bn = None, None
    inner = projection(addend) if isinstance(addend, (nn.Module, Step)) else None
    if inner is not None and _joins(inner, bn):
        if explainer is not None:
            explainer.joined(inner)
        residual = source if inner.conv is None else inner.conv(source)
        residual_bn = (tensor(inner.bn, "weight"), tensor(inner.bn, "bias"), *statistics(inner.bn))
        momentum(inner.bn)
    else:
        residual = _shortcut(addend, source)
        residual = None if residual is None else residual.to(x.dtype)  # under autocast the block's input may be float32
    relu, rest = _activation(bn, act)
    y = batch_norm_act(
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
        act="relu" if relu else "none",
        group=group(bn),
    )
    return (_called(rest, y[0]), y[1]) if isinstance(y, tuple) else _called(rest, y)


def _joins(inner: Step, bn: BatchNorm) -> TypeGuard[Projection]:
    """Whether the shortcut's BN can run in the main BN's pass: one operator takes one mode, momentum and eps."""
    return (
        fusable(inner)
        and (other := inner.bn) is not None
        and not (norms.frozen(bn) or norms.frozen(other) or norms.inner(other) != (False, ()))
        and batch_statistics(bn) == batch_statistics(other)
        and (bn.training, bn.eps, bn.momentum, bn.track_running_stats)
        == (other.training, other.eps, other.momentum, other.track_running_stats)
        and bn.momentum is not None
        and group(bn) is group(other)
    )
