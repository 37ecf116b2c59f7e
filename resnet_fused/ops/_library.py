"""The operator library `resnet_fused`: one definition, served by the same function on CUDA and on the CPU."""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("resnet_fused", "DEF")
kernels: dict[str, Callable] = {}  # what serves each operator


def register(schema: str, impl: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Define the operator of that schema; on the CPU it serves Triton's interpreter and oneDNN."""
    name = schema.partition("(")[0]

    def kernel(*args):
        if not torch._C._is_any_autocast_enabled():
            return impl(*args)
        with torch.autocast(args[0].device.type, enabled=False):  # the tensors come as they are to be computed with
            return impl(*args)

    kernels[name] = kernel
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CUDA")
    _LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"resnet_fused::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.resnet_fused, name).default
