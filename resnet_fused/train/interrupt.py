"""Ctrl-C and SIGTERM end a run where it can be saved."""

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class Interrupted(KeyboardInterrupt):
    """A run was ended by a signal; the message says where it stands and how it goes on."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class Signals:
    """Which of SIGINT and SIGTERM came; where `patient` is false, a second one is a KeyboardInterrupt at once."""

    def __init__(self, patient: bool = False) -> None:
        self.received: int | None = None
        self._patient = patient

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None and not self._patient:
            raise KeyboardInterrupt
        self.received = signum

    def guard(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until a signal comes: then Interrupted, without a message yet."""
        for item in items:
            if self.received is not None:
                raise Interrupted(self.received, "")
            yield item


@contextlib.contextmanager
def signals(patient: bool) -> Iterator[Signals]:
    """Receive both signals inside the block; outside the main thread, which Python sends them to, nothing."""
    found, before = Signals(patient), {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, found.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
