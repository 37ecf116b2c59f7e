"""The operators behind `batch_norm_act` in Triton."""

from typing import TYPE_CHECKING

from .. import batch_norm
from .batch_norm_apply import plan_apply
from .batch_norm_train import (
    plan_apply_with_mask,
    plan_backward_dx,
    plan_backward_sums,
    plan_batch_statistics,
    plan_merge_ranks,
    plan_statistics,
)
from .launch import compiled_class

if TYPE_CHECKING:
    from ...ops.batch_norm_act.calls import StepCall

PLANNERS: dict[str, batch_norm.Planner] = {
    "statistics": plan_statistics,
    "batch_statistics": plan_batch_statistics,
    "merge_ranks": plan_merge_ranks,
    "apply": plan_apply,
    "apply_with_mask": plan_apply_with_mask,
    "backward_sums": plan_backward_sums,
    "backward_dx": plan_backward_dx,
}
unsupported = batch_norm.unsupported


def configs(call: "StepCall") -> list[None]:
    return [None]


def kernel_class(call: "StepCall", config: None) -> str:
    return compiled_class(plan(call, config), call)


def plan(call: "StepCall", config: None) -> batch_norm.Run:
    return batch_norm.plan(call, PLANNERS)
