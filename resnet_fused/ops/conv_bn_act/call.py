"""The schema of `conv_bn_act`, its record of a call, and what it is in plain PyTorch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dispatch import numerics
from .._calls import power_of_two
from .._convolution import ConvolutionCall

Pair = int | Sequence[int]

SCHEMA = (
    "conv_bn_act(Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, "
    "Tensor? running_var, float eps, int[2] stride, int[2] padding, int[2] dilation, int groups, Tensor? residual, "
    "bool relu) -> Tensor"
)


def reference(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    act: str = "relu",
) -> Tensor:
    """`conv_bn_act` in plain PyTorch, in torchvision's order."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if running_mean is not None:
        y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, False, 0.0, eps)
    if residual is not None:
        y = y + residual
    return F.relu(y) if act == "relu" else y


class _Fields(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    residual: Tensor | None
    relu: bool


class Call(_Fields, ConvolutionCall):
    """One call of the registered operator: the schema's fields in its order."""

    __slots__ = ()
    op = name = "conv_bn_act"

    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        """Those of `reference`."""
        names = ("bias", "eps", "stride", "padding", "dilation", "groups", "residual")
        kwargs = {name: getattr(self, name) for name in names}
        return (self.x, self.weight, *self.bn), kwargs | {"act": "relu" if self.relu else "none"}

    def reference(self) -> Tensor:
        args, kwargs = self.arguments()
        return reference(*args, **kwargs)

    def magnitudes(self) -> Tensor:
        """The same formula on absolute values."""
        args, kwargs = numerics.absolute(*self.arguments())
        return reference(*args, **kwargs)

    def drawn(self, whole: bool = False) -> "Call":
        """A random call like this one, on a crop of two images unless the whole is asked for; one has a NaN."""
        if whole:
            return self._drawn({})
        extents = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.weight.shape[2:], strict=True))
        x = torch.Size((numerics.IMAGES, self.x.shape[1], *map(numerics.cropped, self.x.shape[2:], extents)))
        geometry = self.stride, self.padding, self.dilation
        residual = torch.Size(out_shape(torch.empty(x, device="meta"), self.weight, *geometry))
        return self._drawn({"x": x, "residual": residual})

    def misaligned(self) -> str | None:
        """Which image does not start at a multiple of 16 bytes, or None."""
        for name, t in (("x", self.x), ("weight", self.weight), ("residual", self.residual)):
            if t is not None and t.data_ptr() % 16:
                return name
        return None

    def order(self) -> str:
        """What the registry orders backends by."""
        if self.weight.shape[2] == self.weight.shape[3] == 1:
            return "conv 1x1"
        return "conv stem" if self.weight.shape[1] <= 4 and self.groups == 1 else "conv"

    def problem(self) -> str:
        """One layer's problem, for `tune`: everything that the fastest choice depends on."""
        return self._problem(*self.x.shape)

    def layer_class(self) -> str:
        """The problem with its output's rows rounded up to a power of two: what is timed once."""
        N, _, P, Q = out_shape(self.x, self.weight, self.stride, self.padding, self.dilation)
        return self._problem(f"M{power_of_two(N * P * Q)}", self.x.shape[1])

    def _problem(self, *images: object) -> str:
        numbers = (*images, *self.weight.shape, *self.stride, *self.padding, *self.dilation, self.groups)
        flags = f"{'+add' if self.residual is not None else ''}{'+relu' if self.relu else ''}"
        return f"{str(self.x.dtype).removeprefix('torch.')} {'x'.join(map(str, numbers))}{flags}{self._settings()}"


def out_shape(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """[N, K, P, Q] of the convolution."""
    p, q = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return x.shape[0], weight.shape[0], p, q


def fake(*args) -> Tensor:
    call = Call(*args)
    shape = out_shape(call.x, call.weight, call.stride, call.padding, call.dilation)
    return call.x.new_empty(shape).contiguous(memory_format=torch.channels_last)
