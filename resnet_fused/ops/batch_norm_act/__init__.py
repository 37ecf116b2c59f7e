"""BN + activation, with the residual's add and the residual's own BN: everything between two convolutions.

    y = act(s * (z - mean) + bias + r),    s = weight / sqrt(var + eps)

where
    z      x, or x + pre_add
    mean, var    the running statistics, or in training those of z over N, H and W
    r      nothing, the residual, or the residual through its own BN: s2 * (residual - mean2) + bias2
    act    max(., 0) or the identity

Shapes: x, residual, pre_add and y [N, C, H, W] of one dtype; BN vectors [C] in float32 or x's dtype.
Dtypes: float16, bfloat16, float32 fused; every other floating dtype eager.
Layout: the fused kernels run channels_last and return it; eager keeps x's.
Errors: ValueError naming the argument; BackendUnavailable where a forced backend can't serve the call.
An infinity in a channel makes the fused kernels' running mean NaN, and infinite in eager; y is NaN in both.

Equivalent to:
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = F.relu(y + F.batch_norm(residual, *residual_bn...))
"""

from collections.abc import Sized
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...dispatch import plans, registry
from .. import _checks
from .._calls import BN, NO_BN
from .._short import batched, plain, unwatched
from . import calls, formulas, ranks
from .calls import ApplyCall
from .one_call import keyed, train
from .ranks import RanksCall
from .reference import Vectors, reference
from .tape import tape
from .training import TrainingCall

__all__ = ["batch_norm_act", "reference"]

_FUSED = (calls.statistics, calls.apply, calls.backward_sums, calls.backward_dx)
_PLAIN = (formulas.statistics, formulas.apply, formulas.backward_sums, formulas.backward_dx)


class _Options(NamedTuple):
    fused: bool  # the registered operators, or their formulas in PyTorch
    batch_statistics: bool
    two_bn: bool  # the residual has its own BN
    eps: float
    relu: bool
    group: dist.ProcessGroup | None  # over which the statistics are gathered
    momentum: float
    running: tuple[Tensor | None, Tensor | None]  # what the merge of the ranks' statistics writes, as the next
    running2: tuple[Tensor | None, Tensor | None]


