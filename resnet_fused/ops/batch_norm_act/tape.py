"""Batch statistics kept through a recomputation, which must neither gather nor count them again."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ...dispatch import registry


class Tape(threading.local):
    """Records what a region's BNs computed, in order, and plays it back while the region is recomputed.

    Other threads, DataParallel's and autograd's, have their own regions.
    """

    def __init__(self) -> None:
        self._entries: list[Any] | None = None
        self._next: int | None = None

    @property
    def active(self) -> bool:
        return not torch.compiler.is_compiling() and self._entries is not None

    @property
    def replays(self) -> bool:
        return not torch.compiler.is_compiling() and self._next is not None

    def through(self, compute: Callable[[], tuple]) -> tuple:
        """The statistics of the next BN: computed, or those of the first time."""
        if self._next is not None and self._entries is not None:
            self._next += 1
            return self._entries[self._next - 1]
        result = compute()
        if self._entries is not None:
            mean, var, count, total = result
            self._entries.append((mean, var, count, total.new_empty(0)))
        return result

    def contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Around a region's first run and around every recomputation, which takes the first run's backend."""
        entries: list[Any] = []
        backend = registry.get_backend()
        return self._recording(entries), _Reenterable(lambda: self._replaying(entries, backend))

    @contextmanager
    def _recording(self, entries: list[Any]) -> Iterator[None]:
        before, self._entries = self._entries, entries
        try:
            yield
        finally:
            self._entries = before

    @contextmanager
    def _replaying(self, entries: list[Any], backend: str) -> Iterator[None]:
        before = self._entries, self._next
        self._entries, self._next = entries, 0
        try:
            with registry.backend(backend):
                yield
        finally:
            self._entries, self._next = before


class _Reenterable:
    """A new context at every entry: with retain_graph=True a backward pass runs more than once."""

    def __init__(self, make: Callable[[], AbstractContextManager]) -> None:
        self._make = make
        self._open: list[AbstractContextManager] = []

    def __enter__(self) -> None:
        self._open.append(self._make())
        self._open[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._open.pop().__exit__(*error)


tape = Tape()
