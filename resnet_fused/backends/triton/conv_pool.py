"""7x7 convolution of stride 2 + BN + ReLU + 3x3 max pooling of stride 2, of which only the pooled map is written.

A program walks down a band of one image, one row of the convolution after the other. Row j of its tiles is one pooled
column q: the convolution's even column 2q and its odd column 2q + 1 are sums of their own over the same weights, and
the odd column 2q - 1 is row j - 1. What a row has in common with the next pooled row stays in registers. After ReLU
nothing is below 0, which thus stands for what is outside the convolution's map.
"""

import triton
import triton.language as tl

from .common import dot, normalize, round_to

_R = tl.constexpr(7)
NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _pixels(address, in_x, bytes_scale, bytes_shift, dtype: tl.constexpr):
    """[BLOCK_Q, BLOCK_K] of x; what is outside it is 0, of bytes 0 of what is normalised."""
    a = tl.load(address, in_x, other=0)
    if bytes_scale is not None:
        v = a.to(tl.float32) * bytes_scale[None, :] - bytes_shift[None, :]
        a = round_to(tl.where(in_x, v, 0.0), dtype)
    return a


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=NAN)


@triton.jit(do_not_specialize=["H", "W", "P", "Q", "strips", "bands", "rows", "stride_n", "stride_h"])
def conv_pool_kernel(
    x,  # [N, C, H, W] of any strides, of weight's dtype or bytes
    weight,  # [K, 7, 7, C]
    bn_weight,  # [K] or None, as the next
    bn_bias,
    running_mean,  # [K], as the next
    running_var,
    mean,  # [C] where x is of bytes, as the next
    std,
    y,  # [N, P, Q, K]
    eps,
    H,
    W,
    P,
    Q,
    K,
    strips,  # of BLOCK_Q - 1 pooled columns
    bands,  # of `rows` pooled rows
    rows,
    stride_n,  # of x
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    DENSE: tl.constexpr,  # a row of x is [W, C] without gaps
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINES: tl.constexpr,  # rows of the kernel in one step
    BLOCK_K: tl.constexpr,  # LINES * 7 * C at least
):
    program = tl.program_id(0)
    column_tiles = tl.cdiv(K, BLOCK_N)
    first_k = program % column_tiles * BLOCK_N
    strip = program // column_tiles % strips
    band = program // (column_tiles * strips)
    image = band // bands  # 64-bit where it is multiplied
    first = band % bands * rows

    j = tl.arange(0, BLOCK_Q)
    q = strip * (BLOCK_Q - 1) - 1 + j  # the first is the neighbour of the second, and not written
    k = first_k + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_K)
    in_k = k < K
    r, s = t // (_R * C), t // C % _R
    w = 4 * q[:, None] - 3 + s[None, :]  # of the even column's window; the odd one's is 2 columns on
    in_even = (t < LINES * _R * C)[None, :] & (w >= 0) & (w < W)
    in_odd = (t < LINES * _R * C)[None, :] & (w >= -2) & (w < W - 2)
    columns = (
        ((4 * q - 3) * C)[:, None] + (t % (_R * C))[None, :] if DENSE else w * stride_w + (t % C * stride_c)[None, :]
    )
    columns += (r * stride_h)[None, :]
    bytes_scale, bytes_shift = None, None
    if mean is not None:
        bytes_std = tl.load(std + t % C)
        bytes_scale = 1.0 / (255.0 * bytes_std)
        bytes_shift = tl.load(mean + t % C) / bytes_std
    weight_tile = weight + tl.minimum(k, K - 1)[None, :] * (_R * _R * C) + t[:, None]
    x_image = x + tl.cast(image, tl.int64) * stride_n

    even_in_map = ((q >= 0) & (4 * q < W))[:, None]
    odd_in_map = ((q >= 0) & (4 * q + 2 < W))[:, None]
    left = tl.broadcast_to(tl.maximum(j - 1, 0)[:, None], (BLOCK_Q, BLOCK_N))
    written = ((j > 0) & (q < Q))[:, None] & in_k[None, :]
    offset = q[:, None] * K + k[None, :]

    kept = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    for row in range(tl.maximum(2 * first - 1, 0), tl.minimum(2 * (first + rows), 2 * P)):  # of the convolution
        even = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
        odd = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
        for line in range(0, _R, LINES):
            h = 2 * row - 3 + line
            in_rows = ((h + r >= 0) & (h + r < H) & (line + r < _R))[None, :]
            x_row = x_image + tl.cast(h, tl.int64) * stride_h
            in_taps = (t < LINES * _R * C) & (line + r < _R)
            b = tl.load(weight_tile + line * (_R * C), in_taps[:, None], other=0.0)
            a = _pixels(x_row + columns, in_even & in_rows, bytes_scale, bytes_shift, b.dtype)
            even = dot(a, b, even, PRECISION)
            a = _pixels(x_row + 2 * stride_w + columns, in_odd & in_rows, bytes_scale, bytes_shift, b.dtype)
            odd = dot(a, b, odd, PRECISION)
        in_map = 2 * row < H
        even = normalize(even, bn_weight, bn_bias, running_mean, running_var, k, in_k, eps)
        odd = normalize(odd, bn_weight, bn_bias, running_mean, running_var, k, in_k, eps)
        even = tl.where((even <= 0) | ~(even_in_map & in_map), 0.0, even)  # keeps NaN
        odd = tl.where((odd <= 0) | ~(odd_in_map & in_map), 0.0, odd)
        z = _max(_max(even, odd), tl.gather(odd, left, 0))
        ends = row % 2 == 1  # the last of a pooled row's three, and the first of the next one's
        p = row // 2
        pooled = _max(kept, z)
        line = (tl.cast(image, tl.int64) * P + p) * Q * K
        tl.store(y + line + offset, round_to(pooled, y.dtype.element_ty), written & ends & (p >= first))
        kept = tl.where(ends, z, pooled)
