"""A refused kernel's inputs, kept as metadata: what was drawn for the check is drawn from it again."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import store


def keep(backend: str, call: Any, config: Any, wrong: str) -> Path | None:
    """Write `refused-*.json` into the cache folder; None where that can't be written, which `Store` warns of."""
    content = {
        "operator": call.name,
        "backend": backend,
        "config": config,
        "wrong": wrong,
        "fields": [_metadata(value) for value in call],
        "environment": store.environment(call[0].device),
    }
    text = json.dumps(content, indent=1)
    path = store.cache_dir() / f"refused-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with store.atomic_write(path) as file:
            file.write(text)
    except OSError:
        return None
    return path


def _metadata(value: Any) -> Any:
    if isinstance(value, Tensor):
        names = {"shape": list(value.shape), "stride": list(value.stride()), "dtype": str(value.dtype)}
        return names | {"offset": value.data_ptr() % 16}
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def fields(kept: Sequence[Any], device: torch.device) -> list[Any]:
    """A call's fields like those that were kept; the tensors are empty.

    Raises:
        ValueError: they are none.
    """
    return [_like(value, device) if isinstance(value, dict) else value for value in kept]


def _like(kept: dict[str, Any], device: torch.device) -> Tensor:
    try:
        shape, stride, offset = kept["shape"], kept["stride"], kept["offset"]
        dtype = getattr(torch, kept["dtype"].removeprefix("torch."))
        size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else 0
        memory = torch.zeros(size + 16, dtype=dtype, device=device)
        return memory.as_strided(shape, stride, offset // dtype.itemsize)
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"no tensor's metadata ({type(error).__name__}: {error}): {kept}") from error
