"""The operators behind `batch_norm_act` in the extension."""

from typing import TYPE_CHECKING, Any

from .. import batch_norm
from . import kernels

if TYPE_CHECKING:
    from ...ops.batch_norm_act.calls import StepCall


def _planner(name: str) -> batch_norm.Planner:
    """The extension plans in its own host functions."""
    return lambda *args: lambda *args: getattr(kernels, name)(*args)


LAUNCHERS = {
    "statistics": "statistics",
    "batch_statistics": "batch_statistics",
    "merge_ranks": "merge_ranks",
    "apply": "batch_norm_act",
    "apply_with_mask": "apply_with_mask",
    "backward_sums": "backward_sums",
    "backward_dx": "backward_dx",
}
PLANNERS: dict[str, Any] = {step: _planner(name) for step, name in LAUNCHERS.items()}
unsupported = batch_norm.unsupported


def configs(call: "StepCall") -> list[None]:
    return [None]


def kernel_class(call: "StepCall", config: None) -> str:
    return batch_norm.kernel_class(call)


def plan(call: "StepCall", config: None) -> batch_norm.Run:
    return batch_norm.plan(call, PLANNERS)
