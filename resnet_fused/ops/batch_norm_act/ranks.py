"""SyncBatchNorm's statistics: those of every rank, gathered, as the whole batch's.

Ranks that one backend serves get the same bits; of different backends they may differ in the last.
"""

from collections.abc import Hashable
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from ...dispatch import numerics
from .._calls import wrote
from .._library import register
from . import formulas
from .calls import Step

RANKS = (
    "batch_norm_act_merge_ranks(Tensor ranks, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum) "
    "-> (Tensor, Tensor, Tensor)"
)


class _Ranks(NamedTuple):
    ranks: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float


class RanksCall(_Ranks, Step):
    """mean [C], var [C] and count [] of the whole batch; the running statistics are written.

    ranks: [ranks, 2 C + 1] in float32: each one's mean [C], M2 [C] and count.
    """

    __slots__ = ()
    step = "merge_ranks"

    def reference(self) -> tuple[Tensor, ...]:
        copy = self._of((self.ranks, *(None if t is None else t.clone() for t in self[1:3]), self.momentum))
        return *copy.plain(), *copy.written()

    def plain(self) -> tuple[Tensor, Tensor, Tensor]:
        mean, var, count = formulas.merge_ranks(self.ranks)
        formulas.update_running(self.running_mean, self.running_var, mean, var, count, self.momentum)
        return mean, var, count

    def magnitudes(self) -> tuple[Tensor, ...]:
        means, m2s, counts = formulas.split_ranks(self.ranks)
        spread = means.abs() + means.abs().amax(0)  # every rank's mean less the whole batch's
        of_means = torch.cat([spread, m2s + spread.square() * counts, counts], 1)
        mean, var, count = formulas.merge_ranks(of_means)
        pairs = ((self.running_mean, mean), (self.running_var, var))
        return mean, var, count, *(running.abs() + new for running, new in pairs if running is not None)

    def drawn(self, whole: bool = False) -> Self:
        draw = numerics.Draw(self.ranks.device)
        means, m2s, counts = formulas.split_ranks(draw.like(self.ranks))
        counts = counts.abs().mul(100).ceil().add(1)
        ranks = torch.empty_like(self.ranks).copy_(torch.cat([means, m2s.abs() * counts, counts], 1))
        return self._of((ranks, *(None if t is None else draw.like(t, positive=True) for t in self[1:3]), self[3]))

    def written(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self[1:3] if t is not None)

    def vectors(self) -> tuple[Tensor | None, ...]:
        return self[1:3]

    def key(self) -> Hashable:
        return super(RanksCall, self._replace(momentum=0.0)).key()

    @staticmethod
    def _fake(ranks, *args):
        mean = ranks.new_empty(ranks.shape[1] // 2)
        return mean, torch.empty_like(mean), ranks.new_empty(())


_merge = register(RANKS, RanksCall, RanksCall._fake)


def gather(mean: Tensor, m2: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """Every rank's statistics, as `RanksCall` takes them; all ranks have to call."""
    own = torch.cat([mean, m2, mean.new_full((1,), count)])
    ranks = own.new_empty((dist.get_world_size(group), own.numel()))
    dist.all_gather_into_tensor(ranks.view(-1), own, group)
    return ranks


def merge(
    ranks: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mean [C], var [C] and count [] of the whole batch; writes the running statistics."""
    running = running_mean, running_var
    merged = all(t is not None and t.dtype == ranks.dtype for t in running)  # half-precision ones are not
    mean, var, count = _merge(ranks, *(running if merged else (None, None)), momentum)
    if merged:
        wrote(running)
    else:
        formulas.update_running(*running, mean, var, count, momentum)
    return mean, var, count
