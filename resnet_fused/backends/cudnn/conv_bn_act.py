"""cuDNN's fused convolution + bias (+ add) + ReLU, as PyTorch carries it.

It has no BN: weight and bias are folded anew in every pass, one small launch, so no edit is ever missed. Without a ReLU
PyTorch carries no fused one: its convolution with a bias, then the add.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv import classed, dense_vectors, dtypes_unsupported, with_dense_vectors
from ..layout import dense
from ..triton.fold import plan_fold
from ..triton.launch import compiled_class

if TYPE_CHECKING:
    from ...ops.conv_bn_act import Call


def unsupported(call: "Call") -> str | None:
    return dtypes_unsupported(call, uniform=False)


def split(call: "Call") -> str | None:
    if call.relu:
        return None
    return "cuDNN fuses a convolution only with a ReLU: PyTorch's convolution with folded weights, then the add"


def configs(call: "Call") -> list[None]:
    return [None]


def kernel_class(call: "Call", config: None) -> str:
    """That of the kernel that folds, and the geometry and channels by which cuDNN chooses among its own."""
    folds = compiled_class(lambda c: _fold(call)(c.weight, c.bias, *c.bn, c.eps), dense_vectors(call))
    return f"{classed(call, None)}/{call.weight.shape[0]}x{call.weight.shape[1]}/{folds}"


def plan(call: "Call", config: None) -> Callable[["Call"], Tensor]:
    """x [N, C, H, W] of any layout -> y [N, K, P, Q] in channels_last."""
    fold = _fold(call)

    def run(call: "Call") -> Tensor:
        x = dense(call.x)
        weight, shift = fold(call.weight, call.bias, *call.bn, call.eps)
        conv_args = (call.stride, call.padding, call.dilation, call.groups)
        if not call.relu:
            y = dense(F.conv2d(x, weight, shift, *conv_args))
            return y if call.residual is None else y.add_(call.residual)
        if call.residual is None:
            return torch.cudnn_convolution_relu(x, weight, shift, *conv_args)
        return torch.cudnn_convolution_add_relu(x, weight, dense(call.residual), 1.0, shift, *conv_args)

    return with_dense_vectors(call, run)


def _fold(call: "Call") -> Callable[..., tuple[Tensor, Tensor]]:
    call = dense_vectors(call)
    return plan_fold(call.weight, call.bias, *call.bn, call.eps)
