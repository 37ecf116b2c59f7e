"""`stem` by `conv_bn_act` and PyTorch's pooling, in the layout that the registered operator promises."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .conv_bn_act import configs, kernel_class, unsupported

if TYPE_CHECKING:
    from ...ops.stem import Call

__all__ = ["configs", "kernel_class", "plan", "unsupported"]


def plan(call: "Call", config: None) -> Callable[["Call"], Tensor]:
    return lambda call: call.plainly().contiguous(memory_format=torch.channels_last)
