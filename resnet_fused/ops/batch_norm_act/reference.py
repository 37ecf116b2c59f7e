"""`batch_norm_act` as PyTorch's own operators compute it: what serves without a fused backend."""

import torch.nn.functional as F
from torch import Tensor

Vectors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # weight, bias, running_mean, running_var


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    residual_bn: Vectors | None = None,
    pre_add: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
) -> Tensor | tuple[Tensor, Tensor]:
    """`batch_norm_act` in plain PyTorch, in torchvision's order."""
    if pre_add is not None:
        x = x + pre_add
    y = _batch_norm(x, (weight, bias, running_mean, running_var), training, momentum, eps)
    if residual is not None:
        if residual_bn is not None:
            residual = _batch_norm(residual, residual_bn, training, momentum, eps)
        y = y + residual
    if act == "relu":
        y = F.relu(y)
    return y if pre_add is None else (y, x)


def _batch_norm(x: Tensor, bn: Vectors, training: bool, momentum: float, eps: float) -> Tensor:
    weight, bias, mean, var = bn
    return F.batch_norm(x, mean, var, weight, bias, training or mean is None, momentum, eps)
