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
