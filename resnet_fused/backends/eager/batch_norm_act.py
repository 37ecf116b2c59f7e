"""The operators behind `batch_norm_act` in PyTorch's own, in the types and layouts that the registered ones promise."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..layout import format_of

if TYPE_CHECKING:
    from ...ops.batch_norm_act.calls import StepCall


def unsupported(call: "StepCall") -> None:
    return None


def configs(call: "StepCall") -> list[None]:
    return [None]


def kernel_class(call: "StepCall", config: None) -> None:
    return None


def plan(call: "StepCall", config: None) -> Callable[["StepCall"], tuple[Tensor, ...]]:
    promises = [(promise.dtype, format_of(promise)) for promise in call.fake()]

    def run(call: "StepCall") -> tuple[Tensor, ...]:
        given = {a.data_ptr() for a in call if isinstance(a, Tensor)}  # an operator's result is none of its arguments
        return tuple(_promised(r, *p, given) for r, p in zip(call.plain(), promises, strict=True))

    return run


def _promised(result: Tensor, dtype: torch.dtype, format: torch.memory_format, given: set[int]) -> Tensor:
    if result.numel() == 0:
        return result
    result = result.to(dtype).contiguous(memory_format=format)
    return result.clone() if result.data_ptr() in given else result
