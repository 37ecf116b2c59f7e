"""conv + BN with running statistics + residual + ReLU in one kernel."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..launch import Described, Launch
from .configs import MIN_GROUP_CHANNELS, Config, Problem, candidates, config
from .kernels import conv_kernel, pointwise_kernel, stem_kernel

__all__ = [
    "Config",
    "Problem",
    "candidates",
    "config",
    "conv_bn_act",
    "device",
    "plan_conv_bn_act",
    "problem",
    "problem_on",
    "unsupported",
]

_FLAT_CHANNELS = 4  # up to here R, S and C are one dimension, and x is read in whatever layout it has


def unsupported(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
) -> str | None:
    """Why these kernels can't, or should not, serve the convolution, or None; from metadata alone."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x is {dtype}; the kernels serve float16, bfloat16 and float32"
    if groups > 1 and weight_shape[1] < MIN_GROUP_CHANNELS:
        return (
            f"groups of {weight_shape[1]} input channels would leave most of a tile empty; "
            f"the kernels serve groups of {MIN_GROUP_CHANNELS} or more"
        )
    if x_shape[2] * x_shape[3] >= 2**31:
        return f"one image has {x_shape[2]} x {x_shape[3]} pixels; the kernels serve fewer than 2^31"
    return None


def problem(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    *,
    allow_tf32: bool = False,
    capability: tuple[int, int],
    multiprocessors: int,
) -> Problem:
    """The convolution as the configurations see it, from metadata alone."""
    N, _, H, W = x_shape
    K, C, R, S = weight_shape
    P, Q = _out_size(x_shape, weight_shape, stride, padding, dilation)
    M = N * P * Q
    pointwise = (R, S, *stride, *padding, groups) == (1, 1, 1, 1, 0, 0, 1)
    tensor_cores = dtype.itemsize == 2 or allow_tf32
    aligned = C * dtype.itemsize % 16 == 0
    return Problem(
        M=M,
        K=K // groups,
        C=C,
        taps=R * S,
        groups=groups,
        itemsize=dtype.itemsize,
        tensor_cores=tensor_cores,
        flat=groups == 1 and C <= _FLAT_CHANNELS,
        descriptors=pointwise and tensor_cores and aligned and capability >= (9, 0) and M < 2**31,
        wide=capability >= (9, 0),
        multiprocessors=multiprocessors,
    )


def problem_on(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    allow_tf32: bool,
) -> Problem:
    """`problem` of these tensors on their device."""
    capability, multiprocessors = device(x.get_device())
    return problem(
        x.shape,
        weight.shape,
        stride,
        padding,
        dilation,
        groups,
        x.dtype,
        allow_tf32=allow_tf32,
        capability=capability,
        multiprocessors=multiprocessors,
    )


@lru_cache
def device(index: int) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors; the interpreter (index -1) is served best by large tiles."""
    if index < 0:
        return (8, 0), 1
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def _out_size(x_shape, weight_shape, stride, padding, dilation) -> tuple[int, int]:
    return tuple(
        (x_shape[2 + i] + 2 * padding[i] - dilation[i] * (weight_shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )


def plan_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    relu: bool,
    allow_tf32: bool = False,
    config: Config | None = None,
) -> Callable[..., Tensor]:
    """`conv_bn_act` for all arguments of this metadata, strides and alignment to 16 bytes included."""
    p = problem_on(x, weight, stride, padding, dilation, groups, allow_tf32)
    config = _default_config(p) if config is None else config
    (N, _, H, W), (K, _, R, S) = x.shape, weight.shape
    P, Q = _out_size(x.shape, weight.shape, stride, padding, dilation)
    channels_last = torch.channels_last
    images = [t for t in (None if p.flat else x, weight, residual) if t is not None]
    copies = not all(t.is_contiguous(memory_format=channels_last) for t in images)
    x = x if p.flat else x.contiguous(memory_format=channels_last)  # one of many: only its layout counts
    weight = weight.contiguous(memory_format=channels_last)

    rest: dict[str, Any] = {"eps": eps, "M": p.M, "H": H, "W": W, "C": p.C, "P": P, "Q": Q, "K": p.K}
    rest |= dict(zip(("stride_n", "stride_c", "stride_h", "stride_w"), x.stride(), strict=True))
    rest |= {"R": R, "S": S, "GROUPS": groups, "WHOLE_C": p.C % config["BLOCK_K"] == 0, "RELU": relu}
    for name, pair in (("STRIDE", stride), ("PAD", padding), ("DILATION", dilation)):
        rest |= {f"{name}_H": pair[0], f"{name}_W": pair[1]}
    rest["PRECISION"] = "tf32" if allow_tf32 else "ieee"
    _, stride_c, stride_h, stride_w = x.stride()
    last = (p.C - 1) * stride_c + (R - 1) * dilation[0] * stride_h + (S - 1) * dilation[1] * stride_w
    rest["FAR_TAPS"] = last >= 2**31

    describe = None
    if p.flat:
        kernel: Any = stem_kernel
    elif config["descriptors"] and x.numel() and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0:
        kernel, rows, columns = pointwise_kernel, config["BLOCK_M"], config["BLOCK_N"]
        describe = (
            Described(x, (p.M, p.C), (rows, config["BLOCK_K"])),
            Described(weight, (p.K, p.C), (columns, config["BLOCK_K"])),
        )
    else:
        kernel = conv_kernel
    rest = {name: value for name, value in rest.items() if name in kernel.arg_names}
    rest |= {name: value for name, value in config.items() if name != "descriptors"}
    launch = Launch(kernel, (p.programs(config["BLOCK_M"], config["BLOCK_N"]),), rest)
    shape, strides, empty = (N, K, P, Q), (K * P * Q, 1, Q * K, K), N * K * P * Q == 0
    flat = p.flat

    def run(x, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, residual, relu):
        y = x.new_empty_strided(shape, strides)
        if empty:
            return y
        if copies:
            x = x if flat else x.contiguous(memory_format=channels_last)
            weight = weight.contiguous(memory_format=channels_last)
            residual = None if residual is None else residual.contiguous(memory_format=channels_last)
        if describe is not None:
            x, weight = describe[0](x), describe[1](weight)
        launch(x, weight, bias, bn_weight, bn_bias, mean, var, residual, y)
        return y

    return run


def conv_bn_act(*args, allow_tf32: bool = False, config: Config | None = None) -> Tensor:
    """y [N, K, P, Q] in channels_last; x, weight and residual of any layout, x with up to 4 channels read as it is."""
    options: dict[str, Any] = {"allow_tf32": allow_tf32, "config": config}
    return plan_conv_bn_act(*args, **options)(*args[:14])


_default_config = config  # plan_conv_bn_act has a parameter of that name
