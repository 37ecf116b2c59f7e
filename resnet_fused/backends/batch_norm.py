"""What the backends of `batch_norm_act` share: its steps, each made of one backend's launchers."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .conv import vectors_unsupported
from .layout import dense_call, filled, given, is_dense

if TYPE_CHECKING:
    from ..ops.batch_norm_act.calls import StepCall

Results = tuple[Tensor | None, ...]
Planner = Callable[..., Callable[..., Results]]  # arguments -> a launcher for all like them
Run = Callable[[Any], Results]  # of a call


def unsupported(call: "StepCall") -> str | None:
    """Why the kernels can't take these dtypes, or None."""
    return vectors_unsupported(call[0], call.vectors())


def kernel_class(call: "StepCall") -> str:
    """Calls that run the same precompiled kernels share a class: by dtypes, alignments, channels and what is given."""
    C = call[0].shape[1]
    return f"{call[0].dtype}/C{min(C, 256)}/{C % 16}/{given(call)}"


def plan(call: Any, planners: dict[str, Planner]) -> Run:
    """The step that the call is of, with every tensor made dense."""
    copies = not all(map(is_dense, call))
    call = dense_call(call)
    run = {"training": _training, "backward": _backward}.get(call.step, _step)(call, planners)
    return partial(_on_copies, run) if copies else run


def _on_copies(run: Run, call: Any) -> Results:
    """What a step writes in place goes back where it came from."""
    copy = dense_call(call)
    results = run(copy)
    for mine, written in zip(call.written(), copy.written(), strict=True):
        if mine.data_ptr() != written.data_ptr():
            mine.copy_(written)
    return results


def _step(call: Any, planners: dict[str, Planner]) -> Run:
    run = _apply(call, planners) if call.step == "apply" else planners[call.step](*call)
    return lambda call: filled(run(*call), call.mean if call.step == "backward_sums" else call[0])


def _apply(call: Any, planners: dict[str, Planner]) -> Callable[..., Results]:
    """y, the ReLU's mask and x + pre_add, of which the last two may have no elements."""
    if not call.save_mask:
        one_pass = planners["apply"](*call[:-1])

        def run(*args):
            y, total = one_pass(*args[:-1])
            return y, y.new_empty(0, dtype=torch.uint8), total

        return run
    with_mask = planners["apply_with_mask"](*call[:7])

    def run_with_mask(x, weight, bias, mean, var, eps, residual, *rest):
        pre_add = rest[4]
        total = None if pre_add is None else x + pre_add
        return *with_mask(x if total is None else total, weight, bias, mean, var, eps, residual), total

    return run_with_mask


def _training(call: Any, planners: dict[str, Planner]) -> Run:
    """Statistics, running statistics and the pass that normalises."""
    statistics = planners["batch_statistics"](call.x, call.pre_add, call.running_mean, call.running_var)
    statistics2 = planners["batch_statistics"](call.residual, None, *call[10:12]) if call.two_bn else None
    save_mask, eps, relu = call.save_mask, call.eps, call.relu
    if save_mask:
        one_pass = planners["apply_with_mask"](call.x, *call[1:3], None, None, eps, call.residual)
    else:
        one_pass = planners["apply"](call.x, *call[1:3], None, None, eps, *call[7:10], None, None, None, relu)

    def run(call: Any) -> Results:
        x, weight, bias, running_mean, running_var, momentum, _, residual, weight2, bias2, *running2, _, pre_add = call[
            :14
        ]
        mean, var, total = statistics(x, pre_add, running_mean, running_var, momentum)
        mean2 = var2 = None
        if statistics2 is not None:
            mean2, var2, _ = statistics2(residual, None, *running2, momentum)
        z = x if pre_add is None else total
        if save_mask:
            y, mask = one_pass(z, weight, bias, mean, var, eps, residual)
        else:
            y, _ = one_pass(z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, None, relu)
            mask = None
        return y, mask, total, mean, var, mean2, var2

    return run


def _backward(call: Any, planners: dict[str, Planner]) -> Run:
    sums = planners["backward_sums"](*call[:14])
    two, rest = call.residual_mean is not None, call[14:]
    gradients = planners["backward_dx"](*call[:14], None, None, None, None, *rest)

    def run(call: Any) -> Results:
        common, rest = call[:14], call[14:]
        sum_dz, sum_xhat, sum_rhat = sums(*common)
        dx, dresidual = gradients(*common, sum_dz, sum_xhat, sum_rhat if two else None, None, *rest)
        return dx, dresidual, sum_dz, sum_xhat, sum_rhat

    return run
