"""Where convolutions' weights lie: as the kernels read them on a device that fuses, as PyTorch makes them elsewhere."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from ..dispatch import registry
from ..ops._short import PLAIN


class LaidOut(nn.Module):
    """A module whose convolutions' weights are contiguous, and in channels_last on a device that fuses.

    They are laid out where they come to such a device, and back where they leave it, with their gradients; any other
    change of layout is the user's.
    """

    channels_last = True  # False: contiguous on every device

    def lay_out(self) -> None:
        """For modules that were made on their device."""
        for weight in self._convolutions().values():
            if self.channels_last and registry.fuses_by_default(weight.device):
                _lay_out(weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """PyTorch's way of moving and casting a module, through every module of it."""
        before = {m: weight.device for m, weight in self._convolutions().items()} if self.channels_last else {}
        super()._apply(fn, recurse)
        for m, weight in self._convolutions().items() if before else ():
            if m in before and registry.fuses_by_default(weight.device) != registry.fuses_by_default(before[m]):
                _lay_out(weight)
        return self

    def _convolutions(self) -> dict[nn.Module, Tensor]:
        """Their weights, but for those that are sharded, quantized or made by a parametrization."""
        found = {m: m._parameters.get("weight") for m in self.modules() if isinstance(m, nn.Conv2d)}
        return {m: weight for m, weight in found.items() if weight is not None and weight.__class__ in PLAIN}


def _lay_out(weight: Tensor) -> None:
    """`contiguous` would leave the strides of a 1x1 convolution, which gradients and DDP compare."""
    last = registry.fuses_by_default(weight.device)
    for t in (weight, weight.grad):
        if t is not None:
            t.data = t.data.to(memory_format=torch.channels_last if last else torch.contiguous_format)
