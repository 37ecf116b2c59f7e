"""A whole BN in training without a process group: one call forward, one backward.

They stand for the steps where nothing looks at operators; modes, SyncBatchNorm and a forced backend's compiled
graph have the steps themselves.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Self

from torch import Tensor

from . import formulas
from .calls import ApplyCall, DxCall, StatisticsCall, Step, SumsCall
from .reference import reference


class _Training(NamedTuple):
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    eps: float
    residual: Tensor | None
    residual_weight: Tensor | None
    residual_bias: Tensor | None
    residual_running_mean: Tensor | None
    residual_running_var: Tensor | None
    two_bn: bool  # the residual has its own BN
    pre_add: Tensor | None
    relu: bool
    save_mask: bool


class TrainingCall(_Training, Step):
    """y, the ReLU's mask, x + pre_add, mean, var, and those of the residual's BN; the running statistics are written.

    What is not asked for has no elements.
    """

    __slots__ = ()
    step = "training"

    def _compute(self) -> tuple[Tensor, ...]:
        none = self.x.new_empty(0)
        mean, m2, total = formulas.statistics(self.x, self.pre_add)
        count = self.x.numel() // self.x.shape[1]
        mean2 = m22 = none
        if self.two_bn and self.residual is not None:
            mean2, m22, _ = formulas.statistics(self.residual, None)
        y, mask, _ = self.applied(total, mean, m2 / count, mean2, m22 / count).reference()
        return y, mask, total, mean, m2 / count, mean2, m22 / count

    def applied(self, total: Tensor, mean: Tensor, var: Tensor, mean2: Tensor, var2: Tensor) -> ApplyCall:
        z = self.x if self.pre_add is None else total
        two: tuple[Tensor | None, Tensor | None] = (mean2, var2) if self.two_bn else (None, None)
        bn2 = (self.residual_weight, self.residual_bias, *two)
        return ApplyCall(
            z, self.weight, self.bias, mean, var, self.eps, self.residual, *bn2, None, self.relu, self.save_mask
        )

    def _running(self) -> tuple[Tensor | None, ...]:
        return self.running_mean, self.running_var, self.residual_running_mean, self.residual_running_var

    def update_running(self, mean: Tensor, var: Tensor, mean2: Tensor | None, var2: Tensor | None) -> None:
        """mean2, var2: those of the residual's BN."""
        count = self.x.numel() // self.x.shape[1]
        formulas.update_running(self.running_mean, self.running_var, mean, var, count, self.momentum)
        running2 = self.residual_running_mean, self.residual_running_var
        formulas.update_running(*running2, mean2, var2, count, self.momentum)

    def reference(self) -> tuple[Tensor, ...]:
        running = [None if r is None else r.clone() for r in self._running()]
        names = ("running_mean", "running_var", "residual_running_mean", "residual_running_var")
        results = self._compute()
        copies: dict[str, Any] = dict(zip(names, running, strict=True))
        copy = self._replace(**copies)
        copy.update_running(*results[3:])
        return *results, *copy.written()

    def plain(self) -> tuple[Tensor, ...]:
        results = self._compute()
        self.update_running(*results[3:])
        return results

    def eager(self) -> Tensor | tuple[Tensor, Tensor]:
        """The public function's result by PyTorch's own operators and their autograd."""
        return reference(
            *self[:5],
            residual=self.residual,
            residual_bn=self[8:12] if self.two_bn else None,
            pre_add=self.pre_add,
            training=True,
            momentum=self.momentum,
            eps=self.eps,
            act="relu" if self.relu else "none",
        )

    def key(self) -> Hashable:
        return super(TrainingCall, self._replace(momentum=0.0)).key()

    def written(self) -> tuple[Tensor, ...]:
        return tuple(r for r in self._running() if r is not None)

    def magnitudes(self) -> tuple[Tensor, ...]:
        _, mask, total, *statistics = self._compute()
        y = self.applied(total, *statistics).magnitudes()[0]
        count = self.x.numel() // self.x.shape[1]
        found = [total]
        normalised = [(self.x, self.pre_add)]
        if self.two_bn and self.residual is not None:
            normalised.append((self.residual, None))
        for x, pre_add in normalised:
            mean, m2, _ = StatisticsCall(x, pre_add).magnitudes()
            found += [mean, m2 / count]
        found += [total.new_empty(0)] * (5 - len(found))
        written = [r.abs() + s for r, s in zip(self._running(), found[1:], strict=True) if r is not None]
        return y, mask, *found, *written

    def vectors(self) -> tuple[Tensor | None, ...]:
        return (*self[1:5], *self[8:12])

    def layer_class(self) -> str:
        return self._class(self.residual is not None, self.two_bn, self.pre_add is not None, self.relu)

    def trial(self, backend: str) -> Callable[[], Any]:
        """Forward and backward, as autograd runs them."""
        from .one_call import trial  # it stands on this module

        return trial(backend, self)

    def fake(self) -> tuple[Tensor, ...]:
        y, mask, _ = ApplyCall._fake(self.x, None, self.relu, self.save_mask)
        mean, var, total = StatisticsCall._fake(self.x, self.pre_add)
        none = mean.new_empty(0)
        return y, mask, total, mean, var, *((mean, var) if self.two_bn else (none, none))


class _Backward(NamedTuple):
    dy: Tensor
    z: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float
    residual: Tensor | None
    residual_weight: Tensor | None
    residual_bias: Tensor | None
    residual_mean: Tensor | None
    residual_var: Tensor | None
    relu_mask: Tensor | None
    relu: bool
    dtotal: Tensor | None
    need_dx: bool
    need_dresidual: bool


class BackwardCall(_Backward, Step):
    """dx, the residual's gradient, and the sums of dz, dz * xhat and dz * rhat, which are the vectors' gradients."""

    __slots__ = ()
    step = "backward"

    def sums(self) -> SumsCall:
        return SumsCall(*self[:14])

    def dx(self, sums: Sequence[Tensor]) -> DxCall:
        rhat = sums[2] if self.residual_mean is not None else None
        return DxCall(*self[:14], sums[0], sums[1], rhat, None, *self[14:])

    def drawn(self, whole: bool = False) -> Self:
        call = super().drawn(whole)
        return call._replace(dy=SumsCall(*call[:14]).settled().dy)

    def reference(self) -> tuple[Tensor, ...]:
        sums = self.sums().reference()
        return *self.dx(sums).reference(), *sums

    def magnitudes(self) -> tuple[Tensor, ...]:
        sums = self.sums().magnitudes()
        return *self.dx(sums).magnitudes(), *sums

    def fake(self) -> tuple[Tensor, ...]:
        sums = self.sums().fake()
        return *self.dx(sums).fake(), *sums
