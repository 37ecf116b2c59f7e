"""A BN in training as one autograd node: one call forward, one backward, which go to their plans."""

from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor

from ... import dispatch
from ...dispatch import plans, registry, speed
from .._calls import wrote
from .._short import batched, plain, unwatched
from . import calls, formulas
from .training import BackwardCall, TrainingCall

_DIFFERENTIABLE = ("x", "weight", "bias", "residual", "residual_weight", "residual_bias", "pre_add")


class Route:
    """The plans of a kind of calls."""

    __slots__ = ("plan", "backward", "timed")

    def __init__(self, plan: plans.Plan, timed: bool = False) -> None:
        """timed: its calls are not the model's."""
        self.plan, self.timed = plan, timed
        self.backward: dict[Hashable, plans.Plan] = {}


def keyed(call: TrainingCall) -> tuple:
    """All that its validity and its plan depend on."""
    images = [call.x.is_neg(), call.residual is not None and call.residual.is_neg()]
    return (
        *(*images, call.pre_add is not None and call.pre_add.is_neg()),
        *[
            None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.__class__, t.data_ptr() & 15)
            for t in call[:5]
        ],
        *[
            None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.__class__, t.data_ptr() & 15)
            for t in call[7:12]
        ],
        *(call.eps, call.two_bn, call.relu, registry._forced, torch._C._get_deterministic_algorithms()),
        None
        if (t := call.pre_add) is None
        else (t.shape, t.stride(), t.dtype, t.device, t.__class__, t.data_ptr() & 15),
    )


def train(key: Hashable, call: TrainingCall) -> Tensor | tuple[Tensor, Tensor]:
    """A valid call of plain tensors, of a kind that was not seen yet."""
    times = dispatch.timed(call)
    if min(times, key=lambda name: times[name], default=None) == registry.PLAIN:
        slower = tuple((name, dispatch.slower(name, times)) for name in times if name != registry.PLAIN)
        serves = partial(_eager, registry.Choice(registry.PLAIN, slower))
        plans.keep(plans.short, key, serves)
        return serves(call)
    y = run(None, call)
    plan = plans.kept.get((call.key(), registry.get_backend()))
    if plan is not None:
        plans.keep(plans.short, key, partial(run, Route(plan)))
    return y


def _eager(choice: registry.Choice, call: TrainingCall) -> Tensor | tuple[Tensor, Tensor]:
    registry.record(call.op, choice, call)
    return call.eager()


def trial(backend: str, call: TrainingCall) -> Callable[[], None]:
    """What is timed of a backend: forward and backward on copies of the call."""
    calls, dy = speed.rotated(call), torch.ones_like(call.x)
    serves = TrainingCall.eager
    if backend != registry.PLAIN:
        plan = registry.implementation(backend, call.op).plan(call, None)
        serves = partial(run, Route(plans.Plan(registry.Choice(backend, ()), plan), timed=True))

    def launch() -> None:
        copy = next(calls)
        given = {n: t for n in _DIFFERENTIABLE if (t := getattr(copy, n)) is not None}
        leaves = {n: t.detach().requires_grad_() for n, t in given.items()}
        with torch.enable_grad():
            y = serves(copy._replace(**leaves))
        torch.autograd.grad(y if isinstance(y, Tensor) else y[0], list(leaves.values()), dy)

    return launch


def run(route: Route | None, call: TrainingCall) -> Tensor | tuple[Tensor, Tensor]:
    """act(BN(x + pre_add) + residual) and, with a pre_add, the sum."""
    bn2 = call.residual_weight, call.residual_bias
    y = _Train.apply(route, call, call.x, call.weight, call.bias, call.residual, *bn2, call.pre_add)
    wrote(call.written())
    return y


class _Train(torch.autograd.Function):
    @staticmethod
    def forward(ctx, route, call, *tensors):
        if route is None:
            results = dispatch.serve(call)
        else:
            if registry.listener is not None and not route.timed:
                registry.listener(call.name, route.plan.choice, call)
            results = route.plan.run(call)
        y, mask, total, mean, var, mean2, var2 = results
        ctx.set_materialize_grads(False)
        ctx.route, ctx.relu, ctx.eps = route, call.relu, call.eps
        bn2 = (call.residual, call.residual_weight, call.residual_bias, mean2, var2) if call.two_bn else (None,) * 5
        z = call.x if call.pre_add is None else total
        ctx.save_for_backward(z, call.weight, call.bias, mean, var, *bn2, mask if call.save_mask else None)
        return y if call.pre_add is None else (y, total)

    @staticmethod
    def backward(ctx, dy, dtotal=None):
        needs = ctx.needs_input_grad[2:]  # x, weight, bias, residual, its weight and bias, pre_add
        z, weight, bias, mean, var, residual, weight2, bias2, mean2, var2, mask = ctx.saved_tensors
        dy = torch.zeros_like(z) if dy is None else dy
        bn = (z, weight, bias, mean, var, ctx.eps, residual, weight2, bias2, mean2, var2)
        if torch.is_grad_enabled() or batched(dy):  # create_graph, is_grads_batched
            asked = (needs[0] or needs[6], *needs[1:6])
            dx, *others = formulas.differentiable_backward(dy, *bn, mask, ctx.relu, dtotal, asked, True)
            return None, None, dx if needs[0] else None, *others, dx if needs[6] else None
        call = BackwardCall(dy, *bn, mask, ctx.relu, dtotal, needs[0] or needs[6], needs[3])
        dx, dresidual, sum_dz, sum_xhat, sum_rhat = _gradients(ctx.route, call)
        return (
            *(None, None, dx if needs[0] else None),
            _like(sum_xhat, weight) if needs[1] else None,
            _like(sum_dz, bias) if needs[2] else None,
            dresidual if needs[3] else None,
            _like(sum_rhat, weight2) if needs[4] else None,
            _like(sum_dz, bias2) if needs[5] else None,
            dx if needs[6] else None,
        )


def _like(gradient: Tensor, vector: Tensor) -> Tensor:
    return gradient if gradient.dtype is vector.dtype else gradient.to(vector.dtype)


def _gradients(route: Route | None, call: BackwardCall) -> tuple[Tensor, ...]:
    if not (unwatched() and plain((call.dy, call.dtotal))):
        sums = calls.backward_sums(*call.sums())
        return *calls.backward_dx(*call.dx(sums)), *sums
    if route is None:
        return dispatch.serve(call)
    dy, dtotal, z, residual = call.dy, call.dtotal, call.z, call.residual
    kind = (  # of z and the residual too: hooks on saved tensors may give them back in another layout
        *(z.stride(), z.dtype, z.data_ptr() & 15),
        None if residual is None else (residual.stride(), residual.dtype, residual.data_ptr() & 15),
        *(dy.stride(), dy.dtype, dy.data_ptr() & 15, call.need_dx, call.need_dresidual, registry._forced),
        None if dtotal is None else (dtotal.stride(), dtotal.dtype, dtotal.data_ptr() & 15),
    )
    plan = route.backward.get(kind)
    if plan is not None:
        return plan.run(call)
    results, plan, lasting = dispatch.first(call, route.plan.choice.backend)
    if lasting:
        route.backward[kind] = plan
    return results
