"""cuDNN's fused convolution + bias (+ add) + ReLU, as PyTorch carries it.

It has no BN: weight and bias are folded anew in every pass, one small launch, so no edit is ever missed. Without a ReLU
PyTorch carries no fused one: its convolution with a bias, then the add.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _triton

WITHOUT_RELU = "cuDNN fuses a convolution only with a ReLU"

if _triton.IMPORT_ERROR is None:
    from ._triton.fold import fold


def unavailable(device_type: str, index: int | None = None) -> str | None:
    """Why cuDNN's fused convolutions can't run on this device, with the remedy, or None where they can."""
    if device_type != "cuda":
        return f"cuDNN serves CUDA devices, the tensor is on {device_type}; move it"
    if not torch.backends.cudnn.is_available():
        return "this PyTorch was built without cuDNN; install a CUDA build from PyPI"
    if not torch.backends.cudnn.enabled:
        return "torch.backends.cudnn.enabled is False"
    reason = _triton.unavailable(device_type, index)
    return reason and f"BN is folded by a Triton kernel, and {reason}"


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """x [N, C, H, W] in channels_last -> y [N, K, P, Q] in channels_last; arguments as in the operator's schema."""
    weight, shift = fold(weight, bias, bn_weight, bn_bias, mean, var, eps)
    conv_args = (stride, padding, dilation, groups)
    if not relu:
        y = F.conv2d(x, weight, shift, *conv_args).contiguous(memory_format=torch.channels_last)
        return y if residual is None else y.add_(residual)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, shift, *conv_args)
    residual = residual.contiguous(memory_format=torch.channels_last)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, shift, *conv_args)
