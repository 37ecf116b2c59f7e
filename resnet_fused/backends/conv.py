"""What the backends of `conv_bn_act` share."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import dense, given

if TYPE_CHECKING:
    from ..ops.conv_bn_act import Call

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # what fused kernels serve
Pass = Callable[..., tuple[Tensor, Tensor | None]]  # arguments -> y, x + pre_add


def dtypes_unsupported(call: "Call", uniform: bool) -> str | None:
    """Why fused kernels can't take these dtypes, or None; uniform: the BN vectors have to share one."""
    x = call.x
    if call.weight.dtype != x.dtype:
        return f"x is {x.dtype} and weight {call.weight.dtype}; the kernels take one dtype"
    return vectors_unsupported(x, call.bn, uniform)


def vectors_unsupported(x: Tensor, vectors: Iterable[Tensor | None], uniform: bool = False) -> str | None:
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; the kernels serve float16, bfloat16 and float32"
    dtypes = {v.dtype for v in vectors if v is not None}
    if not dtypes <= {torch.float32, x.dtype} or (uniform and len(dtypes) > 1):
        return f"the BN vectors are {sorted(map(str, dtypes))}; the kernels take all in float32 or all in {x.dtype}"
    return None


def with_dense_vectors(call: "Call", run: Callable[["Call"], Tensor]) -> Callable[["Call"], Tensor]:
    """run, for calls like this one whose vectors may have to be copied."""
    if all(v is None or v.is_contiguous() for v in (call.bias, *call.bn)):
        return run
    return lambda call: run(dense_vectors(call))


def dense_vectors(call: "Call") -> "Call":
    names = ("bias", "bn_weight", "bn_bias", "running_mean", "running_var")
    vectors: dict[str, Any] = {name: getattr(call, name) for name in names}
    vectors |= {name: v.contiguous() for name, v in vectors.items() if v is not None}
    return call._replace(**vectors)


def classed(call: "Call", config: dict[str, Any] | None) -> str:
    """The class of precompiled kernels that serves a call: dtypes, alignments, geometry, what is given and the tile."""
    tile = "/".join(f"{k.lower()}={v}" for k, v in (config or {}).items())
    K, C, *size = call.weight.shape
    pairs = (size, call.stride, call.padding, call.dilation)
    geometry = "/".join("x".join(map(str, pair)) for pair in pairs)
    channels = f"g{min(call.groups, 2)}/c{C % 16}/k{K % 16}"
    return f"{call.x.dtype}/{geometry}/{channels}/{given(call)}/tf32={call.allow_tf32()}/{tile}"


def conv_then(plan_pass: Callable[..., Pass]) -> Callable[["Call"], Tensor]:
    """PyTorch's convolution, then one pass of BN, add and ReLU."""
    one_pass: Pass | None = None

    def run(call: "Call") -> Tensor:
        nonlocal one_pass
        x = dense(call.x)
        y = dense(F.conv2d(x, call.weight, call.bias, call.stride, call.padding, call.dilation, call.groups))
        residual = None if call.residual is None else dense(call.residual)
        bn = (None if v is None else v.contiguous() for v in call.bn)
        args = (y, *bn, call.eps, residual, None, None, None, None, None, call.relu)
        if one_pass is None:
            one_pass = plan_pass(*args)
        return one_pass(*args)[0]

    return run
