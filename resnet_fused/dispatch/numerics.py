"""The error budget: what a kernel's numbers are held against, in tests and before its first use.

The oracle is the reference in float64. A result passes when its error, the largest absolute difference, is at most
twice that of the reference in the same dtype, layout and device, plus one rounding of the output, plus 2^-24 times the
same formula on absolute values. Where float32 convolutions may be computed in TF32, which PyTorch may do or leave, the
reference's error is the larger of both. NaN has to be where both references have it, and may be where one has.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def largest_number(t: Tensor) -> float:
    """NaN left aside."""
    return largest(torch.where(t.isnan(), 0, t))


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def map_tensors(value: Any, f: Callable[[Tensor], Any]) -> Any:
    """The nested tuples and dicts of arguments with f applied to every tensor."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, f) for k, v in value.items()}
    return tuple(map_tensors(v, f) for v in value) if isinstance(value, tuple) else value


def absolute(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with which a reference computes its formula on absolute values: |s| * (|z| + |mean|) + |bias| + |r|.

    The last four of args and kwargs["residual_bn"] are BN's weight, bias, mean and variance.
    """
    args, kwargs = map_tensors((args, kwargs), Tensor.abs)

    def negate_mean(bn: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*bn[:2], None if bn[2] is None else -bn[2], bn[3])

    if kwargs.get("residual_bn") is not None:
        kwargs["residual_bn"] = negate_mean(kwargs["residual_bn"])
    return (*args[:-4], *negate_mean(args[-4:])), kwargs


class Limit(NamedTuple):
    """What one result of a call is held against."""

    oracle: Tensor  # in float64
    plain: Tensor  # by PyTorch in the call's own dtypes
    budget: float


class _InTF32(TorchFunctionMode):
    """A device's convolutions of float32 multiply in TF32, whatever PyTorch would do."""

    def __init__(self) -> None:
        super().__init__()
        self.used = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d and args[0].is_cuda and args[0].dtype == torch.float32:
            self.used = True
            args = (_to_tf32(args[0]), _to_tf32(args[1]), *args[2:])
        return function(*args, **(kwargs or {}))


def _to_tf32(t: Tensor) -> Tensor:
    """To the nearest with 10 bits behind the point, ties away from zero, as cuDNN rounds."""
    rounded = ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(t.isfinite(), rounded, t)


def limit(oracle: Tensor, plain: Tensor, magnitude: Tensor, *others: Tensor) -> Limit:
    """others: results that are as right as `plain`."""
    rounding = torch.finfo(plain.dtype).eps / 2 * largest_number(oracle)
    error = max(largest_number(t.double() - oracle) for t in (plain, *others))
    return Limit(oracle, plain, 2 * error + rounding + 2**-24 * largest_number(magnitude))


def _allowed(reference: Callable[[], Any]) -> tuple[tuple[Tensor, ...], ...]:
    """The reference's results as PyTorch computes them and, where the settings leave it the choice, in TF32."""
    plains = as_tuple(reference())
    if torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        with _InTF32() as mode:
            rounded = as_tuple(reference())
        if mode.used:
            return plains, rounded
    return (plains,)


def limits(reference: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Limit]:
    """For every result of reference(*args, **kwargs)."""
    double = map_tensors((args, kwargs), Tensor.double)
    oracles = as_tuple(reference(*double[0], **double[1]))
    plains, *others = _allowed(lambda: reference(*args, **kwargs))
    absolute_args, absolute_kwargs = absolute(*double)
    magnitudes = as_tuple(reference(*absolute_args, **absolute_kwargs))
    yield from map(limit, oracles, plains, magnitudes, *others)


def call_limits(call: Any) -> Iterator[Limit]:
    """For every result of an operator's call, by its own `reference` and `magnitudes`."""
    double = type(call)(*(_double(a) if isinstance(a, Tensor) else a for a in call))
    oracles, magnitudes = as_tuple(double.reference()), as_tuple(double.magnitudes())
    plains, *others = _allowed(call.reference)
    for oracle, plain, *rest in zip(oracles, plains, magnitudes, *others, strict=True):
        yield limit(oracle, plain, *rest) if plain.is_floating_point() else Limit(plain, plain, 0.0)


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def wrong(results: tuple[Tensor, ...], limits: Iterable[Limit]) -> str | None:
    """What is wrong with the results of a call, or None where all are within the budget."""
    for i, (result, (oracle, plain, budget)) in enumerate(zip(results, limits, strict=True)):
        if result is None and oracle.numel() == 0:
            continue
        if result.shape != oracle.shape or result.dtype != plain.dtype:
            return f"result {i} is {result.dtype} {tuple(result.shape)}, not {plain.dtype} {tuple(oracle.shape)}"
        if not plain.is_floating_point():  # the ReLU's mask: pre-activations near 0 may round to either side
            flipped = int((result != plain).sum())
            if flipped > 0.01 * result.numel():
                return f"result {i} differs in {flipped} of {result.numel()} bytes"
            continue
        due, allowed = oracle.isnan() & plain.isnan(), oracle.isnan() | plain.isnan()
        for what, places in (("has a NaN", result.isnan() & ~allowed), ("lacks a NaN", due & ~result.isnan())):
            if places.any():
                return f"result {i} {what} in {int(places.sum())} places"
        error = largest_number(result.double() - oracle)
        if not error <= budget:  # infinity is not
            return f"result {i} is off by {error:.3g}, the budget is {budget:.3g}"
    return None


def leave_nan(limits: Iterable[Limit]) -> None:
    """Free blocks of the results' sizes, full of NaN: what is not written, or read before it is, shows."""
    blocks = [torch.full_like(plain, float("nan")) for _, plain, _ in limits if plain.is_floating_point()]
    del blocks


IMAGES = 2  # that a check computes on
_LEAST = 32  # pixels that are left of a side


def cropped(size: int, least: int = 0) -> int:
    """A side of a check's images: no more than needed, and divisible by the powers of two that the given one is."""
    least = max(_LEAST, -(-least // 16) * 16)
    return min(size, least + size % 16)


class Draw:
    """Random tensors like given ones in layout and alignment; the caller's random state is left alone."""

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(0)

    def like(
        self, t: Tensor, shape: Sequence[int] | None = None, *, positive: bool = False, scale: float = 1.0
    ) -> Tensor:
        """shape: another one of as many dimensions; elements that share a place then get places of their own."""
        strides = t.stride() if shape is None else _like_laid_out(t, shape)
        shape = t.shape if shape is None else tuple(shape)
        offset = t.data_ptr() % 16 // t.element_size()
        span = offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if t.dtype == torch.uint8:
            return self.bits((span,)).as_strided(shape, strides, offset)
        values = torch.randn(span, generator=self.generator, device=t.device) * scale
        values = (values.tanh() / 2 + 1 if positive else values).to(t.dtype)
        return values.as_strided(shape, strides, offset)

    def bits(self, shape: tuple[int, ...]) -> Tensor:
        """Random bytes."""
        return torch.randint(256, shape, generator=self.generator, device=self.generator.device, dtype=torch.uint8)


def _like_laid_out(t: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor of that shape in t's layout, or t's own where it is not dense."""
    formats = (torch.channels_last, torch.contiguous_format) if t.dim() == 4 else (torch.contiguous_format,)

    def strides(shape: Sequence[int], memory_format: torch.memory_format) -> tuple[int, ...]:
        return torch.empty(tuple(shape), device="meta", memory_format=memory_format).stride()

    found = [f for f in formats if strides(t.shape, f) == t.stride()]
    found += [f for f in formats if t.is_contiguous(memory_format=f)]
    if 0 in t.stride():
        found += formats
    return strides(shape, found[0]) if found else t.stride()


def dense(t: Tensor) -> Tensor:
    """t as the kernels read it: images in channels_last, vectors contiguous."""
    return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.contiguous_format)
