"""The registered operators behind `batch_norm_act` and their records: statistics, apply, backward sums, dx.

Collectives stand between them. Each has its formula in plain PyTorch, which serves SyncBatchNorm where no fused backend
does and is what kernels are checked against before their first use. z is x + pre_add, or x.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ... import dispatch
from ...dispatch import numerics
from .._calls import metadata, named, power_of_two
from .._library import register
from . import formulas

_BN2 = "Tensor? residual, Tensor? residual_weight, Tensor? residual_bias, Tensor? residual_mean, Tensor? residual_var"
STATISTICS = "batch_norm_act_statistics(Tensor x, Tensor? pre_add) -> (Tensor, Tensor, Tensor)"
APPLY = (
    "batch_norm_act_apply(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, "
    f"{_BN2}, Tensor? pre_add, bool relu, bool save_mask) -> (Tensor, Tensor, Tensor)"
)
SUMS = (
    "batch_norm_act_backward_sums(Tensor dy, Tensor z, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    f"float eps, {_BN2}, Tensor? relu_mask, bool relu) -> (Tensor, Tensor, Tensor)"
)
DX = (
    "batch_norm_act_backward_dx(Tensor dy, Tensor z, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
    f"{_BN2}, Tensor? relu_mask, bool relu, Tensor? sum_dz, Tensor? sum_dz_xhat, Tensor? sum_dz_rhat, Tensor? count, "
    "Tensor? dtotal, bool need_dx, bool need_dresidual) -> (Tensor, Tensor)"
)


class Step(tuple[Any, ...]):
    """What dispatch asks of a call; its fields are those of the NamedTuple in front of it."""

    __slots__ = ()
    op = "batch_norm_act"
    step: str
    _formula: Callable[..., tuple[Tensor, ...]]
    _fake: Callable[..., tuple[Tensor, ...]]

    def _of(self, values: Iterable[Any]) -> Self:
        return tuple.__new__(type(self), values)

    @property
    def name(self) -> str:
        return f"{self.op}_{self.step}"

    def reference(self) -> tuple[Tensor, ...]:
        return self._formula(*self)

    def plain(self) -> tuple[Tensor, ...]:
        """What serves without a fused backend."""
        return self.reference()

    def fake(self) -> tuple[Tensor, ...]:
        return self._fake(*self)

    def absolute(self) -> Self:
        """The call with which the formula computes on absolute values: |z| + |mean| in the place of z - mean."""
        values = {n: v.abs() if isinstance(v, Tensor) else v for n, v in named(self).items()}
        values |= {n: -values[n] for n in ("mean", "residual_mean") if values.get(n) is not None}
        return self._of(values.values())

    def magnitudes(self) -> tuple[Tensor, ...]:
        return self.absolute().reference()

    def drawn(self, whole: bool = False) -> Self:
        """Random arguments like these, on a crop of two images unless the whole is asked for."""
        draw = numerics.Draw(self[0].device)
        N, C, H, W = self[0].shape
        if not whole:
            N, H, W = numerics.IMAGES, numerics.cropped(H), numerics.cropped(W)
        pixels = N * H * W

        def like(name: str, t: Tensor) -> Tensor:
            if t.dtype == torch.uint8:
                return draw.bits((pixels, -(-C // 8)))
            if t.dim() == 0 or name == "count":
                return torch.full_like(t, pixels)
            if t.dim() == 1:  # variances have to be positive, the others may be; a sum is of the images' size
                return draw.like(t, positive=True).mul_(pixels if name.startswith("sum") else 1)
            return draw.like(t, None if whole else (N, C, H, W))

        return self._of(like(n, a) if isinstance(a, Tensor) else a for n, a in named(self).items())

    def written(self) -> tuple[Tensor, ...]:
        """The arguments that the call writes."""
        return ()

    def vectors(self) -> tuple[Tensor | None, ...]:
        """Those whose dtypes a backend has to serve."""
        return ()

    def key(self) -> Hashable:
        """All that a plan depends on."""
        return self.step, metadata(self), torch.are_deterministic_algorithms_enabled()

    def order(self) -> str:
        return "batch_norm"

    def problem(self) -> None:
        """Nothing is tuned."""

    def layer_class(self) -> str | None:
        """Calls of one class are as fast as each other: what is timed once; None where nothing is."""
        return None

    def trial(self, backend: str) -> Callable[[], Any]:
        """What is timed of a backend."""
        return dispatch.trial(backend, self)

    def _class(self, *flags: object) -> str:
        N, C, H, W = self[0].shape
        given = "".join(str(int(bool(f))) for f in flags)
        return f"{self.step} {str(self[0].dtype).removeprefix('torch.')} M{power_of_two(N * H * W)}xC{C} {given}"


class _Statistics(NamedTuple):
    x: Tensor
    pre_add: Tensor | None


class StatisticsCall(_Statistics, Step):
    """mean, M2 = sum (z - mean)^2 in float32, and x + pre_add, of no elements without a pre_add."""

    __slots__ = ()
    step = "statistics"
    _formula = staticmethod(formulas.statistics)

    def magnitudes(self) -> tuple[Tensor, ...]:
        """Around a pivot, the channel's first element, every deviation is rounded: by its own size."""
        call = self.absolute()
        mean, _, total = call.reference()
        z = call.x if call.pre_add is None else total
        if z.numel() == 0:
            return self.reference()
        pivot = z[0, :, 0, 0]
        from_mean = z + (mean + 2 * pivot)[:, None, None]
        return 2 * pivot + z.amax((0, 2, 3)), from_mean.square().sum((0, 2, 3)), total

    @staticmethod
    def _fake(x, pre_add):
        mean = x.new_empty(x.shape[1], dtype=torch.float32)
        return mean, torch.empty_like(mean), x.new_empty(0) if pre_add is None else _image(x)


