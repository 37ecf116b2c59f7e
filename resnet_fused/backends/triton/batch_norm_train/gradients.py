"""What launches the kernels of the backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...layout import filled
from ..launch import Launch
from .backward import dx_kernel, merge_kernel, sums_kernel
from .tiles import merge_tiling, tiling


def plan_backward_sums(
    dy: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    relu_mask: Tensor | None,
    relu: bool,
) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """`backward_sums` for all arguments of this metadata."""
    N, C, H, W = dy.shape
    M = N * H * W
    two = residual_mean is not None
    reads_residual = two or relu_mask is None
    programs = 4 if two else 7
    grid, splits, config = tiling(M, C, programs) if M else ((0,), 0, {})
    gather = Launch(sums_kernel, grid, {"M": M, "C": C, "eps": eps, "RELU": relu, **config})
    grid, config = merge_tiling(C, programs)
    merge = Launch(merge_kernel, grid, {"C": C, "splits": splits, **config})

    def run(dy, z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, relu_mask, relu):
        sum_dz = torch.empty(C, dtype=torch.float32, device=dy.device)
        sums = (sum_dz, torch.empty_like(sum_dz), torch.empty_like(sum_dz) if two else None)
        if M == 0:
            return tuple(s if s is None else s.zero_() for s in sums)
        partial = torch.empty((splits, 2 + two, C), dtype=torch.float32, device=dy.device)
        residual = residual if reads_residual else None
        gather(dy, z, weight, bias, mean, var, residual, weight2, bias2, mean2, var2, relu_mask, partial)
        merge(partial, *sums)
        return sums

    return run


def backward_sums(*args) -> tuple[Tensor, ...]:
    """Sums [C] over N, H and W of dz, dz * xhat and dz * rhat (of no elements where the residual has no BN), float32.

    dz is dy where the ReLU's gradient passes: by `relu_mask` of `apply_with_mask`, or by the pre-activation computed
    anew from z and the residual. With `relu_mask` a residual without BN may be None; images are dense channels_last
    [N, C, H, W].
    """
    return filled(plan_backward_sums(*args)(*args), args[4])


def plan_backward_dx(
    dy: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    relu_mask: Tensor | None,
    relu: bool,
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
    sum_dz_rhat: Tensor | None,
    count: Tensor | None,
    dtotal: Tensor | None = None,
    need_dx: bool = True,
    need_dresidual: bool = False,
) -> Callable[..., tuple[Tensor | None, Tensor | None]]:
    """`backward_dx` for all arguments of this metadata."""
    N, C, H, W = dy.shape
    M = N * H * W
    reads_residual = residual_mean is not None or relu_mask is None
    grid, _, config = tiling(M, C, programs=8, max_tiles=16) if M else ((0,), 0, {})
    launch = Launch(dx_kernel, grid, {"count": float(M), "M": M, "C": C, "eps": eps, "RELU": relu, **config})

    def run(
        dy, z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, relu_mask, relu,
        sum_dz, sum_xhat, sum_rhat, count, dtotal=None, need_dx=True, need_dresidual=False,
    ):  # fmt: skip
        dx = torch.empty_like(dy, memory_format=torch.channels_last) if need_dx else None
        dresidual = torch.empty_like(dy, memory_format=torch.channels_last) if need_dresidual else None
        if M and (need_dx or need_dresidual):
            residual = residual if reads_residual else None
            bn = (weight, bias, mean, var, residual, weight2, bias2, mean2, var2)
            launch(dy, z, *bn, relu_mask, sum_dz, sum_xhat, sum_rhat, count, dtotal, dx, dresidual)
        return dx, dresidual

    return run


def backward_dx(*args) -> tuple[Tensor, ...]:
    """dx = s * (dz - sum_dz / count - xhat * sum_dz_xhat / count) (+ dtotal), and the residual's gradient.

    s * dz where `sum_dz_xhat` is None: the statistics were given; `sum_dz_rhat` says the same of the shortcut's BN. The
    residual's gradient is dz, or has dx's form where the shortcut has a BN. One that is not needed has no elements.
    `count`, one float32 element, is the number of elements a channel behind the statistics; None: that of dy.
    """
    return filled(plan_backward_dx(*args)(*args), args[0])