def _statistics(
    o: _Options, x: Tensor, pre_add: Tensor | None, running: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """mean and variance [C] of the whole batch over every rank, its count [] (None: x's own), and x + pre_add."""
    fused = o.fused and x.numel() > 0  # a rank may have no images
    mean, m2, total = (_FUSED if fused else _PLAIN)[0](x, pre_add)
    own = x.numel() // x.shape[1]
    if o.group is None:
        return mean, m2 / own, None, total
    gathered = RanksCall(ranks.gather(mean, m2, own, o.group), *running, o.momentum)
    mean, var, count = ranks.merge(*gathered) if o.fused else gathered.plain()
    return mean, var, count, total


class _BatchNormAct(torch.autograd.Function):
    """One node for BN, the residual's BN, add and ReLU; with y its sum x + pre_add and the statistics it computed."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, residual, weight2, bias2, mean2, var2, pre_add, o):
        apply = (_FUSED if o.fused else _PLAIN)[1]
        count, total, add = None, None, pre_add
        if o.batch_statistics:
            mean, var, count, total = tape.through(lambda: _statistics(o, x, pre_add, o.running))
            if o.two_bn:
                mean2, var2, _, _ = tape.through(lambda: _statistics(o, residual, None, o.running2))
            add = None
            if pre_add is not None and total.numel() == 0:  # replayed
                total = x + pre_add
        z = x if total is None or pre_add is None else total
        save_mask = o.relu and residual is not None and not o.two_bn
        y, mask, total_ = apply(
            z, weight, bias, mean, var, o.eps, residual, weight2, bias2, mean2, var2, add, o.relu, save_mask
        )
        total = total_ if total is None else total
        z = x if pre_add is None else total
        ctx.o, ctx.has_total = o, pre_add is not None
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # the statistics have none
        kept = residual if o.two_bn else None
        ctx.save_for_backward(
            z, weight, bias, mean, var, kept, weight2, bias2, mean2, var2, mask if save_mask else None, count
        )
        statistics = (mean, var, mean2, var2, count) if o.batch_statistics else (None,) * 5
        ctx.mark_non_differentiable(*(t for t in statistics if t is not None))
        return y, total, *statistics

    @staticmethod
    def backward(ctx, dy, dtotal, *_):
        o, needs = ctx.o, ctx.needs_input_grad
        z, weight, bias, mean, var, residual, weight2, bias2, mean2, var2, mask, count = ctx.saved_tensors
        sums, dx = (_FUSED if o.fused else _PLAIN)[2:]
        dy = torch.zeros_like(z) if dy is None else dy
        given = (z, weight, bias, mean, var, o.eps, residual, weight2, bias2, mean2, var2, mask, o.relu)
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or batched(dy)):
            if o.group is not None:
                raise RuntimeError("batch_norm_act: statistics gathered over processes have no second derivative")
            asked = (needs[0] or needs[10], needs[1], needs[2], *needs[5:8])
            dx, *others = formulas.differentiable_backward(
                dy, *given, dtotal if ctx.has_total else None, asked, o.batch_statistics
            )
            dx_and_vectors = (dx if needs[0] else None, *others[:2], None, None)
            return *dx_and_vectors, *others[2:], None, None, dx if needs[10] else None, None
        common = (dy.contiguous(memory_format=torch.channels_last), *given)
        sum_dz = sum_xhat = sum_rhat = None
        if o.batch_statistics or any(needs[i] for i in (1, 2, 6, 7)):
            sum_dz, sum_xhat, sum_rhat = sums(*common)
        totals = (None, None, None)
        if o.batch_statistics:
            totals = (sum_dz, sum_xhat, sum_rhat if o.two_bn else None)
            if o.group is not None:
                joined = torch.cat([t for t in totals if t is not None])
                dist.all_reduce(joined, group=o.group)
                totals = (*joined.split(sum_dz.numel()), None)[:3]
        needs_dx = needs[0] or needs[10]
        gradients = dx(*common, *totals, count, dtotal if ctx.has_total else None, needs_dx, needs[5])
        dx, dresidual = (g if needed else None for g, needed in zip(gradients, (needs_dx, needs[5]), strict=True))

        def vector(i, like, value):
            return value.to(like.dtype) if needs[i] else None

        return (
            *(dx if needs[0] else None, vector(1, weight, sum_xhat), vector(2, bias, sum_dz), None, None),
            *(dresidual, vector(6, weight2, sum_rhat), vector(7, bias2, sum_dz), None, None),
            *(dx if needs[10] else None, None),
        )


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    residual_bn: Vectors | None = None,
    pre_add: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """act(BN(x [+ pre_add]) [+ residual | + BN2(residual)]) in one pass over memory where a backend serves it.

    Args:
        x: [N, C, H, W].
        weight, bias: BN's affine parameters [C], or None.
        running_mean, running_var: [C], or None together: then the batch's own statistics serve, as in nn.BatchNorm2d.
        residual: shaped like x; added before the activation.
        residual_bn: (weight, bias, running_mean, running_var) that the residual still has to go through.
        pre_add: shaped like x; added to x before BN, and the sum is returned too.
        training: normalise by the batch's statistics and update the running ones in place.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance.
        act: "relu" or "none".
        group: gather the batch's statistics over these processes, as SyncBatchNorm does; every rank has to call.

    Returns:
        y [N, C, H, W]; with `pre_add` the pair (y, x + pre_add).

    Raises:
        ValueError: an argument's shape, dtype or value is off; training on one value per channel.
        BackendUnavailable: a forced backend can't serve the call.
    """
    short = training and group is None and unwatched() and not tape.active
    if short:
        try:
            call = TrainingCall(
                *(x, weight, bias, running_mean, running_var, float(momentum), eps, residual),
                *((None,) * 4 if residual_bn is None else residual_bn),
                *(
                    residual_bn is not None,
                    pre_add,
                    act == "relu",
                    act == "relu" and residual is not None and residual_bn is None,
                ),
            )
        except TypeError:  # free where there is none
            _check_count(residual_bn)
            raise
        key = (*keyed(call), act)
        if (serve := plans.short.get(key)) is not None:
            return serve(call)

    _checks.image("x", x)
    _checks.act(act)
    _check_count(residual_bn)
    bn, bn2 = BN(weight, bias, running_mean, running_var), BN(*residual_bn) if residual_bn is not None else NO_BN
    _check_bn("", bn, x)
    if residual is not None:
        _checks.like("residual", residual, x.shape, x)
        _check_bn("residual_bn's ", bn2, x)
    elif residual_bn is not None:
        raise ValueError("residual_bn needs a residual, got residual=None")
    if pre_add is not None:
        _checks.like("pre_add", pre_add, x.shape, x)

    batch_statistics = training or running_mean is None
    trains = batch_statistics or _checks.needs_grad((x, weight, bias, residual, pre_add, *bn2))
    applied = ApplyCall(x, *bn, eps, residual, *bn2, pre_add, act == "relu", False)

    def against(name: str) -> str | None:
        if residual_bn is not None and (running_mean is None) != (bn2.mean is None):
            return "one BN has running statistics and the other has none"
        if x.numel() == 0 and batch_statistics and group is None:
            return "an empty batch has no statistics"
        return _checks.transformed(trains and group is None) or registry.unsupported(name, applied)

    choice = registry.choose("batch_norm_act", x.device, against, applied.order())
    fused = choice.backend != registry.PLAIN
    if not fused:
        registry.record("batch_norm_act", choice)
        if group is None:
            if training and tape.replays:  # the running statistics have counted this batch: copies are updated
                running_mean, running_var, *copies = _copies(running_mean, running_var, *bn2)
                residual_bn = residual_bn and BN(*copies)
            options: dict[str, Any] = dict(residual=residual, residual_bn=residual_bn, pre_add=pre_add)
            options |= dict(training=training, momentum=momentum, eps=eps, act=act)
            return reference(x, weight, bias, running_mean, running_var, **options)
    elif batch_statistics and group is None and x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")

    if fused and not trains:
        y, _, total = calls.apply(*applied)
        return y if pre_add is None else (y, total)
    if short and fused and plain(call):
        return train(key, call)
    merges = training and group is not None and not torch.compiler.is_compiling()  # with the ranks'
    running = (bn[2:], bn2[2:]) if merges else ((None, None),) * 2
    o = _Options(fused, batch_statistics, residual_bn is not None, eps, act == "relu", group, float(momentum), *running)
    args = (x, *bn, residual, *bn2, pre_add, o)
    y, total, mean, var, mean2, var2, count = _BatchNormAct.apply(*args)
    if training and not merges:
        count = x.numel() // x.shape[1] if count is None else count
        if not tape.replays:
            formulas.update_running(running_mean, running_var, mean, var, count, momentum)
            formulas.update_running(bn2.mean, bn2.var, mean2, var2, count, momentum)
    return y if pre_add is None else (y, total)


def _copies(*vectors: Tensor | None) -> list[Tensor | None]:
    return [v if v is None or v.requires_grad else v.clone() for v in vectors]


def _check_count(residual_bn: object) -> None:
    count = len(residual_bn) if isinstance(residual_bn, Sized) else type(residual_bn).__name__
    if residual_bn is not None and count != 4:
        raise ValueError(f"residual_bn must be the four of (weight, bias, running_mean, running_var), got {count}")


def _check_bn(owner: str, bn: Vectors, x: Tensor) -> None:
    for name, v in zip(("weight", "bias", "running_mean", "running_var"), bn, strict=True):
        _checks.vector(owner + name, v, x.shape[1], x)
    _checks.statistics(owner + "running_mean", bn[2], owner + "running_var", bn[3])
