"""The winners that `tune` found on this device, by layer shape."""

from collections.abc import Callable
from typing import Any

import torch

from . import plans
from .store import Store

Timer = Callable[[Callable[[], Any]], float]  # a launch -> milliseconds
_stores: dict[torch.device, Store] = {}


def lookup(device: torch.device, key: str) -> dict[str, Any] | None:
    """{"backend": name, "config": tile or None} for this problem, or None where it was not tuned."""
    entry = _store(device).entries.get(key)
    return entry if isinstance(entry, dict) and entry.keys() >= {"backend", "config"} else None


def remember(device: torch.device, key: str, entry: dict[str, Any]) -> None:
    plans.forget()
    _store(device)[key] = entry


def forget() -> None:
    """Drop what is in memory; the file is read anew."""
    plans.forget()
    _stores.clear()


def _store(device: torch.device) -> Store:
    store = _stores.get(device)
    if store is None:
        store = _stores[device] = Store("tuned", device)
    return store


def cuda_timer(launch: Callable[[], Any]) -> float:
    """Milliseconds by CUDA events."""
    from triton.testing import do_bench

    return do_bench(launch, warmup=5, rep=20, return_mode="median")
