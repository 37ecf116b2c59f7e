"""The operator library `resnet_fused`: one definition, served by the same function on CUDA and on the CPU."""

from collections.abc import Callable
from typing import Any

import torch

from .. import dispatch
from ..dispatch import registry

_LIBRARY = torch.library.Library("resnet_fused", "DEF")
kernels: dict[str, Callable] = {}  # what serves each operator
records: dict[str, Callable[..., Any]] = {}  # arguments -> its call


def register(schema: str, record: Any, fake: Callable) -> torch._ops.OpOverload:
    """Define the operator of that schema, and find its backends; the CPU's are Triton's interpreter and oneDNN."""
    name = schema.partition("(")[0]

    def kernel(*args):
        if not torch._C._is_any_autocast_enabled():
            return dispatch.serve(record(*args))
        with torch.autocast(args[0].device.type, enabled=False):  # the tensors come as they are to be computed with
            return dispatch.serve(record(*args))

    kernels[name], records[name] = kernel, record
    registry.add_operator(record.op)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CUDA")
    _LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"resnet_fused::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.resnet_fused, name).default
