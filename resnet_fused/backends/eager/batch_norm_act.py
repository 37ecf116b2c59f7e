"""The operators behind `batch_norm_act` in PyTorch's own, in the types and layouts that the registered ones promise."""

from collections.abc import Callable
from typing import TYPE_CHECKING

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
    return _run


def _run(call: "StepCall") -> tuple[Tensor, ...]:
    return tuple(
        r if r.numel() == 0 else r.to(s.dtype).clone(memory_format=format_of(s))
        for r, s in zip(call.plain(), call.fake(), strict=True)
    )
