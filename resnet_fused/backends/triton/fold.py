"""BN folded into a convolution's weight and bias, in one launch: what cuDNN's fused convolutions take."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import round_to
from .launch import Launch


@triton.jit
def fold_kernel(
    weight,  # [K, L], L = R * S * C
    bias,  # [K] or None, as the next four
    bn_weight,
    bn_bias,
    mean,
    var,
    folded_weight,  # [K, L]
    folded_bias,  # [K]
    L,
    eps,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(0)
    shift = 0.0
    if bias is not None:
        shift = tl.load(bias + k).to(tl.float32)
    scale = 1.0
    if mean is not None:
        scale = 1.0 / tl.sqrt_rn(tl.load(var + k).to(tl.float32) + eps)
        if bn_weight is not None:
            scale *= tl.load(bn_weight + k).to(tl.float32)
        shift = (shift - tl.load(mean + k).to(tl.float32)) * scale
        if bn_bias is not None:
            shift += tl.load(bn_bias + k).to(tl.float32)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weight + k * L + i, i < L, other=0.0).to(tl.float32) * scale
    tl.store(folded_weight + k * L + i, round_to(w, folded_weight.dtype.element_ty), i < L)
    if tl.program_id(1) == 0:
        one = tl.arange(0, 1)
        tl.store(folded_bias + k + one, round_to(tl.zeros([1], tl.float32) + shift, folded_bias.dtype.element_ty))


def plan_fold(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`fold` for all arguments of this metadata."""
    K, L = weight.shape[0], weight[0].numel()
    launch = Launch(fold_kernel, (K, triton.cdiv(L, 1024)), {"L": L, "eps": eps, "BLOCK": 1024, "num_warps": 4})

    def run(weight, bias, bn_weight, bn_bias, mean, var, eps):
        weight = weight.contiguous(memory_format=torch.channels_last)
        folded = torch.empty_like(weight, memory_format=torch.channels_last)
        shift = weight.new_empty(K)
        launch(weight, bias, bn_weight, bn_bias, mean, var, folded, shift)
        return folded, shift

    return run


def fold(*args) -> tuple[Tensor, Tensor]:
    """s * weight [K, C, R, S] in channels_last and s * (bias - mean) + bn_bias [K], in the weight's dtype."""
    return plan_fold(*args)(*args)
