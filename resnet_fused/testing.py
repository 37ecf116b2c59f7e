"""Cases, inputs and checks of the operators: one list feeds tests and benchmarks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .dispatch.numerics import absolute, as_tuple, largest, limits, map_tensors, wrong
from .ops import batch_norm_act as _batch_norm_act_op
from .ops import conv_bn_act as _conv_bn_act_op
from .ops import stem as _stem_op
from .ops.batch_norm_act import reference as _bn_reference
from .ops.conv_bn_act import out_shape
from .ops.conv_bn_act import reference as _conv_reference
from .ops.stem import flops as _stem_flops
from .ops.stem import out_shape as _stem_shape
from .ops.stem import reference as _stem_reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # what fused kernels serve
OPS: dict[str, Callable[..., Any]] = {
    "batch_norm_act": _batch_norm_act_op,
    "conv_bn_act": _conv_bn_act_op,
    "stem": _stem_op,
}
REFERENCES: dict[str, Callable[..., Any]] = {
    "batch_norm_act": _bn_reference,
    "conv_bn_act": _conv_reference,
    "stem": _stem_reference,
}
LAYOUTS = ("channels_last", "contiguous", "strided")


@dataclass(frozen=True)
class Case:
    """One call of an operator. `large` ones have the shapes of ResNet-50 at batch 256: for a GPU."""

    id: str
    op: str
    shape: tuple[int, int, int, int]  # of x
    kernel: tuple[int, int, int] | None = None  # K, R, S of a convolution
    options: dict[str, Any] = field(default_factory=dict)  # stride, padding, dilation, groups, act, training
    inputs: frozenset[str] = frozenset()  # of "residual", "residual_bn", "pre_add", "bias"
    bn: str = "affine"  # "affine", "plain" (no weight and bias), "half" (vectors in x's dtype) or "none"
    mean: float = 0.5
    large: bool = False

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[N, K, P, Q] of the result."""
        if self.kernel is None:
            return self.shape
        x, weight = (torch.empty(shape, device="meta") for shape in (self.shape, self.weight_shape))
        if self.op == "stem":
            return _stem_shape(x, weight)
        pairs = ([self.options.get(k, d)] * 2 for k, d in (("stride", 1), ("padding", 0), ("dilation", 1)))
        return out_shape(x, weight, *pairs)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        assert self.kernel is not None  # only convolutions have a weight
        K, R, S = self.kernel
        return K, self.shape[1] // self.options.get("groups", 1), R, S

    def bytes(self, dtype: torch.dtype) -> int:
        """The least that has to move: every operand read once, every result written once."""
        like_y = 1 + ("residual" in self.inputs) + 2 * ("pre_add" in self.inputs)  # pre_add is read, the sum written
        tensors = [self.shape, *[self.out_shape] * like_y, *([self.weight_shape] if self.kernel else [])]
        return sum(torch.Size(s).numel() for s in tensors) * dtype.itemsize

    def flops(self) -> int:
        """Two for each multiply-add of the convolution; 0 without one."""
        if self.kernel is None:
            return 0
        if self.op == "stem":
            return _stem_flops(torch.Size(self.shape), torch.Size(self.weight_shape))
        return 2 * torch.Size(self.out_shape).numel() * torch.Size(self.weight_shape[1:]).numel()


def _bn(id: str, shape: tuple[int, int, int, int], *inputs: str, **fields: Any) -> Case:
    options = {"training": False} | fields.pop("options", {})
    return Case(f"bn-{id}", "batch_norm_act", shape, None, options, frozenset(inputs), **fields)


def _conv(id: str, shape: tuple[int, int, int, int], kernel: tuple[int, int, int], *inputs: str, **fields: Any) -> Case:
    names = ("stride", "padding", "dilation", "groups", "act")
    options: dict[str, Any] = {k: fields.pop(k) for k in names if k in fields}
    return Case(f"conv-{id}", "conv_bn_act", shape, kernel, options, frozenset(inputs), **fields)


