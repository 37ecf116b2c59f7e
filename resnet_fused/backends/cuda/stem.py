"""`stem` in the extension: one kernel for the 16-bit types."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..conv import vectors_unsupported
from ..layout import given
from . import kernels

if TYPE_CHECKING:
    from ...ops.stem import Call

_MOST_CHANNELS = 4  # of x
_GROUP = 8  # channels of the result are written at once
_VECTORS = ("bn_weight", "bn_bias", "running_mean", "running_var", "mean", "std")
_TILE = (12, 60)  # pixels of x


def unsupported(call: "Call") -> str | None:
    N, C, H, W = call.x.shape
    K = call.weight.shape[0]
    if call.weight.dtype not in (torch.float16, torch.bfloat16):
        return f"weight is {call.weight.dtype}; the kernel serves float16 and bfloat16"
    if not 1 <= C <= _MOST_CHANNELS:
        return f"x has {C} channels; the kernel serves 1 to {_MOST_CHANNELS}"
    if K % _GROUP:
        return f"weight has {K} filters; the kernel serves multiples of {_GROUP}"
    if N * -(-H // _TILE[0]) * -(-W // _TILE[1]) >= 2**31:
        return f"x has 2^31 tiles of {_TILE[0]} x {_TILE[1]} pixels or more; the kernel serves fewer"
    return vectors_unsupported(call.weight, call.bn)


def configs(call: "Call") -> list[None]:
    return [None]


def kernel_class(call: "Call", config: None) -> str:
    return f"c{call.x.shape[1]}/k{call.weight.shape[0] % 64}/{given(call)}"


def plan(call: "Call", config: None) -> Callable[["Call"], Tensor]:
    def run(call: "Call") -> Tensor:
        vectors = {n: v.contiguous() for n, v in call._asdict().items() if n in _VECTORS and v is not None}
        weight = call.weight.contiguous(memory_format=torch.channels_last)
        return kernels.stem(*call._replace(weight=weight, **vectors))

    return run
