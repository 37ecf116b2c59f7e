"""What several kernels share."""

import triton
import triton.language as tl

from . import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def round_to(v, dtype: tl.constexpr):
    """float32 to dtype, to nearest even; the interpreter's own conversion to bfloat16 truncates."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(v == v, rounded, 0x7FC0)  # NaN: the carry could turn it into infinity
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return v.to(dtype)


@triton.jit
def normalize(z, weight, bias, mean, var, c, in_range, eps):
    """(z - mean) * weight / sqrt(var + eps) + bias in float32; z [BLOCK_M, BLOCK_C], the vectors [C] or None."""
    if mean is not None:
        scale = 1.0 / tl.sqrt_rn(tl.load(var + c, in_range, other=1.0).to(tl.float32) + eps)
        if weight is not None:
            scale *= tl.load(weight + c, in_range, other=0.0).to(tl.float32)
        z = (z - tl.load(mean + c, in_range, other=0.0).to(tl.float32)[None, :]) * scale[None, :]
        if bias is not None:
            z += tl.load(bias + c, in_range, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _to_tf32(v):
    """Rounded as cuDNN's kernels do; of what is not, the multiplication drops the last 13 bits."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [v], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if _INTERPRETED:  # its bfloat16 products are wrong, its float32 products exact
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    elif PRECISION == "tf32" and a.dtype == tl.float32:
        a = _to_tf32(a)
        b = _to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)
