"""What the passes over [M, C] share: how rows and channels are shared out, BN's vectors, the 1-bit mask."""

from typing import Any

import triton
import triton.language as tl

from .. import INTERPRETED

# A tile's elements, and an A100's multiprocessors: a reduction's programs run there, or on a larger GPU, all at once.
# The interpreter is served best by few large tiles.
_TILE, _MULTIPROCESSORS = (2**14, 1) if INTERPRETED else (1024, 108)


def tiling(M: int, C: int, programs: int, max_tiles: int | None = None) -> tuple[tuple[int], int, dict[str, Any]]:
    """The grid, the number of splits of the M rows, and the kernel's configuration.

    A program sweeps `tiles` tiles, one below the other; a tile's rows are 128 bytes in 16-bit types. There are up to
    `programs` a multiprocessor, or more where that is over `max_tiles`. By the shape alone: a sum has the same bits on
    every GPU.
    """
    block_c = _block_c(C)
    block_m = min(512, _TILE // block_c)  # the interpreter adds a tile's rows one by one
    row_tiles, blocks = triton.cdiv(M, block_m), triton.cdiv(C, block_c)
    tiles = triton.cdiv(row_tiles, _most_splits(C, programs))
    tiles = tiles if max_tiles is None else min(tiles, max_tiles)
    splits = triton.cdiv(row_tiles, tiles)
    return (blocks * splits,), splits, {"tiles": tiles, "BLOCK_M": block_m, "BLOCK_C": block_c, "num_warps": 4}


def _block_c(C: int) -> int:
    return min(_TILE // 16, max(8, triton.next_power_of_2(C)))


def _most_splits(C: int, programs: int) -> int:
    return max(1, _MULTIPROCESSORS * programs // triton.cdiv(C, _block_c(C)))


def merge_tiling(C: int, programs: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and configuration of a kernel that merges the splits of `tiling`, for however many rows.

    All splits at once, 32 bytes of a row or more.
    """
    rows = max(32, triton.next_power_of_2(_most_splits(C, programs)))
    block_c = max(8, min(_TILE // 16, 2 * _TILE // rows))
    num_warps = max(1, min(4, rows * block_c // 2048))  # 64 elements a thread: more warps spill in Triton 3.6
    return (triton.cdiv(C, block_c),), {"SPLITS": rows, "BLOCK_C": block_c, "num_warps": num_warps}


@triton.jit
def place(C, BLOCK_C: tl.constexpr):
    """This program's block of channels and its split of the rows; neighbours lie side by side in memory."""
    blocks = tl.cdiv(C, BLOCK_C)
    return tl.program_id(0) % blocks, tl.program_id(0) // blocks


@triton.jit
def load_bn(weight, bias, mean, var, c, in_range, eps):
    """mean, 1 / sqrt(var + eps), scale and bias in float32 [1, BLOCK_C]; `normalize` is (z - mean) * scale + bias."""
    mean = tl.load(mean + c, in_range, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.load(var + c, in_range, other=1.0).to(tl.float32) + eps)
    scale = rstd
    if weight is not None:
        scale *= tl.load(weight + c, in_range, other=0.0).to(tl.float32)
    if bias is None:
        shift = tl.zeros_like(mean)
    else:
        shift = tl.load(bias + c, in_range, other=0.0).to(tl.float32)
    return mean[None, :], rstd[None, :], scale[None, :], shift[None, :]


@triton.jit
def pack_bits(keep, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_M, BLOCK_C] to [BLOCK_M, BLOCK_C // 8] uint8: channel 8 * i + j is bit j of byte i."""
    bits = tl.reshape(keep.to(tl.int32), (BLOCK_M, BLOCK_C // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_M, BLOCK_C)) != 0
