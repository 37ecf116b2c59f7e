"""Backward of BN + residual add + ReLU: one pass for the sums, one for the images' gradients."""

import triton
import triton.language as tl

from ..common import round_to
from .tiles import load_bn, place, unpack_bits


@triton.jit
def load_tile(
    dy,
    z,
    residual,
    relu_mask,
    bn,  # of load_bn, as the next
    bn2,
    first_row,  # 64-bit: M * C may pass 2^31
    block,
    M,
    C,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dz, z - mean, residual - mean2 (where there is one), and where the tile lies."""
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_M)
    in_rows = (row < M - first_row)[:, None]
    mask = in_rows & (c < C)[None, :]
    base = first_row * C
    offset = row[:, None] * C + c[None, :]

    dz = tl.load(dy + base + offset, mask, other=0.0).to(tl.float32)
    centered = tl.load(z + base + offset, mask, other=0.0).to(tl.float32) - bn[0]
    centered2 = centered
    if residual is not None:
        centered2 = tl.load(residual + base + offset, mask, other=0.0).to(tl.float32)
        if bn2 is not None:
            centered2 -= bn2[0]
    if RELU:
        if relu_mask is not None:
            width = tl.cdiv(C, 8)
            byte = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
            at = row[:, None] * width + byte[None, :]
            packed = tl.load(relu_mask + first_row * width + at, in_rows & (byte < width)[None, :], other=0)
            dz = tl.where(unpack_bits(packed, BLOCK_M, BLOCK_C), dz, 0.0)
        else:
            pre_activation = centered * bn[2] + bn[3]
            if bn2 is not None:
                pre_activation += centered2 * bn2[2] + bn2[3]
            elif residual is not None:
                pre_activation += centered2
            dz = tl.where(pre_activation <= 0, 0.0, dz)  # NaN passes
    return dz, centered, centered2, base, offset, mask


@triton.jit(do_not_specialize=["M", "tiles"])
def sums_kernel(
    dy,  # [M, C], M = N * H * W
    z,  # [M, C]
    weight,  # [C] or None, as the next
    bias,
    mean,  # [C]
    var,  # [C]
    residual,  # [M, C] or None
    residual_weight,  # [C] or None, as the next three
    residual_bias,
    residual_mean,
    residual_var,
    relu_mask,  # [M, ceil(C / 8)] uint8 or None
    partial,  # [splits, 2 or 3, C]: of dz, of dz * xhat and, where the residual has its BN, of dz * rhat
    M,
    C,
    tiles,
    eps,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block, split = place(C, BLOCK_C)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    bn = load_bn(weight, bias, mean, var, c, c < C, eps)
    bn2 = None
    if residual_mean is not None:
        bn2 = load_bn(residual_weight, residual_bias, residual_mean, residual_var, c, c < C, eps)

    first_row = split.to(tl.int64) * tiles * BLOCK_M
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_xhat = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_rhat = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for _ in tl.range(tl.minimum(tl.cdiv(M - first_row, BLOCK_M), tiles).to(tl.int32), num_stages=3):
        dz, centered, centered2, _, _, _ = load_tile(
            dy, z, residual, relu_mask, bn, bn2, first_row, block, M, C, RELU, BLOCK_M, BLOCK_C
        )
        sum_dz += dz
        sum_xhat += dz * centered
        if bn2 is not None:
            sum_rhat += dz * centered2
        first_row += BLOCK_M

    at = split * (2 if bn2 is None else 3) * C + c
    tl.store(partial + at, tl.sum(sum_dz, 0), c < C)
    tl.store(partial + C + at, tl.sum(sum_xhat * bn[1], 0), c < C)
    if bn2 is not None:
        tl.store(partial + 2 * C + at, tl.sum(sum_rhat * bn2[1], 0), c < C)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    partial,  # [splits, 2 or 3, C]
    sum_dz,  # [C], as the next
    sum_xhat,
    sum_rhat,  # or None: then there are two
    C,
    splits,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.arange(0, SPLITS)
    mask = (split < splits)[:, None] & (c < C)[None, :]
    at = split[:, None] * (2 if sum_rhat is None else 3) * C + c[None, :]
    tl.store(sum_dz + c, tl.sum(tl.load(partial + at, mask, other=0.0), 0), c < C)
    tl.store(sum_xhat + c, tl.sum(tl.load(partial + C + at, mask, other=0.0), 0), c < C)
    if sum_rhat is not None:
        tl.store(sum_rhat + c, tl.sum(tl.load(partial + 2 * C + at, mask, other=0.0), 0), c < C)


@triton.jit
def load_means(sum_dz, sum_hat, rstd, count, c, in_range):
    """mean(dz) and rstd * mean(dz * xhat) in float32 [1, BLOCK_C]: what training subtracts."""
    mean_dz = tl.div_rn(tl.load(sum_dz + c, in_range, other=0.0), count)
    mean_hat = tl.div_rn(tl.load(sum_hat + c, in_range, other=0.0), count)
    return mean_dz[None, :], mean_hat[None, :] * rstd


@triton.jit(do_not_specialize=["M", "tiles"])
def dx_kernel(
    dy,  # [M, C], M = N * H * W
    z,  # [M, C]
    weight,  # [C] or None, as the next
    bias,
    mean,  # [C]
    var,  # [C]
    residual,  # [M, C] or None
    residual_weight,  # [C] or None, as the next three
    residual_bias,
    residual_mean,
    residual_var,
    relu_mask,  # [M, ceil(C / 8)] uint8 or None
    sum_dz,  # [C] or None
    sum_xhat,  # [C], or None where the statistics were given
    sum_rhat,  # [C], or None where the shortcut's statistics were given
    count_tensor,  # [1], or None: it replaces count
    dtotal,  # [M, C] or None
    dx,  # [M, C] or None
    dresidual,  # [M, C] or None
    count,  # elements a channel
    M,
    C,
    tiles,
    eps,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block, split = place(C, BLOCK_C)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    bn = load_bn(weight, bias, mean, var, c, c < C, eps)
    bn2 = None
    if residual_mean is not None:
        bn2 = load_bn(residual_weight, residual_bias, residual_mean, residual_var, c, c < C, eps)
    if count_tensor is not None:
        count = tl.load(count_tensor)
    if sum_xhat is not None:
        means = load_means(sum_dz, sum_xhat, bn[1], count, c, c < C)
    if bn2 is not None:
        if sum_rhat is not None:
            means2 = load_means(sum_dz, sum_rhat, bn2[1], count, c, c < C)

    first_row = split.to(tl.int64) * tiles * BLOCK_M
    for _ in tl.range(tl.minimum(tl.cdiv(M - first_row, BLOCK_M), tiles).to(tl.int32), num_stages=3):
        dz, centered, centered2, base, offset, mask = load_tile(
            dy, z, residual, relu_mask, bn, bn2, first_row, block, M, C, RELU, BLOCK_M, BLOCK_C
        )
        if dx is not None:
            g = dz
            if sum_xhat is not None:
                g -= means[0] + centered * means[1]
            g *= bn[2]
            if dtotal is not None:
                g += tl.load(dtotal + base + offset, mask, other=0.0).to(tl.float32)
            tl.store(dx + base + offset, round_to(g, dx.dtype.element_ty), mask)
        if dresidual is not None:
            g2 = dz
            if bn2 is not None:
                if sum_rhat is not None:
                    g2 -= means2[0] + centered2 * means2[1]
                g2 *= bn2[2]
            tl.store(dresidual + base + offset, round_to(g2, dresidual.dtype.element_ty), mask)
        first_row += BLOCK_M