CASES = [
    _bn("relu", (2, 64, 14, 14)),
    _bn("none", (2, 64, 9, 9), options={"act": "none"}),
    _bn("join", (2, 64, 14, 14), "residual"),
    _bn("join-none", (2, 24, 5, 7), "residual", options={"act": "none"}),
    _bn("two-bn-join", (2, 64, 14, 14), "residual", "residual_bn"),
    _bn("two-bn-join-none", (2, 40, 6, 6), "residual", "residual_bn", options={"act": "none"}),
    _bn("pre-add", (2, 32, 8, 8), "pre_add"),
    _bn("pre-add-join", (2, 20, 8, 8), "pre_add", "residual"),
    _bn("plain", (2, 48, 7, 5), bn="plain"),
    _bn("plain-two-bn-join", (2, 48, 7, 5), "residual", "residual_bn", bn="plain"),
    _bn("half", (2, 96, 5, 5), "residual", "residual_bn", bn="half"),
    _bn("3-channels", (2, 3, 33, 31)),
    _bn("10-channels", (3, 10, 7, 5), "residual"),
    _bn("1-pixel", (1, 48, 1, 1), "residual"),
    _bn("1-channel", (5, 1, 4, 3)),
    _bn("2048-channels", (2, 2048, 2, 2), "residual", "residual_bn"),
    _bn("empty", (0, 16, 4, 4), "residual"),
    _bn("large-mean", (4, 16, 15, 15), mean=1e3),
    _conv("1x1", (2, 64, 14, 14), (64, 1, 1)),
    _conv("1x1-join", (2, 64, 14, 14), (96, 1, 1), "residual"),
    _conv("1x1-s2", (2, 32, 15, 13), (64, 1, 1), stride=2, act="none"),
    _conv("3x3", (2, 32, 9, 9), (64, 3, 3), padding=1),
    _conv("3x3-join", (2, 16, 7, 5), (16, 3, 3), "residual", padding=1),
    _conv("3x3-s2", (1, 32, 15, 14), (32, 3, 3), stride=2, padding=1),
    _conv("3x3-d2", (1, 16, 11, 11), (24, 3, 3), padding=2, dilation=2),
    _conv("7x7-s2", (2, 3, 33, 31), (64, 7, 7), stride=2, padding=3),
    _conv("3x3-g32", (1, 128, 7, 7), (128, 3, 3), padding=1, groups=32),
    _conv("3x3-g4-s2", (1, 32, 9, 8), (64, 3, 3), stride=2, padding=1, groups=4),
    _conv("bias", (2, 10, 7, 5), (48, 3, 3), "bias", padding=1),
    _conv("no-bn-join", (2, 48, 6, 6), (10, 1, 1), "bias", "residual", bn="none"),
    _conv("plain-bn", (2, 10, 6, 6), (3, 1, 1), bn="plain"),
    _conv("half", (2, 32, 6, 6), (32, 3, 3), "residual", padding=1, bn="half"),
    _conv("1-pixel", (1, 16, 1, 1), (32, 3, 3), padding=1),
    _conv("empty", (0, 16, 8, 8), (16, 3, 3), "residual", padding=1),
    Case("stem", "stem", (2, 3, 33, 31), (64, 7, 7)),
    Case("stem-plain-bn", "stem", (1, 1, 6, 9), (20, 7, 7), bn="plain"),
    Case("stem-half", "stem", (2, 3, 13, 17), (24, 7, 7), bn="half"),
    Case("stem-empty", "stem", (0, 3, 8, 8), (16, 7, 7)),
    *[
        _bn(f"resnet50-{c}x{s}{'-join' if join else ''}", (256, c, s, s), *join, large=True)
        for c, s, join in [
            (64, 112, ()),
            (64, 56, ()),
            (256, 56, ("residual",)),
            (256, 56, ("residual", "residual_bn")),
            (512, 28, ("residual",)),
            (1024, 14, ("residual",)),
            (512, 7, ()),
            (2048, 7, ("residual",)),
        ]
    ],
    _conv("resnet50-stem", (256, 3, 224, 224), (64, 7, 7), stride=2, padding=3, large=True),
    Case("resnet50-stem-pooled", "stem", (256, 3, 224, 224), (64, 7, 7), large=True),
    *[
        _conv(f"resnet50-{k}-{r}x{r}-s{stride}-{c}x{s}{'-join' if join else ''}", (256, c, s, s), (k, r, r), *join, **o)
        for c, s, k, r, stride, join in [
            (64, 56, 64, 1, 1, ()),
            (64, 56, 64, 3, 1, ()),
            (64, 56, 256, 1, 1, ("residual",)),
            (128, 56, 128, 3, 2, ()),
            (128, 28, 128, 3, 1, ()),
            (128, 28, 512, 1, 1, ("residual",)),
            (256, 56, 512, 1, 2, ()),
            (256, 14, 256, 3, 1, ()),
            (256, 14, 1024, 1, 1, ("residual",)),
            (512, 7, 512, 3, 1, ()),
            (2048, 7, 512, 1, 1, ()),
            (512, 7, 2048, 1, 1, ("residual",)),
        ]
        for o in [dict(stride=stride, padding=r // 2, large=True)]
    ],
]


def make_inputs(
    case: Case, *, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0, layout: str = "channels_last"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `OPS[case.op]`; images "channels_last", "contiguous" or "strided" (every other row)."""
    generator = torch.Generator().manual_seed(seed)

    def image(shape: tuple[int, ...], mean: float = 0.0) -> Tensor:
        t = (torch.randn(shape, generator=generator) + mean).to(device, dtype)
        if layout == "strided":
            wide = t.new_full((*shape[:2], 2 * shape[2], shape[3]), float("nan"))
            wide[:, :, ::2] = t
            return wide[:, :, ::2]
        return t.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else t

    def bn(channels: int, mean: float) -> tuple[Tensor | None, ...]:
        draws = torch.randn((4, channels), generator=generator)
        vectors = (1 + draws[0] / 4, draws[1], mean + draws[2] / 4, 1 + draws[3].tanh() / 2)
        weight, bias, mean_, var = (v.to(device, dtype if case.bn == "half" else torch.float32) for v in vectors)
        if case.bn == "none":
            return None, None, None, None
        return (None, None, mean_, var) if case.bn == "plain" else (weight, bias, mean_, var)

    x = image(case.shape, case.mean if case.kernel is None else 0.0)
    channels = case.out_shape[1]
    kwargs = dict(case.options)
    if "residual" in case.inputs:
        kwargs["residual"] = image(case.out_shape)
    if "residual_bn" in case.inputs:
        kwargs["residual_bn"] = bn(channels, 0.0)
    if "pre_add" in case.inputs:
        kwargs["pre_add"] = image(case.shape)
    if "bias" in case.inputs:
        kwargs["bias"] = torch.randn(channels, generator=generator).to(device, dtype)
    if case.kernel is None:
        return (x, *bn(channels, case.mean)), kwargs
    fan_in = torch.Size(case.weight_shape[1:]).numel()
    weight = (torch.randn(case.weight_shape, generator=generator) / fan_in**0.5).to(device, dtype)
    return (x, weight.contiguous(memory_format=torch.channels_last), *bn(channels, case.mean)), kwargs


def fields(case: Case, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What the registered operator under the public function gets of these arguments."""
    relu, residual, eps = kwargs.get("act", "relu") == "relu", kwargs.get("residual"), 1e-5
    if case.op == "batch_norm_act":
        bn2 = kwargs.get("residual_bn", (None,) * 4)
        return (*args, eps, residual, *bn2, kwargs.get("pre_add"), relu, False)
    if case.op == "stem":
        return (*args, eps, None, None)
    pairs = [[kwargs.get(k, d)] * 2 for k, d in (("stride", 1), ("padding", 0), ("dilation", 1))]
    return (*args[:2], kwargs.get("bias"), *args[2:], eps, *pairs, kwargs.get("groups", 1), residual, relu)


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Every `torch.empty` is filled with NaN: an output that a kernel leaves unwritten shows."""
    deterministic: Any = torch.utils.deterministic  # whose attribute PyTorch adds when it is imported
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]


def assert_within_budget(
    case: Case, results: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """AssertionError where a result is farther from float64 than the budget allows."""
    reason = wrong(results, limits(REFERENCES[case.op], args, kwargs))
    assert reason is None, f"{case.id}: {reason}"


def check(
    case: Case, *, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0, layout: str = "channels_last"
) -> None:
    """Run the operator under the current backend on the case's inputs; AssertionError where it is off."""
    args, kwargs = make_inputs(case, dtype=dtype, device=device, seed=seed, layout=layout)
    with torch.no_grad():
        with nan_filled_memory():
            results = as_tuple(OPS[case.op](*args, **kwargs))
        assert_within_budget(case, results, args, kwargs)


__all__ = [
    "CASES",
    "DTYPES",
    "LAYOUTS",
    "OPS",
    "REFERENCES",
    "Case",
    "absolute",
    "as_tuple",
    "assert_within_budget",
    "check",
    "fields",
    "largest",
    "make_inputs",
    "map_tensors",
]
