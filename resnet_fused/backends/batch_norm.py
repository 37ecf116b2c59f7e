"""What the backends of `batch_norm_act` share: its steps, each made of one backend's launchers."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .conv import vectors_unsupported
from .layout import dense_call, is_dense

if TYPE_CHECKING:
    from ..ops.batch_norm_act.calls import StepCall

Planner = Callable[..., Callable[..., tuple[Tensor, ...]]]  # arguments -> a launcher for all like them


def unsupported(call: "StepCall") -> str | None:
    """Why the kernels can't take these dtypes, or None."""
    return vectors_unsupported(call[0], call.vectors())


def kernel_class(call: "StepCall") -> str:
    """Calls that run the same compiled kernel share a class."""
    x = call[0]
    given = "".join(
        "-" if a is None else str(a.dtype)[6] if isinstance(a, Tensor) else str(a)[0] if isinstance(a, bool) else ""
        for a in call
    )
    return f"{x.dtype}/C{min(x.shape[1], 256)}/{x.shape[1] % 16}/{given}"


def plan(call: "StepCall", planners: dict[str, Planner]) -> Callable[["StepCall"], tuple[Tensor, ...]]:
    """The step that the call is of, with every tensor made dense."""
    copies = not all(map(is_dense, call))
    call = dense_call(call)
    if call.step == "apply":
        run = _apply(call, planners)
    else:
        run = planners[call.step](*call)
    return (lambda call: run(*dense_call(call))) if copies else (lambda call: run(*call))


def _apply(call: Any, planners: dict[str, Planner]) -> Callable[..., tuple[Tensor, ...]]:
    """y, the ReLU's mask and x + pre_add, of which the last two may have no elements."""
    if not call.save_mask:
        one_pass = planners["apply"](*call[:-1])

        def run(*args):
            y, total = one_pass(*args[:-1])
            return y, y.new_empty(0, dtype=torch.uint8), total

        return run
    with_mask = planners["apply_with_mask"](*call[:7])

    def run_with_mask(x, weight, bias, mean, var, eps, residual, *rest):
        pre_add = rest[4]
        total = x.new_empty(0) if pre_add is None else x + pre_add
        return *with_mask(x if pre_add is None else total, weight, bias, mean, var, eps, residual), total

    return run_with_mask
