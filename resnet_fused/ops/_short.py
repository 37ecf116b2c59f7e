"""When a call may go to its plan directly, without PyTorch's dispatcher."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

modes = torch._C._len_torch_dispatch_stack  # the ledger of `bench` looks on without being seen
# other classes may have a say in what operators do
PLAIN: tuple[type[Tensor], ...] = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def plain(call: Iterable[object]) -> bool:
    """Every tensor is PyTorch's own, in memory as it reads."""
    return all(_plain(a) for a in call if isinstance(a, Tensor))


def _plain(t: Tensor) -> bool:
    return t.__class__ in PLAIN and t.layout is torch.strided and not t.is_neg()


def batched(t: Tensor) -> bool:
    """Of `torch.autograd.grad(..., is_grads_batched=True)`, whose tensors have no memory."""
    if t.__class__ is not Tensor:
        return False
    try:
        t.data_ptr()
    except RuntimeError:
        return True
    return False


def unwatched() -> bool:
    """Nothing looks at operators: no compiler, tracer, transform, dual number, mode or profiler."""
    return not (
        torch.compiler.is_compiling()  # first: a compiler knows it, and none of the others
        or modes()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
    )
