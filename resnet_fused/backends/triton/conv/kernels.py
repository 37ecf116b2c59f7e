"""Implicit GEMM over NHWC: rows are output pixels (M = N * P * Q), columns output channels, weights [K, R, S, C]."""

import triton
import triton.language as tl

from ..common import dot, normalize, round_to

_GROUP_M = tl.constexpr(8)  # row tiles that go through all column tiles together: their input stays in L2
_STORE_N = tl.constexpr(32)


@triton.jit
def _tile(M, column_tiles, BLOCK_M: tl.constexpr):
    """(first row in 64 bits, column tile) of this program."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(M, BLOCK_M)
    first = program // (_GROUP_M * column_tiles) * _GROUP_M
    size = tl.minimum(row_tiles - first, _GROUP_M)
    inside = program % (_GROUP_M * column_tiles)
    return (first + inside % size).to(tl.int64) * BLOCK_M, inside // size


@triton.jit
def _pixels(first_row, P, Q, STRIDE_H, STRIDE_W, PAD_H, PAD_W, BLOCK_M: tl.constexpr):
    """Image, input row and input column of the first tap of BLOCK_M output pixels; the image in 64 bits."""
    image = first_row // (P * Q)
    pixel = (first_row - image * (P * Q)).to(tl.int32) + tl.arange(0, BLOCK_M)
    h = pixel % (P * Q) // Q * STRIDE_H - PAD_H
    w = pixel % Q * STRIDE_W - PAD_W
    return image + pixel // (P * Q), h, w


@triton.jit
def _finish(
    acc,  # [BLOCK_M, BLOCK_N]
    vectors,  # (bias, bn_weight, bn_bias, mean, var), [K] or None each
    residual,  # [M, K] or None
    y,  # [M, K]
    eps,
    first_row,
    first_k,
    rows,  # left from first_row on
    columns,  # left from first_k on
    K,  # channels of y
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue and the store, _STORE_N columns at a time: a thread then holds few values of the vectors."""
    if BLOCK_N > _STORE_N:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        _finish(left, vectors, residual, y, eps, first_row, first_k, rows, columns, K, RELU, BLOCK_M, HALF)
        first_k += HALF
        columns -= HALF
        _finish(right, vectors, residual, y, eps, first_row, first_k, rows, columns, K, RELU, BLOCK_M, HALF)
    else:
        row = tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        k = first_k + n
        in_range = n < columns
        mask = (row < rows)[:, None] & in_range[None, :]
        base = first_row * K
        offset = row[:, None] * K + k[None, :]
        bias, bn_weight, bn_bias, mean, var = vectors
        if bias is not None:
            acc += tl.load(bias + k, in_range, other=0.0).to(tl.float32)[None, :]
        acc = normalize(acc, bn_weight, bn_bias, mean, var, k, in_range, eps)
        if residual is not None:
            acc += tl.load(residual + base + offset, mask, other=0.0).to(tl.float32)
        if RELU:
            acc = tl.where(acc <= 0, 0.0, acc)  # keeps NaN
        tl.store(y + base + offset, round_to(acc, y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q"])
def conv_kernel(
    x,  # [N, H, W, GROUPS * C]
    weight,  # [GROUPS * K, R, S, C]
    bias,  # [GROUPS * K] or None, as the next four
    bn_weight,
    bn_bias,
    mean,
    var,
    residual,  # [M, GROUPS * K] or None
    y,  # [M, GROUPS * K]
    eps,
    M,
    H,
    W,
    C,  # of one group, as K
    P,
    Q,
    K,
    stride_n,  # of x
    stride_h,
    stride_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    GROUPS: tl.constexpr,
    WHOLE_C: tl.constexpr,  # C is a multiple of BLOCK_K
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_K)
    tiles = tl.cdiv(K, BLOCK_N)  # of one group
    first_row, column_tile = _tile(M, GROUPS * tiles, BLOCK_M)
    group = column_tile // tiles
    first_k = group * K + column_tile % tiles * BLOCK_N
    columns = K - column_tile % tiles * BLOCK_N

    image, h, w = _pixels(first_row, P, Q, STRIDE_H, STRIDE_W, PAD_H, PAD_W, BLOCK_M)
    rows = M - first_row
    in_rows = tl.arange(0, BLOCK_M) < rows
    in_columns = (n < columns)[None, :]
    pixel = image * stride_n + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    x_tile = x + group * C + pixel[:, None] + c[None, :]
    weight_tile = weight + first_k.to(tl.int64) * (R * S * C) + (n * (R * S * C))[None, :] + c[:, None]

    step_h = tl.cast(stride_h, tl.int64) * DILATION_H
    step_w = tl.cast(stride_w, tl.int64) * DILATION_W

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tap = 0
    first_c = 0
    for _ in range(0, R * S * tl.cdiv(C, BLOCK_K)):
        r = tap // S
        s = tap % S
        in_x = in_rows
        if PAD_H > 0:
            in_x &= (h + r * DILATION_H >= 0) & (h + r * DILATION_H < H)
        if PAD_W > 0:
            in_x &= (w + s * DILATION_W >= 0) & (w + s * DILATION_W < W)
        x_mask = in_x[:, None]
        weight_mask = in_columns
        if not WHOLE_C:
            in_c = c < C - first_c
            x_mask &= in_c[None, :]
            weight_mask &= in_c[:, None]
        a = tl.load(x_tile + (r * step_h + s * step_w + first_c), x_mask, other=0.0)
        b = tl.load(weight_tile + (tap * C + first_c), weight_mask, other=0.0)
        acc = dot(a, b, acc, PRECISION)
        first_c += BLOCK_K
        if R * S > 1:
            next_tap = first_c >= C
            tap = tl.where(next_tap, tap + 1, tap)
            first_c = tl.where(next_tap, 0, first_c)

    vectors = (bias, bn_weight, bn_bias, mean, var)
    _finish(acc, vectors, residual, y, eps, first_row, first_k, rows, columns, GROUPS * K, RELU, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def pointwise_kernel(
    x,  # descriptor of [M, C]
    weight,  # descriptor of [K, C]
    bias,  # [K] or None, as the next four
    bn_weight,
    bn_bias,
    mean,
    var,
    residual,  # [M, K] or None
    y,  # [M, K]
    eps,
    M,
    C,
    K,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """1x1, stride 1: a GEMM whose tiles the tensor memory accelerator brings, zeros beyond the edges."""
    first_row, column_tile = _tile(M, tl.cdiv(K, BLOCK_N), BLOCK_M)
    first_k = column_tile * BLOCK_N
    rows = M - first_row
    columns = K - first_k
    row = first_row.to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_c in range(0, C, BLOCK_K):
        acc = dot(x.load([row, first_c]), weight.load([first_k, first_c]).T, acc, PRECISION)
    vectors = (bias, bn_weight, bn_bias, mean, var)
    _finish(acc, vectors, residual, y, eps, first_row, first_k, rows, columns, K, RELU, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q"])
def stem_kernel(
    x,  # [N, H, W, C] of any strides
    weight,  # [K, R, S, C]
    bias,  # [K] or None, as the next four
    bn_weight,
    bn_bias,
    mean,
    var,
    residual,  # [M, K] or None
    y,  # [M, K]
    eps,
    M,
    H,
    W,
    P,
    Q,
    K,
    stride_n,  # of x
    stride_h,
    stride_w,
    stride_c,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    FAR_TAPS: tl.constexpr,  # 2^31 elements or more from the first tap to the last
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Few channels: (r, s, c) is one K dimension of R * S * C."""
    first_row, column_tile = _tile(M, tl.cdiv(K, BLOCK_N), BLOCK_M)
    first_k = column_tile * BLOCK_N
    image, h, w = _pixels(first_row, P, Q, STRIDE_H, STRIDE_W, PAD_H, PAD_W, BLOCK_M)
    rows = M - first_row
    in_rows = tl.arange(0, BLOCK_M) < rows
    n = tl.arange(0, BLOCK_N)
    columns = K - first_k
    in_columns = n < columns
    pixel = image * stride_n + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    weight_tile = weight + (first_k + n) * (R * S * C)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_tap in range(0, R * S * C, BLOCK_K):
        rsc = first_tap + tl.arange(0, BLOCK_K)
        if FAR_TAPS:
            rsc = rsc.to(tl.int64)
        in_taps = (rsc < R * S * C)[:, None]
        r = rsc // (S * C) * DILATION_H
        s = rsc // C % S * DILATION_W
        tap = rsc % C * stride_c + r * stride_h + s * stride_w
        tap_h = h[None, :] + r[:, None]
        tap_w = w[None, :] + s[:, None]
        in_x = in_taps & in_rows[None, :] & (tap_h >= 0) & (tap_h < H) & (tap_w >= 0) & (tap_w < W)
        a = tl.load(x + pixel[None, :] + tap[:, None], in_x, other=0.0)  # [BLOCK_K, BLOCK_M]: neighbours in w coalesce
        b = tl.load(weight_tile[None, :] + rsc[:, None], in_taps & in_columns[None, :], other=0.0)
        acc = dot(a.T, b, acc, PRECISION)

    vectors = (bias, bn_weight, bn_bias, mean, var)
    _finish(acc, vectors, residual, y, eps, first_row, first_k, rows, columns, K, RELU, BLOCK_M, BLOCK_N)
