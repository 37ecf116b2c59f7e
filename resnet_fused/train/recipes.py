"""The recipes, what a run is made of, and its learning rate."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

PATIENCE = 5  # evaluations
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; iterations are batches."""

    model: str  # by default
    data: str | None
    batch: int
    lr: float
    evaluations: int  # in a run
    iterations: int = 0  # or
    epochs: int = 0
    milestones: tuple[int, ...] = ()  # where the learning rate is divided by 10
    warm_up_depth: int | None = None  # convolutions from which a tenth of the rate comes first
    adam: bool = False  # else SGD with momentum 0.9 and weight decay 1e-4


RECIPES = {
    # He et al., https://arxiv.org/abs/1512.03385, section 4.2
    "cifar": Recipe(
        "cifar_resnet20", "cifar10", 128, 0.1, 20, iterations=64_000, milestones=(32_000, 48_000), warm_up_depth=109
    ),
    # the same, section 3.4; the steps are where its figure 4 falls
    "imagenet": Recipe("resnet50", None, 256, 0.1, 120, iterations=600_000, milestones=(150_000, 300_000)),
    "tutorial": Recipe("cifar_resnet20", "cifar10", 128, 1e-3, 10, epochs=10, adam=True),
}


OF_RECIPE: Any = None  # until `__post_init__` or `complete` fills it in


@dataclass
class Settings:
    """What decides a run's numbers; what is left out is the recipe's.

    It stands in the checkpoint, and a resumed run has the same.

    Raises:
        ValueError: a value that is none of those accepted.
    """

    recipe: str = "cifar"
    model: str = OF_RECIPE
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    data: str = OF_RECIPE  # see `data.load`
    holdout: int = 0  # training images kept for the evaluations on the way
    iterations: int = OF_RECIPE  # the milestones move in proportion
    batch: int = OF_RECIPE  # images an iteration, over all processes
    lr: float = OF_RECIPE
    plateau: bool = False  # divide the rate by 10 where the error stalls, not at the milestones
    warm_up: bool | None = None  # None: where the recipe does for the model's depth
    dtype: str = "fp32"
    sync_bn: bool = False
    seed: int = 0
    eval_every: int = OF_RECIPE
    save_every: int = OF_RECIPE
    log_every: int = 50

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe: unknown {self.recipe!r}; there are: {', '.join(RECIPES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: unknown {self.dtype!r}; there are: {', '.join(DTYPES)}")
        for name in ("iterations", "batch", "eval_every", "save_every", "log_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be a positive number, got {self.lr}")
        recipe = RECIPES[self.recipe]
        for name in ("model", "data", "batch", "lr"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(recipe, name))
        if self.data is None:
            raise ValueError(f"recipe {self.recipe} needs data, for instance imagefolder:FOLDER")

    def complete(self, count: int) -> None:
        """Fill in the lengths, for `count` training images."""
        recipe = RECIPES[self.recipe]
        self.iterations = self.iterations or recipe.iterations or math.ceil(recipe.epochs * count / self.batch)
        windows = math.ceil(self.iterations / self.log_every)
        self.eval_every = self.eval_every or self.log_every * math.ceil(windows / recipe.evaluations)
        self.save_every = self.save_every or self.log_every * math.ceil(min(windows / 20, 1000 / self.log_every))

    def milestones(self) -> list[int]:
        """The iterations after which the learning rate falls."""
        recipe = RECIPES[self.recipe]
        if self.plateau:
            return []
        return [round(m * self.iterations / recipe.iterations) for m in recipe.milestones]


def make_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimiser over all parameters."""
    if RECIPES[settings.recipe].adam:
        return torch.optim.Adam(model.parameters(), settings.lr)
    return torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9, weight_decay=1e-4)


class Schedule:
    """The learning rate: divided by 10 at milestones or where the error stalls, and for as long as it warms up.

    Args:
        milestones: iterations after which it is divided.
        patience: evaluations without a lower error after which it is divided; None: never.
        warm_up: start at a tenth, until the training error is below 80 %.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, milestones: list[int], patience: int | None, warm_up: bool
    ) -> None:
        self._optimizer, self._milestones, self._patience = optimizer, milestones, patience
        self._base = optimizer.param_groups[0]["lr"]
        self._state = {"drops": 0, "warming": warm_up, "best": math.inf, "stalled": 0}
        self._set()

    @property
    def lr(self) -> float:
        return self._base / 10 ** (self._state["drops"] + self._state["warming"])

    def iterated(self, done: int) -> None:
        """After so many iterations."""
        if done in self._milestones:
            self._state["drops"] += 1
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
