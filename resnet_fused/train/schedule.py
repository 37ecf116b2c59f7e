"""The optimiser and its learning rate."""

import math
from typing import Any

import torch
from torch import nn

from .recipes import Settings

PATIENCE = 5  # evaluations


def make_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """The run's optimiser over the parameters that are trained; vectors, BN's and biases, may go without decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained, "weight_decay": settings.weight_decay}]
    if not settings.decay_norm:
        groups[0]["params"] = [p for p in trained if p.ndim > 1]
        groups.append({"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0})
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, settings.lr, momentum=0.9)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer](groups, settings.lr)


class Schedule:
    """The learning rate: what the iteration says, divided by 10 where the error stalls, and for as long as it warms up.

    Args:
        optimizer: its groups' rate is the highest, and is set here.
        milestones: iterations after which it is divided by 10.
        patience: evaluations without a lower error after which it is divided by 10; None: never.
        warm_up: start at a tenth, until the training error is below 80 %.
        linear: so many iterations first in which it rises to the highest.
        cosine: the iteration at which half a cosine from there ends at 0; None: no cosine.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        milestones: list[int],
        patience: int | None = None,
        warm_up: bool = False,
        linear: int = 0,
        cosine: int | None = None,
    ) -> None:
        self._optimizer, self._milestones, self._patience = optimizer, milestones, patience
        self._linear, self._cosine = linear, cosine
        self._base = optimizer.param_groups[0]["lr"]
        self._state = {"done": 0, "drops": 0, "warming": warm_up, "best": math.inf, "stalled": 0}
        self._set()

    @classmethod
    def of(cls, settings: Settings, optimizer: torch.optim.Optimizer, warm_up: bool) -> "Schedule":
        """The schedule of complete settings."""
        patience = PATIENCE if settings.schedule == "plateau" else None
        cosine = settings.iterations if settings.schedule == "cosine" else None
        return cls(optimizer, settings.milestones(), patience, warm_up, settings.warm_up_iterations, cosine)

    @property
    def lr(self) -> float:
        """Of the next iteration."""
        done = self._state["done"]
        passed = sum(0 < m <= done for m in self._milestones)
        lr = self._base / 10 ** (passed + self._state["drops"] + self._state["warming"])
        if done < self._linear:
            return lr * (done + 1) / (self._linear + 1)
        if self._cosine is not None:
            lr *= (1 + math.cos(math.pi * (done - self._linear) / max(1, self._cosine - self._linear))) / 2
        return lr

    def iterated(self, done: int) -> None:
        """After so many iterations."""
        self._state["done"] = done
        self._set()

    def trained(self, error: float) -> None:
        """After a few iterations of that training error, in percent."""
        if self._state["warming"] and error < 80:
            self._state["warming"] = False
            self._set()

    def evaluated(self, error: float) -> None:
        """After an evaluation."""
        state = self._state
        if self._patience is None:
            return
        state["stalled"] = 0 if error < state["best"] else state["stalled"] + 1
        state["best"] = min(error, state["best"])
        if state["stalled"] > self._patience:
            state["drops"], state["stalled"] = state["drops"] + 1, 0
            self._set()

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = dict(state)
        self._set()

    def _set(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr
