"""Batch statistics kept through a recomputation, which must neither gather nor count them again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Tape:
    """Records what a region's BNs computed, in order, and plays it back while the region is recomputed."""

    def __init__(self) -> None:
        self._entries: list[Any] | None = None
        self._next: int | None = None

    @property
    def active(self) -> bool:
        return self._entries is not None

    @property
    def replays(self) -> bool:
        return self._next is not None

    def through(self, compute: Callable[[], tuple]) -> tuple:
        """The statistics of the next BN: computed, or those of the first time."""
        if self._next is not None:
            self._next += 1
            return self._entries[self._next - 1]
        result = compute()
        if self._entries is not None:
            mean, var, count, total = result
            self._entries.append((mean, var, count, total.new_empty(0)))
        return result

    @contextmanager
    def recording(self, entries: list[Any]) -> Iterator[None]:
        before, self._entries = self._entries, entries
        try:
            yield
        finally:
            self._entries = before

    @contextmanager
    def replaying(self, entries: list[Any]) -> Iterator[None]:
        before = self._entries, self._next
        self._entries, self._next = entries, 0
        try:
            yield
        finally:
            self._entries, self._next = before


tape = Tape()
