"""The schema of `stem`, its record of a call, and what it is in plain PyTorch and in `conv_bn_act`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dispatch import numerics
from .._calls import power_of_two
from .._convolution import ConvolutionCall
from ..conv_bn_act import conv_bn_act

SCHEMA = (
    "stem(Tensor x, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, Tensor running_mean, Tensor running_var, "
    "float eps, Tensor? mean, Tensor? std) -> Tensor"
)
STRIDE, PADDING = 2, 3  # of the convolution
POOL = (3, 2, 1)  # kernel, stride and padding


def normalized(x: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """(x / 255 - mean) / std of images of bytes [N, C, H, W], computed in float32 or more and rounded once to dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    mean, std = (v.to(wide)[:, None, None] for v in (mean, std))
    return ((x.to(wide) / 255 - mean) / std).to(dtype)


def reference(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    eps: float = 1e-5,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """`stem` in plain PyTorch, in torchvision's order."""
    if mean is not None and std is not None:
        x = normalized(x, mean, std, weight.dtype)
    y = F.conv2d(x, weight, None, STRIDE, PADDING)
    y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, False, 0.0, eps)
    return F.max_pool2d(F.relu(y), *POOL)


class _Fields(NamedTuple):
    x: Tensor
    weight: Tensor
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    eps: float
    mean: Tensor | None
    std: Tensor | None


class Call(_Fields, ConvolutionCall):
    """One call of the registered operator: the schema's fields in its order."""

    __slots__ = ()
    op = name = "stem"

    def reference(self) -> Tensor:
        return reference(*self[:6], eps=self.eps, mean=self.mean, std=self.std)

    def plainly(self) -> Tensor:
        """By `conv_bn_act`, which finds its own backend, and PyTorch's pooling: what eager is to this operator."""
        x = self.x
        if self.mean is not None and self.std is not None:
            x = normalized(x, self.mean, self.std, self.weight.dtype)
        y = conv_bn_act(x, self.weight, *self.bn, eps=self.eps, stride=STRIDE, padding=PADDING)
        return F.max_pool2d(y, *POOL)

    def magnitudes(self) -> Tensor:
        """The same formula on absolute values."""
        args, kwargs = numerics.absolute(self[:6], {"std": self.std} if self.std is not None else {})
        mean = None if self.mean is None else -self.mean.abs()
        return reference(*args, eps=self.eps, mean=mean, **kwargs)

    def drawn(self, whole: bool = False) -> "Call":
        """A random call like this one, on a crop of two images unless the whole is asked for; one has a NaN."""
        sides = (numerics.cropped(size, 64) for size in self.x.shape[2:])  # several tiles of every kernel
        return self._drawn({} if whole else {"x": torch.Size((numerics.IMAGES, self.x.shape[1], *sides))})

    def order(self) -> str:
        """What the registry orders backends by."""
        return self.op

    def problem(self) -> str:
        """One layer's problem, for `tune`: everything that the fastest choice depends on."""
        return self._problem(*self.x.shape)

    def layer_class(self) -> str:
        """The problem with its output's rows rounded up to a power of two: what is timed once."""
        N, _, P, Q = out_shape(self.x, self.weight)
        return self._problem(f"M{power_of_two(N * P * Q)}", self.x.shape[1])

    def _problem(self, *images: object) -> str:
        dtypes = "+".join(
            str(dtype).removeprefix("torch.") for dtype in dict.fromkeys((self.x.dtype, self.weight.dtype))
        )
        return f"stem {dtypes} {'x'.join(map(str, (*images, *self.weight.shape)))}{self._settings()}"


def out_shape(x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
    """[N, K, P, Q] of the result."""
    p, q = ((side + 3) // 4 for side in x.shape[2:])
    return x.shape[0], weight.shape[0], p, q


def flops(x: torch.Size, weight: torch.Size) -> int:
    """Two for each multiply-add of the convolution, whose map has four times the result's pixels."""
    N, _, H, W = x
    return 2 * N * ((H + 1) // 2) * ((W + 1) // 2) * weight.numel()


def fake(*args) -> Tensor:
    call = Call(*args)
    return call.weight.new_empty(out_shape(call.x, call.weight)).contiguous(memory_format=torch.channels_last)
