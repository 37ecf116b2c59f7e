"""`stem` in the extension: one kernel for the 16-bit types."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..conv import vectors_unsupported
from ..layout import dense, given, is_dense
from . import kernels

if TYPE_CHECKING:
    from ...ops.stem import Call

_MOST_CHANNELS = 4  # of x
_GROUP = 8  # channels of the result that are written at once
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
    if max(H, W) >= 2**30 or N * -(-H // _TILE[0]) * -(-W // _TILE[1]) >= 2**31:
        return f"x is {N} images of {H} x {W} pixels; the kernel serves sides below 2^30, and fewer than 2^31 tiles"
    return vectors_unsupported(call.weight, call.bn)


def configs(call: "Call") -> list[None]:
    return [None]


def kernel_class(call: "Call", config: None) -> str:
    return f"c{call.x.shape[1]}/k{call.weight.shape[0] % 64}/{given(call)}"


def plan(call: "Call", config: None) -> Callable[["Call"], Tensor]:
    if all(map(is_dense, call[1:])):
        return lambda call: kernels.stem(*call)
    return lambda call: kernels.stem(call.x, *(dense(a) if isinstance(a, Tensor) else a for a in call[1:]))
