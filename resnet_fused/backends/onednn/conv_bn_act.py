"""Convolutions that PyTorch already carries for the CPU: oneDNN's on packed weights, as Inductor calls them.

BN is folded into a packed copy of the weight. The copy is kept beside the very bits it was made from, and every call
compares these: no edit is missed, whichever way it was made (a `.data` edit moves no version counter).
"""

import ctypes
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..conv import dtypes_unsupported, with_dense_vectors
from ..layout import dense

if TYPE_CHECKING:
    from ...ops.conv_bn_act import Call

SHAPES = 4  # packed copies kept per layer: oneDNN's layout depends on the input's shape

_memcmp = (ctypes.CDLL(None) if os.name == "posix" else ctypes.cdll.msvcrt).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class _Folded(NamedTuple):
    """What one layer was folded from, by value, and the results."""

    settings: tuple[object, ...]  # eps, padding, stride, dilation, groups
    sources: tuple[Tensor | None, ...]  # copies of weight, bias and BN vectors
    shift: Tensor | None  # [K]
    packed: dict[torch.Size, Tensor]  # shape of x -> weight


_cache = WeakIdKeyDictionary()  # running_var, which autocast does not cast, or the weight without BN -> _Folded


def unsupported(call: "Call") -> str | None:
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in call):
        return "onednn has no gradients; call it under torch.no_grad() or torch.inference_mode()"
    return dtypes_unsupported(call, uniform=False) or dtype_unsupported(call.x.dtype)


def dtype_unsupported(dtype: torch.dtype) -> str | None:
    """Why oneDNN can't convolve in this dtype on this CPU, with the remedy, or None where it can."""
    checks = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype in checks and not checks[dtype]():
        return f"this CPU lacks the instructions for oneDNN's {dtype} convolutions; use float32"
    return None


vars(dtype_unsupported)["_dynamo_marked_constant"] = True  # assume_constant_result, without its seconds of imports


def configs(call: "Call") -> list[None]:
    return [None]


def kernel_class(call: "Call", config: None) -> None:
    """PyTorch's own operators on the CPU."""


def plan(call: "Call", config: None) -> Callable[["Call"], Tensor]:
    return with_dense_vectors(call, _run)


def _run(call: "Call") -> Tensor:
    """x [N, C, H, W] of any layout -> y [N, K, P, Q] in channels_last."""
    x = dense(call.x)
    conv_args = list(call.padding), list(call.stride), list(call.dilation), call.groups
    key = call.weight if call.running_var is None else call.running_var
    packed, shift = _folded(key, x, (call.weight, call.bias, *call.bn), call.eps, conv_args)
    y = torch.ops.mkldnn._convolution_pointwise(x, packed, shift, *conv_args, "none", [], "")
    if call.residual is not None:
        y.add_(call.residual)
    return y.relu_() if call.relu else y  # oneDNN's own ReLU makes 0 of NaN


def _folded(key: Tensor, x: Tensor, sources: tuple, eps: float, conv_args: tuple) -> tuple[Tensor, Tensor | None]:
    """Packed weight with BN's scale in it, and the shift [K] that is left."""
    settings = eps, *conv_args
    kept = _cache.get(key)
    if kept is None or kept.settings != settings or not all(map(_same_bits, sources, kept.sources)):
        copies = tuple(None if t is None else t.detach().clone() for t in sources)
        kept = _Folded(settings, copies, None, {})
    packed = kept.packed.get(x.shape)
    if packed is None:
        weight, shift = _fold(*(*kept.sources, eps))
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *conv_args, x.shape)
        recent = list(kept.packed.items())[1 - SHAPES :]
        kept = _cache[key] = kept._replace(shift=shift, packed=dict([*recent, (x.shape, packed)]))
    return packed, kept.shift


def _same_bits(t: Tensor | None, kept: Tensor | None) -> bool:
    """Whether t has kept's bits; kept is dense, so equal strides make t dense."""
    if t is None or kept is None:
        return t is kept
    if (t.dtype, t.shape, t.stride()) != (kept.dtype, kept.shape, kept.stride()):
        return False
    return _memcmp(t.data_ptr(), kept.data_ptr(), t.numel() * t.element_size()) == 0


def _fold(weight, bias, bn_weight, bn_bias, mean, var, eps) -> tuple[Tensor, Tensor | None]:
    """s * weight and beta + s * (bias - mean), in the weight's dtype."""
    if mean is None:
        return weight, bias
    scale = (var.double() + eps).rsqrt()
    scale = scale if bn_weight is None else scale * bn_weight
    shift = -scale * mean if bias is None else scale * (bias - mean.double())
    shift = shift if bn_bias is None else shift + bn_bias
    folded = weight.float() * scale.float()[:, None, None, None]
    return folded.to(weight.dtype), shift.to(weight.dtype)
