"""SyncBatchNorm's merge of every rank's statistics."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch

_BLOCK_C = 128


@triton.jit(do_not_specialize=["world"])
def merge_ranks_kernel(
    ranks,  # [world, 2 C + 1]: every rank's means, M2 and count
    mean,  # [C]
    var,  # [C]
    count,  # []
    running_mean,  # [C] or None, as the next
    running_var,
    momentum,
    world,
    C,
    BLOCK_C: tl.constexpr,
):
    """Chan's formula, rank by rank; a rank may have counted nothing."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_range = c < C
    merged = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    n = 0.0
    for _ in range(world):
        own = tl.load(ranks + 2 * C)
        total = n + own
        part = tl.where(total > 0, tl.div_rn(own, total), 0.0)
        d = tl.load(ranks + c, in_range, other=0.0) - merged
        m2 += tl.load(ranks + C + c, in_range, other=0.0) + d * d * n * part
        merged += d * part
        n = total
        ranks += 2 * C + 1
    nothing = tl.where(n > 0, 0.0, float("nan"))  # as PyTorch's mean
    merged += nothing
    m2 += nothing
    tl.store(mean + c, merged, in_range)
    tl.store(var + c, tl.div_rn(m2, n), in_range)
    if tl.program_id(0) == 0:
        tl.store(count, n)
    if running_mean is not None:
        old = tl.load(running_mean + c, in_range, other=0.0)
        tl.store(running_mean + c, old + (merged - old) * momentum, in_range)
        old = tl.load(running_var + c, in_range, other=0.0)
        tl.store(running_var + c, old + (tl.div_rn(m2, n - 1) - old) * momentum, in_range)


def plan_merge_ranks(
    ranks: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """For all arguments of this metadata: mean [C], var [C] and count []; writes the running statistics."""
    world, width = ranks.shape
    C = width // 2
    rest = {"world": world, "C": C, "BLOCK_C": _BLOCK_C, "num_warps": 4}
    launch = Launch(merge_ranks_kernel, (triton.cdiv(C, _BLOCK_C),), rest)

    def run(ranks, running_mean, running_var, momentum):
        mean, var = (torch.empty(C, dtype=torch.float32, device=ranks.device) for _ in range(2))
        count = ranks.new_empty(())
        launch(ranks, mean, var, count, running_mean, running_var, numbers=(momentum,))
        return mean, var, count

    return run


def merge_ranks(*args) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.batch_norm_act.ranks.RanksCall`, its tensors float32 and dense."""
    return plan_merge_ranks(*args)(*args)
