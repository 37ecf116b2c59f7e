"""conv + BN with running statistics + residual + ReLU in one kernel."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import MIN_GROUP_CHANNELS, Config, Problem, candidates, config
from .kernels import conv_kernel, pointwise_kernel, stem_kernel

__all__ = ["Config", "Problem", "candidates", "config", "conv_bn_act", "problem", "problem_on", "supported"]

_FLAT_CHANNELS = 4  # up to here R, S and C are one dimension, and x is read in whatever layout it has


def supported(
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
    capability, multiprocessors = _device(x.get_device())
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
def _device(index: int) -> tuple[tuple[int, int], int]:
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


def conv_bn_act(
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
) -> Tensor:
    """y [N, K, P, Q] in channels_last; x, weight and residual of any layout, x with up to 4 channels read as it is."""
    channels_last = torch.channels_last
    p = problem_on(x, weight, stride, padding, dilation, groups, allow_tf32)
    config = _default_config(p) if config is None else config
    N, _, H, W = x.shape
    P, Q = _out_size(x.shape, weight.shape, stride, padding, dilation)
    y = torch.empty((N, weight.shape[0], P, Q), dtype=x.dtype, device=x.device, memory_format=channels_last)
    if y.numel() == 0:
        return y
    x = x if p.flat else x.contiguous(memory_format=channels_last)
    weight = weight.contiguous(memory_format=channels_last)
    residual = None if residual is None else residual.contiguous(memory_format=channels_last)

    vectors = (bias, bn_weight, bn_bias, mean, var, residual, y, eps)
    stride_n, stride_c, stride_h, stride_w = x.stride()
    R, S = weight.shape[2:]
    options = {k: v for k, v in config.items() if k != "descriptors"}
    options |= {"RELU": relu, "PRECISION": "tf32" if allow_tf32 else "ieee"}
    geometry = (R, S, *stride, *padding, *dilation)
    grid = (p.programs(config["BLOCK_M"], config["BLOCK_N"]),)
    with torch.cuda.device_of(x):
        if p.flat:
            strides = (stride_n, stride_h, stride_w, stride_c)
            last = (p.C - 1) * stride_c + (R - 1) * dilation[0] * stride_h + (S - 1) * dilation[1] * stride_w
            sizes = (p.M, H, W, P, Q, p.K, *strides, p.C)
            stem_kernel[grid](x, weight, *vectors, *sizes, *geometry, last >= 2**31, **options)
        elif config["descriptors"] and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0:
            x = TensorDescriptor(x, [p.M, p.C], [p.C, 1], [config["BLOCK_M"], config["BLOCK_K"]])
            weight = TensorDescriptor(weight, [p.K, p.C], [p.C, 1], [config["BLOCK_N"], config["BLOCK_K"]])
            pointwise_kernel[grid](x, weight, *vectors, p.M, p.C, p.K, **options)
        else:
            sizes = (p.M, H, W, p.C, P, Q, p.K, stride_n, stride_h, stride_w)
            whole_c = p.C % config["BLOCK_K"] == 0
            conv_kernel[grid](x, weight, *vectors, *sizes, *geometry, groups, whole_c, **options)
    return y


_default_config = config  # conv_bn_act has a parameter of that name
