"""batch_norm_act in training: batch statistics, the join's 1-bit mask, and the backward pass."""

from .backward import backward_dx, backward_sums
from .forward import apply_with_mask, statistics

__all__ = ["apply_with_mask", "backward_dx", "backward_sums", "statistics"]
