"""Whether calling a module is running its class's forward."""

from torch import nn
from torch.nn.modules import module as _module


def called_plainly(module: nn.Module) -> str | None:
    """Why calling the module is more than running its class's forward, or None where it is not."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    if "forward" in module.__dict__ or module._compiled_call_impl is not None:
        return "has a forward set on the instance"
    return "is called under global module hooks" if _module._has_any_global_hook() else None
