"""The operators that `_C` registers."""

from collections.abc import Sequence

import torch
from torch import Tensor


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    pre_add: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """act(BN(x + pre_add) + BN(residual)) with given statistics, and the sum x + pre_add (0 elements without pre_add).

    x, residual, pre_add: [N, C, H, W], dense channels_last; BN vectors: [C].

    Raises:
        RuntimeError: an argument has another shape, dtype, layout or device; the message names it.
    """
    return torch.ops.resnet_fused_cuda.batch_norm_act.default(
        x, weight, bias, mean, var, eps,
        residual, residual_weight, residual_bias, residual_mean, residual_var, pre_add, relu,
    )  # fmt: skip


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    relu: bool,
    config: dict[str, int],
) -> Tensor:
    """act(BN(conv(x) + bias) + residual) with given statistics, in one kernel.

    x, residual: [N, C, H, W], weight: [K, C, R, S], all dense channels_last; bias and BN vectors: [K]; groups is 1.

    Raises:
        RuntimeError: an argument has another shape, dtype, layout, alignment or device, or the launch failed.
    """
    return torch.ops.resnet_fused_cuda.conv_bn_act.default(
        x, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, residual, relu, **config
    )


def stem(*args) -> Tensor:
    """Max pooling of ReLU of BN of a 7x7 convolution in one kernel, of `ops.stem.Call`'s fields; y in channels_last.

    x: [N, C, H, W] of any strides, C 4 at most; weight: [K, C, 7, 7], float16 or bfloat16, dense channels_last, K a
    multiple of 8; vectors contiguous.

    Raises:
        RuntimeError: an argument has another shape, dtype, layout or device, or the launch failed.
    """
    return torch.ops.resnet_fused_cuda.stem.default(*args)


def statistics(*args):
    """As `triton.batch_norm_train.statistics`; RuntimeError for an argument of another shape, dtype or layout."""
    return torch.ops.resnet_fused_cuda.batch_norm_statistics.default(*args)


def batch_statistics(*args):
    """As the run of `triton.batch_norm_train.plan_batch_statistics`."""
    return torch.ops.resnet_fused_cuda.batch_statistics.default(*args)


def merge_ranks(*args):
    """As `triton.batch_norm_train.merge_ranks`."""
    return torch.ops.resnet_fused_cuda.merge_ranks.default(*args)


def apply_with_mask(*args):
    """As `triton.batch_norm_train.apply_with_mask`."""
    return torch.ops.resnet_fused_cuda.batch_norm_act_mask.default(*args)


def backward_sums(*args):
    """As `triton.batch_norm_train.backward_sums`."""
    return torch.ops.resnet_fused_cuda.batch_norm_act_backward_sums.default(*args)


def backward_dx(*args):
    """As `triton.batch_norm_train.backward_dx`, every argument given."""
    return torch.ops.resnet_fused_cuda.batch_norm_act_backward_dx.default(*args)
