"""Tensors as the kernels read them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def format_of(t: Tensor) -> torch.memory_format:
    """Images in channels_last, vectors contiguous."""
    return torch.channels_last if t.dim() == 4 else torch.contiguous_format


def dense(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=format_of(t))


def dense_call(call: Any) -> Any:
    """The call with every tensor dense."""
    return call if all(is_dense(a) for a in call) else type(call)(*_dense(call))


def given(call: Iterable[Any]) -> str:
    """A call's tensors by dtype and whether they start at a multiple of 16 bytes, and its switches."""

    def part(a: Any) -> str:
        if isinstance(a, Tensor):
            return str(a.dtype).removeprefix("torch.") + ("/misaligned" if a.data_ptr() % 16 else "")
        return "-" if a is None else str(a) if isinstance(a, bool) else ""

    return ",".join(map(part, call))


def filled(results: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """A launcher's results with tensors of no elements where it gave None: operators return tensors."""
    return tuple(like.new_empty(0) if r is None else r for r in results)


def is_dense(a: Any) -> bool:
    return not isinstance(a, Tensor) or a.is_contiguous(memory_format=format_of(a))


def _dense(args: Iterable[Any]) -> Iterable[Any]:
    return (dense(a) if isinstance(a, Tensor) else a for a in args)
