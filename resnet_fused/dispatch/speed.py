"""The winners that `tune` found on this device, by layer shape."""

from typing import Any

import torch

from ._store import Store

_stores: dict[torch.device, Store] = {}
generation = 0  # moves with every change, for who keeps what he looked up


def lookup(device: torch.device, key: str) -> dict[str, Any] | None:
    """{"backend": name, "config": tile or None} for this problem, or None where it was not tuned."""
    entry = _store(device).entries.get(key)
    return entry if isinstance(entry, dict) and entry.keys() >= {"backend", "config"} else None


def remember(device: torch.device, key: str, entry: dict[str, Any]) -> None:
    global generation
    generation += 1
    _store(device)[key] = entry


def forget() -> None:
    """Drop what is in memory; the file is read anew."""
    global generation
    generation += 1
    _stores.clear()


def _store(device: torch.device) -> Store:
    store = _stores.get(device)
    if store is None:
        store = _stores[device] = Store("tuned", device)
    return store
