"""`conv_bn_act` in Triton: one kernel, or PyTorch's convolution and one pass where its kernels can't serve."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from ..conv import conv_then, dense_vectors, dtypes_unsupported, with_dense_vectors
from . import conv
from .batch_norm_apply import plan_apply
from .conv import Config, candidates, plan_conv_bn_act, problem_on
from .launch import compiled_class

if TYPE_CHECKING:
    from ...ops.conv_bn_act import Call


def unsupported(call: "Call") -> str | None:
    return dtypes_unsupported(call, uniform=False)


def split(call: "Call") -> str | None:
    geometry = (call.stride, call.padding, call.dilation, call.groups)
    reason = conv.unsupported(call.x.shape, call.weight.shape, *geometry, call.x.dtype)
    return reason and f"{reason}: PyTorch's convolution, then BN, add and ReLU in one pass"


def configs(call: "Call") -> list[Config] | list[None]:
    if call.x.numel() == 0 or split(call) is not None:
        return [None]
    geometry = (call.stride, call.padding, call.dilation, call.groups)
    return candidates(problem_on(call.x, call.weight, *geometry, call.allow_tf32()))


def kernel_class(call: "Call", config: Config | None) -> str:
    return compiled_class(plan(call, config), call)


def plan(call: "Call", config: Config | None) -> Callable[["Call"], Tensor]:
    if config is None and split(call) is not None:
        return conv_then(plan_apply)
    run = plan_conv_bn_act(*dense_vectors(call), allow_tf32=call.allow_tf32(), config=config)
    return with_dense_vectors(call, lambda call: run(*call))
