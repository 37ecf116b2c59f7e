"""BN with given statistics + residual + ReLU in one pass over memory."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import normalize, round_to
from .launch import Launch


@triton.jit(do_not_specialize=["M"])
def apply_kernel(
    x,  # [M, C], M = N * H * W
    weight,  # [C] or None, as the next three
    bias,
    mean,
    var,
    residual,  # [M, C] or None
    residual_weight,  # [C] or None, as the next three
    residual_bias,
    residual_mean,
    residual_var,
    pre_add,  # [M, C] or None
    y,  # [M, C]
    total,  # [M, C] or None: x + pre_add
    M,
    C,
    eps,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M  # 64-bit: M * C may pass 2^31
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_M)
    in_range = c < C
    mask = (row < M - first_row)[:, None] & in_range[None, :]
    base = first_row * C
    offset = row[:, None] * C + c[None, :]  # inside the tile

    z = tl.load(x + base + offset, mask, other=0.0).to(tl.float32)
    if pre_add is not None:
        z = round_to(z + tl.load(pre_add + base + offset, mask, other=0.0).to(tl.float32), y.dtype.element_ty)
        tl.store(total + base + offset, z, mask)
        z = z.to(tl.float32)
    z = normalize(z, weight, bias, mean, var, c, in_range, eps)
    if residual is not None:
        r = tl.load(residual + base + offset, mask, other=0.0).to(tl.float32)
        z += normalize(r, residual_weight, residual_bias, residual_mean, residual_var, c, in_range, eps)
    if RELU:
        z = tl.where(z <= 0, 0.0, z)  # keeps NaN
    tl.store(y + base + offset, round_to(z, y.dtype.element_ty), mask)


def apply_config(C: int) -> dict[str, int]:
    """Tile of 4096 elements: four 128-bit loads a thread in 16-bit types."""
    block_c = min(128, triton.next_power_of_2(C))
    return {"BLOCK_M": 4096 // block_c, "BLOCK_C": block_c, "num_warps": 4}


def plan_apply(
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
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`apply` for all arguments of this metadata."""
    N, C, H, W = x.shape
    M = N * H * W
    config = apply_config(C)
    grid = (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(C, config["BLOCK_C"]))
    launch = Launch(apply_kernel, grid, {"M": M, "C": C, "eps": eps, "RELU": relu, **config})

    def run(x, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, pre_add, relu):
        y = torch.empty_like(x, memory_format=torch.channels_last)
        total = None if pre_add is None else torch.empty_like(y)
        if M:
            launch(x, weight, bias, mean, var, residual, weight2, bias2, mean2, var2, pre_add, y, total)
        return y, total

    return run


def apply(*args) -> tuple[Tensor, Tensor]:
    """y and x + pre_add (of no elements without one); x, residual and pre_add dense channels_last [N, C, H, W]."""
    y, total = plan_apply(*args)(*args)
    return y, y.new_empty(0) if total is None else total
