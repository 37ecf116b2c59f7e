"""batch_norm_act in training: batch statistics, the join's 1-bit mask, and the backward pass."""

from .forward import apply_with_mask, plan_apply_with_mask, plan_batch_statistics, plan_statistics, statistics
from .gradients import backward_dx, backward_sums, plan_backward_dx, plan_backward_sums
from .ranks import merge_ranks, plan_merge_ranks

__all__ = [
    "apply_with_mask",
    "backward_dx",
    "backward_sums",
    "merge_ranks",
    "plan_apply_with_mask",
    "plan_backward_dx",
    "plan_backward_sums",
    "plan_batch_statistics",
    "plan_merge_ranks",
    "plan_statistics",
    "statistics",
]