class _Apply(NamedTuple):
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    residual: Tensor | None
    residual_weight: Tensor | None
    residual_bias: Tensor | None
    residual_mean: Tensor | None
    residual_var: Tensor | None
    pre_add: Tensor | None
    relu: bool
    save_mask: bool


class ApplyCall(_Apply, Step):
    """y; where the ReLU's gradient passes: [N * H * W, ceil(C / 8)] uint8, channel 8 * i + j bit j; x + pre_add."""

    __slots__ = ()
    step = "apply"
    _formula = staticmethod(formulas.apply)

    def plain(self) -> tuple[Tensor, ...]:
        return self.reference() if self.save_mask else formulas.plain_apply(*self)

    def vectors(self) -> tuple[Tensor | None, ...]:
        return (*self[1:5], *self[7:11])

    def layer_class(self) -> str | None:
        given = (t is not None for t in (self.mean, self.residual, self.residual_mean, self.pre_add))
        return None if self.save_mask else self._class(*given, self.relu)

    @staticmethod
    def _fake(x, *args):
        *_, pre_add, _, save_mask = args
        N, C, H, W = x.shape
        mask = x.new_empty((N * H * W, (C + 7) // 8) if save_mask else 0, dtype=torch.uint8)
        return _image(x), mask, x.new_empty(0) if pre_add is None else _image(x)


class _Sums(NamedTuple):
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


class _Dx(NamedTuple):
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
    sum_dz: Tensor | None
    sum_dz_xhat: Tensor | None
    sum_dz_rhat: Tensor | None
    count: Tensor | None  # type: ignore[assignment]  # tuples have a method of that name, which nobody calls
    dtotal: Tensor | None
    need_dx: bool
    need_dresidual: bool


class Backward(Step):
    """Of a ReLU whose mask may have to be computed anew."""

    __slots__ = ()

    def drawn(self, whole: bool = False) -> Self:
        return super().drawn(whole).settled()

    def settled(self) -> Self:
        """dy is 0 where the sign under the ReLU is in doubt."""
        dy, relu_mask, relu = self[0], self[12], self[13]
        if not relu or relu_mask is not None:
            return self
        pre_activation = formulas.pre_activation(*self[1:12])
        doubtful = pre_activation.abs() < 0.05
        overlaps = 0 in dy.stride()  # one value for many elements: they get places of their own
        return self._of((dy.masked_fill(doubtful, 0) if overlaps else dy.masked_fill_(doubtful, 0), *self[1:]))

    def absolute(self) -> Self:
        """Where the ReLU's gradient passes is decided by the values themselves."""
        call = super().absolute()
        dz = formulas.masked(*self[:14]).abs()
        return self._of((dz, *call[1:12], None, False, *call[14:]))  # without a mask or a ReLU


class SumsCall(_Sums, Backward):
    """Sums [C] over N, H and W of dz, dz * xhat and dz * rhat, the last of no elements where the residual has no BN."""

    __slots__ = ()
    step = "backward_sums"
    _formula = staticmethod(formulas.backward_sums)

    @staticmethod
    def _fake(dy, *args):
        sums = dy.new_empty(dy.shape[1], dtype=torch.float32)
        return sums, torch.empty_like(sums), torch.empty_like(sums) if args[9] is not None else sums.new_empty(0)


class DxCall(_Dx, Backward):
    """dx and the residual's gradient, of no elements where they are not needed."""

    __slots__ = ()
    step = "backward_dx"
    _formula = staticmethod(formulas.backward_dx)

    def magnitudes(self) -> tuple[Tensor, ...]:
        call = self.absolute()  # its sums enter with a minus
        return call._of((*call[:14], *(None if s is None else -s for s in call[14:17]), *call[17:])).reference()

    @staticmethod
    def _fake(dy, *args):
        need_dx, need_dresidual = args[-2:]
        return _image(dy) if need_dx else dy.new_empty(0), _image(dy) if need_dresidual else dy.new_empty(0)


StepCall = StatisticsCall | ApplyCall | SumsCall | DxCall


def _image(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


statistics = register(STATISTICS, StatisticsCall, StatisticsCall._fake)
apply = register(APPLY, ApplyCall, ApplyCall._fake)
backward_sums = register(SUMS, SumsCall, SumsCall._fake)
backward_dx = register(DX, DxCall, DxCall._fake)
