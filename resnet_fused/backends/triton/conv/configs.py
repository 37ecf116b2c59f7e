"""Which tile serves which convolution: pure functions of the problem's sizes."""

from functools import lru_cache
from typing import NamedTuple

Config = dict[str, int | bool]
MIN_GROUP_CHANNELS = 16  # the narrowest tile; two groups in one would let a NaN of one reach the other
_SHARED = 96 * 1024  # bytes that every GPU since 8.0 gives a program; two share a multiprocessor of an A100 or H100


class Problem(NamedTuple):
    """What a configuration depends on."""

    M: int  # output pixels: N * P * Q
    K: int  # output channels of one group
    C: int  # input channels of one group
    taps: int  # R * S
    groups: int
    itemsize: int
    tensor_cores: bool  # 16-bit, or float32 as TF32
    flat: bool  # few channels: R, S and C are one dimension
    descriptors: bool  # tensor descriptors can serve it: 1x1, stride 1, capability 9.0 or later, rows of 16 bytes
    wide: bool  # 256 columns fit the registers: capability 9.0 or later
    multiprocessors: int

    def programs(self, block_m: int, block_n: int) -> int:
        return cdiv(self.M, block_m) * self.groups * cdiv(self.K, block_n)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(low: int, n: int, high: int) -> int:
    """The least power of two not below n, between low and high."""
    return max(low, min(high, 1 << (n - 1).bit_length()))


def _config(p: Problem, block_m: int, block_n: int, stages: int = 4, descriptors: bool = False) -> Config:
    depth = p.taps * p.C if p.flat else p.C
    block_k = _power_of_2(16, depth, 32 if p.flat else 128 // p.itemsize)  # a line of 128 bytes
    steps = 2 if p.flat else cdiv(depth, block_k) * p.taps  # 2-byte loads of the flat kernel are not pipelined
    stage = (block_m + block_n) * block_k * p.itemsize
    stages = stages if p.itemsize == 2 else 3  # with more, sm_80 spills in multiply-adds and sm_100 in TF32
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": 8 if block_m > 64 or block_n >= 64 or p.itemsize == 4 else 4,
        "num_stages": max(2, min(stages, steps, _SHARED // stage)),  # no more buffers than there are steps
        "descriptors": descriptors,
    }


def _tiles(p: Problem) -> list[tuple[int, int]]:
    """(BLOCK_M, BLOCK_N), largest first."""
    if not p.tensor_cores:
        return [(64, _power_of_2(16, p.K, 64)), (32, _power_of_2(16, p.K, 32))]
    widest = _power_of_2(16, p.K, 128)
    tiles = [(128, 128), (128, 64), (64, 64), (64, 32), (64, 16)]
    return list(dict.fromkeys((block_m, min(block_n, widest)) for block_m, block_n in tiles))


@lru_cache(1024)
def config(p: Problem) -> Config:
    """The default: the largest tile that still gives every multiprocessor a program, else the smallest."""
    tiles = _tiles(p)
    tile = next((t for t in tiles if p.programs(*t) >= p.multiprocessors), tiles[-1])
    found = _config(p, *tile, descriptors=p.descriptors)
    if p.multiprocessors == 1 and not p.flat:  # Triton's interpreter, where a step costs the same whatever its size
        found |= {"BLOCK_M": 64, "BLOCK_N": _power_of_2(16, p.K, 512), "BLOCK_K": _power_of_2(16, p.C, 512)}
    return found


def candidates(p: Problem) -> list[Config]:
    """What `tune` tries; the first is the default, with which a layer runs that was not tuned."""
    default = config(p)
    tiles = [t for t in _tiles(p) if 4 * p.programs(*t) >= p.multiprocessors] or _tiles(p)[-1:]
    if p.wide and p.tensor_cores and p.K > 128 and p.programs(128, 256) >= p.multiprocessors:
        tiles.append((128, 256))
    found = [default, default | {"num_stages": max(2, default["num_stages"] - 1)}]
    if p.itemsize == 2 and not p.flat and (default["BLOCK_M"], default["BLOCK_N"]) == (128, 64):
        found.append(default | {"num_warps": 4})
    for descriptors in (False, True) if p.descriptors else (False,):
        found += [_config(p, *tile, descriptors=descriptors) for tile in tiles]
    return [c for i, c in enumerate(found) if c not in found[:i]]
