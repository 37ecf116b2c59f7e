"""`stem` by `conv_bn_act` and PyTorch's pooling, in the layout that the registered operator promises."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...ops.stem import Call


def unsupported(call: "Call") -> None:
    return None


def configs(call: "Call") -> list[None]:
    return [None]


def kernel_class(call: "Call", config: None) -> None:
    return None


def plan(call: "Call", config: None) -> Callable[["Call"], Tensor]:
    return lambda call: call.plainly().contiguous(memory_format=torch.channels_last)
