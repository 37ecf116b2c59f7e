"""cuDNN's operators as ATen documents them, by PyTorch's reference: what an adapter may ask is checked here.

Conditions: aten/src/ATen/native/cudnn/ConvShared.cpp, `cudnn_convolution_relu` and `cudnn_convolution_add_relu`.
Convolutions round float32 to TF32 where that is allowed, as cuDNN does, whether it is enabled or not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, *images: Tensor) -> None:
    dtypes = {t.dtype for t in (x, weight, *images)} | ({bias.dtype} if bias is not None else set())
    if len(dtypes) != 1 or not dtypes <= {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        raise RuntimeError(f"cuDNN: one floating-point dtype is taken, got {dtypes}")
    layout = torch.channels_last if weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    for name, t in (("input", x), *((f"z {i}", t) for i, t in enumerate(images))):
        if not t.is_contiguous(memory_format=layout):
            raise RuntimeError(f"cuDNN: the {name} is not laid out as the weight: strides {t.stride()}")
    if bias is not None and (bias.dim() != 1 or not bias.is_contiguous() or bias.shape[0] != weight.shape[0]):
        raise RuntimeError(f"cuDNN: the bias must be contiguous [{weight.shape[0]}], got {tuple(bias.shape)}")


def _operand(t: Tensor) -> Tensor:
    """float32 to the nearest TF32, ties away from zero, where `torch.backends.cudnn.conv.fp32_precision` allows it."""
    if t.dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision != "tf32":
        return t
    rounded = ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(t.isfinite(), rounded, t)


def _convolution(x, weight, *args) -> Tensor:
    return torch.ops.aten.convolution(_operand(x), _operand(weight), *args)


def _convolution_backward(dy, x, weight, *args) -> tuple[Tensor, ...]:
    return torch.ops.aten.convolution_backward(_operand(dy), _operand(x), _operand(weight), *args)


def _convolution_relu(x, weight, bias, stride, padding, dilation, groups) -> Tensor:
    _check(x, weight, bias)
    return F.relu(F.conv2d(_operand(x), _operand(weight), bias, stride, padding, dilation, groups))


def _convolution_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups) -> Tensor:
    _check(x, weight, bias, z)
    y = F.conv2d(_operand(x), _operand(weight), bias, stride, padding, dilation, groups)
    if z.shape != y.shape:
        raise RuntimeError(f"cuDNN: z must have the result's shape {tuple(y.shape)}, got {tuple(z.shape)}")
    return F.relu(y + (1.0 if alpha is None else alpha) * z)


def _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, epsilon):
    y, mean, rstd = torch.ops.aten.native_batch_norm(
        x, weight, bias, running_mean, running_var, training, momentum, epsilon
    )
    return y, mean, rstd, torch.empty(0, dtype=torch.uint8)


def _batch_norm_backward(x, dy, weight, running_mean, running_var, mean, rstd, epsilon, reserve):
    return torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, running_mean, running_var, mean, rstd, True, epsilon, [True, True, True]
    )


OPERATORS = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "cudnn_convolution_relu": _convolution_relu,
    "cudnn_convolution_add_relu": _convolution_add_relu,
    "cudnn_batch_norm": _batch_norm,
    "cudnn_batch_norm_backward": _batch_norm_backward,
}
