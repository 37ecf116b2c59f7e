"""Batch statistics in one read, and the plain residual join that also writes its ReLU's mask."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import filled
from ..common import normalize, round_to
from ..launch import Launch
from .tiles import merge_tiling, pack_bits, place, tiling


@triton.jit(do_not_specialize=["M", "tiles"])
def statistics_kernel(
    x,  # [M, C], M = N * H * W
    pre_add,  # [M, C] or None
    total,  # [M, C] or None: x + pre_add
    partial,  # [splits, 2, C]: the mean less the pivot, and M2
    M,
    C,
    tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block, split = place(C, BLOCK_C)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_range = c < C
    row = tl.arange(0, BLOCK_M)
    offset = row[:, None] * C + c[None, :]  # inside a tile
    first_row = split.to(tl.int64) * tiles * BLOCK_M  # 64-bit: M * C may pass 2^31
    rows = tl.minimum(M - first_row, tiles * BLOCK_M).to(tl.int32)
    base = first_row * C

    pivot = tl.load(x + c, in_range, other=0.0).to(tl.float32)  # the channel's first element
    if pre_add is not None:
        pivot += tl.load(pre_add + c, in_range, other=0.0).to(tl.float32)
        pivot = round_to(pivot, x.dtype.element_ty).to(tl.float32)

    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)  # Welford's recurrence down each place of the tile
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for tile in tl.range(tl.cdiv(rows, BLOCK_M), num_stages=4):
        mask = (row < rows - tile * BLOCK_M)[:, None] & in_range[None, :]
        z = tl.load(x + base + offset, mask, other=0.0).to(tl.float32)
        if pre_add is not None:
            z += tl.load(pre_add + base + offset, mask, other=0.0).to(tl.float32)
            z = round_to(z, x.dtype.element_ty)
            tl.store(total + base + offset, z, mask)
            z = z.to(tl.float32)
        d = tl.where(mask, z - pivot[None, :] - mean, 0.0)
        part = 1.0 / (tile + 1)  # within 2 ulp: a division to nearest would cost every tile its time
        mean += d * part
        m2 += d * d * (1.0 - part)
        base += BLOCK_M * C

    n = tl.cdiv(rows - row, BLOCK_M).to(tl.float32)[:, None]  # elements in each place
    count = rows.to(tl.float32)
    merged = tl.div_rn(tl.sum(mean * n, 0), count)
    merged += tl.div_rn(tl.sum((mean - merged[None, :]) * n, 0), count)  # what the long sum's roundings lost
    mean -= merged[None, :]
    m2 += mean * mean * n
    at = 2 * split * C + c
    tl.store(partial + at, merged, in_range)
    tl.store(partial + C + at, tl.sum(m2, 0), in_range)


@triton.jit(do_not_specialize=["M", "splits", "rows"])
def merge_kernel(
    z,  # [M, C]
    partial,  # [splits, 2, C]: mean less the pivot, M2
    mean,  # [C]
    m2,  # [C] or None, as the next three
    var,
    running_mean,
    running_var,
    momentum,  # of the running statistics
    M,
    C,
    splits,
    rows,  # of every split but the last
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Chan's formula over all splits at once."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.arange(0, SPLITS)
    mask = (split < splits)[:, None] & (c < C)[None, :]
    at = 2 * split[:, None] * C + c[None, :]
    n = tl.minimum(M - split.to(tl.int64) * rows, rows)
    n = tl.where(split < splits, n, 0).to(tl.float32)[:, None]
    means = tl.load(partial + at, mask, other=0.0)
    count = M.to(tl.float32)
    merged = tl.div_rn(tl.sum(means * n, 0), count)
    merged += tl.div_rn(tl.sum((means - merged[None, :]) * n, 0), count)
    means -= merged[None, :]
    m2s = tl.load(partial + C + at, mask, other=0.0) + means * means * n
    pivot = tl.load(z + c, c < C, other=0.0).to(tl.float32)
    tl.store(mean + c, pivot + merged, c < C)
    sum_m2 = tl.sum(m2s, 0)
    if m2 is not None:
        tl.store(m2 + c, sum_m2, c < C)
    if var is not None:
        elements = M.to(tl.float32)
        tl.store(var + c, tl.div_rn(sum_m2, elements), c < C)
        if running_mean is not None:
            old = tl.load(running_mean + c, c < C, other=0.0).to(tl.float32)
            new = round_to(old + (pivot + merged - old) * momentum, running_mean.dtype.element_ty)
            tl.store(running_mean + c, new, c < C)
            old = tl.load(running_var + c, c < C, other=0.0).to(tl.float32)
            unbiased = tl.div_rn(sum_m2, elements - 1)
            new = round_to(old + (unbiased - old) * momentum, running_var.dtype.element_ty)
            tl.store(running_var + c, new, c < C)


@triton.jit(do_not_specialize=["M"])
def apply_with_mask_kernel(
    x,  # [M, C]
    weight,  # [C] or None, as the next
    bias,
    mean,  # [C]
    var,  # [C]
    residual,  # [M, C]
    y,  # [M, C]
    relu_mask,  # [M, ceil(C / 8)] uint8
    M,
    C,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_M)
    in_range = c < C
    in_rows = (row < M - first_row)[:, None]
    mask = in_rows & in_range[None, :]
    base = first_row * C
    offset = row[:, None] * C + c[None, :]

    z = tl.load(x + base + offset, mask, other=0.0).to(tl.float32)
    z = normalize(z, weight, bias, mean, var, c, in_range, eps)
    z += tl.load(residual + base + offset, mask, other=0.0).to(tl.float32)
    z = tl.where(z <= 0, 0.0, z)  # keeps NaN
    tl.store(y + base + offset, round_to(z, y.dtype.element_ty), mask)

    packed = pack_bits(z != 0, BLOCK_M, BLOCK_C)
    width = tl.cdiv(C, 8)
    byte = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    at = row[:, None] * width + byte[None, :]
    tl.store(relu_mask + first_row * width + at, packed, in_rows & (byte < width)[None, :])


def plan_statistics(x: Tensor, pre_add: Tensor | None = None) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """`statistics` for all arguments of this metadata."""
    gather = _plan_gather(x)

    def run(x, pre_add=None):
        mean, m2 = (torch.empty(x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2))
        return mean, m2, gather(x, pre_add, mean, m2, None, None, None, 0.0)

    return run


def plan_batch_statistics(
    x: Tensor, pre_add: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None
) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """For all arguments of this metadata: mean, var and x + pre_add; writes the running statistics."""
    gather = _plan_gather(x)

    def run(x, pre_add, running_mean, running_var, momentum):
        mean = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
        var = torch.empty_like(mean)
        return mean, var, gather(x, pre_add, mean, None, var, running_mean, running_var, momentum)

    return run


def _plan_gather(x: Tensor) -> Callable[..., Tensor | None]:
    """The two launches: partial statistics of every split of the rows, then their merge; returns x + pre_add."""
    N, C, H, W = x.shape
    M = N * H * W
    grid, splits, config = tiling(M, C, programs=8)
    gather = Launch(statistics_kernel, grid, {"M": M, "C": C, **config})
    rows = config["tiles"] * config["BLOCK_M"]
    grid, config = merge_tiling(C, programs=8)
    merge = Launch(merge_kernel, grid, {"M": M, "C": C, "splits": splits, "rows": rows, **config})

    def run(x, pre_add, mean, m2, var, running_mean, running_var, momentum):
        total = None if pre_add is None else torch.empty_like(x, memory_format=torch.channels_last)
        partial = torch.empty((splits, 2, C), dtype=torch.float32, device=x.device)
        gather(x, pre_add, total, partial)
        merge(x if total is None else total, partial, mean, m2, var, running_mean, running_var, numbers=(momentum,))
        return total

    return run


def statistics(x: Tensor, pre_add: Tensor | None = None) -> tuple[Tensor, ...]:
    """Mean [C], M2 [C] = sum (z - mean)^2 and z of z = x (+ pre_add, rounded to x's dtype).

    x and pre_add dense channels_last [N, C, H, W], not empty; z has no elements where pre_add is None: then it is x.
    """
    return filled(plan_statistics(x, pre_add)(x, pre_add), x)


def plan_apply_with_mask(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    residual: Tensor,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`apply_with_mask` for all arguments of this metadata."""
    N, C, H, W = x.shape
    M = N * H * W
    block_c = min(256, max(8, triton.next_power_of_2(C)))  # 256 channels are a 32-byte sector of the mask
    config = {"BLOCK_M": 4096 // block_c, "BLOCK_C": block_c, "num_warps": 4}
    grid = (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(C, block_c))
    launch = Launch(apply_with_mask_kernel, grid, {"M": M, "C": C, "eps": eps, **config})
    width = triton.cdiv(C, 8)

    def run(x, weight, bias, mean, var, eps, residual):
        y = torch.empty_like(x, memory_format=torch.channels_last)
        relu_mask = torch.empty((M, width), dtype=torch.uint8, device=x.device)
        if M:
            launch(x, weight, bias, mean, var, residual, y, relu_mask)
        return y, relu_mask

    return run


def apply_with_mask(*args) -> tuple[Tensor, Tensor]:
    """y = relu(BN(x) + residual), and where its gradient passes: [N * H * W, ceil(C / 8)] uint8.

    Channel 8 * i + j is bit j of byte i. x and residual dense channels_last [N, C, H, W].
    """
    return plan_apply_with_mask(*args)(*args)
