"""`stem` in Triton: one kernel."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from ..conv import vectors_unsupported
from . import conv
from .conv_pool import conv_pool_kernel
from .launch import Launch, compiled_class

if TYPE_CHECKING:
    from ...ops.stem import Call

Config = dict[str, int]
_MOST_CHANNELS = 4  # up to here a window of 7 columns fits a depth of 32


def unsupported(call: "Call") -> str | None:
    C = call.x.shape[1]
    if not 1 <= C <= _MOST_CHANNELS:
        return f"x has {C} channels; the kernel serves 1 to {_MOST_CHANNELS}"
    sides = zip(call.x.shape[1:], call.x.stride()[1:], strict=True)
    _, K, P, Q = out_shape(call)
    if max(sum((n - 1) * stride for n, stride in sides), K * P * Q) >= 2**31 - 2**16:
        return "one image spans 2^31 elements or more, of x or of the result; the kernel serves fewer"
    return vectors_unsupported(call.weight, call.bn)


def out_shape(call: "Call") -> tuple[int, int, int, int]:
    N, _, H, W = call.x.shape
    return N, call.weight.shape[0], (H + 3) // 4, (W + 3) // 4


def configs(call: "Call") -> list[Config]:
    """The default first: the largest band of rows that still gives every multiprocessor two programs."""
    N, K, P, Q = out_shape(call)
    capability, multiprocessors = conv.device(call.x.get_device())
    tensor_cores = call.weight.dtype.itemsize == 2 or call.allow_tf32()

    def tile(block_q: int, block_n: int, warps: int, lines: int = 1) -> Config:
        widest, most = max(16, triton.next_power_of_2(Q + 1)), max(16, triton.next_power_of_2(K))
        block = {"BLOCK_Q": min(block_q, widest), "BLOCK_N": min(block_n, most), "LINES": lines}
        return block | {"num_warps": warps, "num_stages": 2}

    tiles = [tile(32, 64, 8) if tensor_cores else tile(16, 16, 4)]  # what is larger spills without tensor cores
    if call.weight.dtype.itemsize == 2:  # of float32 these spill
        tiles += [tile(64, 32, 4)] if capability < (9, 0) else [tile(64, 32, 4), tile(64, 64, 8)]
    if multiprocessors == 1:  # Triton's interpreter, where a step costs the same whatever its size
        return [tile(256, 256, 8, 7) | {"rows": P}, tile(256, 256, 8) | {"rows": P}]
    heights = list(dict.fromkeys(-(-P // parts) for parts in (1, 2, 4, 8, 16, 32)))

    def programs(rows: int) -> int:
        return N * -(-Q // (tiles[0]["BLOCK_Q"] - 1)) * -(-P // rows) * -(-K // tiles[0]["BLOCK_N"])

    rows = next((rows for rows in heights if programs(rows) >= 2 * multiprocessors), heights[-1])
    found = [tiles[0] | {"rows": rows}, *(tiles[0] | {"rows": other} for other in heights)]
    found += [tile | {"rows": rows} for tile in tiles[1:]]
    return [c for i, c in enumerate(found) if c not in found[:i]]


def kernel_class(call: "Call", config: Config) -> str:
    return compiled_class(plan(call, config), call)


def plan(call: "Call", config: Config) -> Callable[["Call"], Tensor]:
    """x [N, C, H, W] of any layout -> y [N, K, P, Q] in channels_last."""
    shape = N, K, P, Q = out_shape(call)
    _, C, H, W = call.x.shape
    strips, bands = -(-Q // (config["BLOCK_Q"] - 1)), -(-P // config["rows"])
    stride = dict(zip(("stride_n", "stride_c", "stride_h", "stride_w"), call.x.stride(), strict=True))
    rest: dict[str, Any] = {"eps": call.eps, "H": H, "W": W, "P": P, "Q": Q, "K": K, "strips": strips, "bands": bands}
    rest |= stride | {"C": C, "DENSE": call.x.stride()[1::2] == (1, C)}
    rest |= {
        "PRECISION": "tf32" if call.allow_tf32() else "ieee",
        "BLOCK_K": max(16, triton.next_power_of_2(config["LINES"] * 7 * C)),
    }
    launch = Launch(conv_pool_kernel, (N * strips * bands * -(-K // config["BLOCK_N"]),), rest | config)
    strides, empty = (K * P * Q, 1, Q * K, K), N * K * P * Q == 0

    def run(call: "Call") -> Tensor:
        weight = call.weight.contiguous(memory_format=torch.channels_last)
        y = weight.new_empty_strided(shape, strides)
        if not empty:
            bn = (None if v is None else v.contiguous() for v in call.bn)
            mean, std = (None if v is None else v.contiguous() for v in (call.mean, call.std))
            launch(call.x, weight, *bn, mean, std, y)
        return y

    return run
