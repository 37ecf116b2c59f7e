"""What was decided for calls of one kind, by their metadata."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from .registry import Choice

KEPT = 4096  # at most


class Plan(NamedTuple):
    """How calls of one kind are served."""

    choice: Choice
    run: Callable[[Any], Any]  # the call -> its results
    config: Any = None  # of the backend's `configs`


kept: dict[Hashable, Plan] = {}
short: dict[Hashable, Any] = {}  # what serves, by the public function's own arguments, calls that nothing watches


def keep(plans: dict[Hashable, Any], key: Hashable, plan: Any) -> None:
    if len(plans) >= KEPT:
        plans.clear()
    plans[key] = plan


def forget() -> None:
    kept.clear()
    short.clear()
