"""`conv_bn_act` in the extension: one CUTLASS kernel, or PyTorch's convolution and one pass where it can't serve."""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..conv import classed, conv_then, dense_vectors, dtypes_unsupported
from ..layout import dense
from . import extension, kernels

if TYPE_CHECKING:
    from ...ops.conv_bn_act import Call

Config = dict[str, int]


def unsupported(call: "Call") -> str | None:
    return dtypes_unsupported(call, uniform=True)


def split(call: "Call") -> str | None:
    reason: str | None
    if call.x.dtype == torch.float32 and not call.allow_tf32():
        reason = (
            "the CUDA convolutions multiply float32 as TF32, which is not allowed; "
            'torch.backends.cudnn.conv.fp32_precision = "tf32" allows it'
        )
    else:
        reason = _plans(call)[0]
    if reason is None and (name := call.misaligned()) is not None:
        reason = f"{name} does not start at a multiple of 16 bytes, which the CUDA convolutions need"
    return reason and f"{reason}: PyTorch's convolution, then BN, add and ReLU in one pass"


def configs(call: "Call") -> list[Config] | list[None]:
    """Tiles and splits that can serve, the fastest by estimate first."""
    if call.x.numel() == 0 or split(call) is not None:
        return [None]
    names = ("tile_m", "tile_n", "splits")
    return [dict(zip(names, plan, strict=True)) for plan in _plans(call)[1]]


def kernel_class(call: "Call", config: Config | None) -> str:
    return classed(call, config)


def plan(call: "Call", config: Config | None) -> Callable[["Call"], Tensor]:
    if config is None:
        return conv_then(lambda *args: lambda *args: kernels.batch_norm_act(*args))

    def run(call: "Call") -> Tensor:
        call = dense_vectors(call)
        images: dict[str, Any] = {n: t if t is None else dense(t) for n, t in (("x", call.x), ("weight", call.weight))}
        residual = None if call.residual is None else dense(call.residual)
        return kernels.conv_bn_act(*call._replace(**images, residual=residual), config)

    return run


def _plans(call: "Call") -> tuple[str | None, list[tuple[int, int, int]]]:
    """Why the kernels can't serve, and what could."""
    problem = (call.x.shape, call.weight.shape, call.stride, call.padding, call.dilation, call.groups)
    assert extension._C is not None  # `unavailable` has looked
    return extension._C.conv_plans(*problem, call.x.element_size(), *device(call.x.get_device()))


@lru_cache
def device(index: int) -> tuple[int, int, int]:
    """Compute capability and multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.minor, properties.multi_processor_count
