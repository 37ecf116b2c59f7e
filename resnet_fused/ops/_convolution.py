"""What the records of calls with a convolution and the BN behind it have in common."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..dispatch import numerics, trial
from ._calls import BN, metadata, named


class ConvolutionCall(tuple[Any, ...]):
    """What dispatch asks of a call; its fields, x and weight among them, are those of the NamedTuple in front of it."""

    __slots__ = ()
    op: str
    name: str

    @property
    def bn(self: Any) -> BN:
        return BN(self.bn_weight, self.bn_bias, self.running_mean, self.running_var)

    def _drawn(self: Any, shapes: Mapping[str, torch.Size]) -> Any:
        """A random call like this one, of other shapes where they are given; one image has a NaN."""
        draw = numerics.Draw(self.x.device)

        def like(name: str, t: Tensor) -> Tensor:
            scale = t[0].numel() ** -0.5 if name == "weight" else 1.0
            return draw.like(t, shapes.get(name), positive=name in ("running_var", "std"), scale=scale)

        call = self._make(like(n, a) if isinstance(a, Tensor) else a for n, a in named(self).items())
        if call.x.shape[0] > 1 and call.x.is_floating_point() and 0 not in call.x.stride():
            call.x[-1, -1, -1, -1] = float("nan")
        return call

    def written(self) -> tuple[Tensor, ...]:
        return ()

    def allow_tf32(self: Any) -> bool:
        return (
            self.weight.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]  # made at import
        )

    def key(self) -> Hashable:
        """All that a plan depends on."""
        settings = torch.backends.cudnn
        flags = settings.enabled, settings.deterministic, torch.get_deterministic_debug_mode()
        return self.name, metadata(self), self.allow_tf32(), flags

    def _settings(self: Any) -> str:
        """What of the settings and the layout the fastest choice depends on."""
        flags = "+tf32" * self.allow_tf32() + "+benchmark" * torch.backends.cudnn.benchmark
        return flags + ("" if self.x.is_contiguous(memory_format=torch.channels_last) else "+nchw")

    def trial(self, backend: str) -> Callable[[], Tensor]:
        """What is timed of a backend."""
        return trial(backend, self)
