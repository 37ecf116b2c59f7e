"""The recipes, and what a run is made of.

`modern` is modelled on recipe A3 of Wightman et al., "ResNet strikes back", https://arxiv.org/abs/2110.00476, table 2.
As there: 100 epochs, 5 of them linear warm-up, then a cosine; mixup 0.1 or CutMix 1.0, one of both for every batch;
RandAugment of magnitude 6. As in A1: label smoothing 0.1. Other than there:
- AdamW with DeiT's rate and decay (https://arxiv.org/abs/2012.12877) in place of LAMB, which PyTorch lacks, and batches
  of 512, not 2048; no decay of BN's parameters and of biases, as timm has it;
- cross-entropy, not a binary one for every class;
- images of 224, not 160, and tests at 224 of 256, not 95 %;
- RandAugment's magnitude is not jittered;
- what is evaluated is an exponential moving average of the weights.

`finetune` is a short cosine at a small rate from `init`, as in Kornblith et al., https://arxiv.org/abs/1805.08974, with
values of our own. `tutorial` is what introductions to PyTorch train: ResNet-34 with ImageNet's 7x7 stem on CIFAR-10 as
it is, colours scaled to [-1, 1], by Adam.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("step", "plateau", "cosine", "constant")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; iterations are batches. Fields that `Settings` has too are their defaults there."""

    model: str
    data: str | None
    batch: int
    lr: float
    evaluations: int  # in a run
    augment: Literal["none", "crop_flip", "scale_jitter", "resized_crop"]  # see `batches.make_source`
    iterations: int = 0  # or
    epochs: int = 0
    optimizer: str = "sgd"
    weight_decay: float = 1e-4
    decay_norm: bool = True
    schedule: str = "step"
    milestones: tuple[float, ...] = ()  # of the run: where the learning rate is divided by 10 in steps
    warm_up_share: float = 0  # of the run, for the linear warm-up
    warm_up_depth: int | None = None  # convolutions from which a tenth of the rate comes first
    pixel_mean: bool = False
    label_smoothing: float = 0
    mixup: float = 0
    cutmix: float = 0
    rand_augment: int = 0
    ema: float = 0


RECIPES = {
    # He et al., https://arxiv.org/abs/1512.03385, section 4.2
    "cifar": Recipe(
        "cifar_resnet20",
        "cifar10",
        128,
        0.1,
        20,
        "crop_flip",
        iterations=64_000,
        milestones=(0.5, 0.75),
        warm_up_depth=109,
        pixel_mean=True,
    ),
    # the same, section 3.4; the steps are where its figure 4 falls
    "imagenet": Recipe("resnet50", None, 256, 0.1, 120, "scale_jitter", iterations=600_000, milestones=(0.25, 0.5)),
    "tutorial": Recipe(
        "resnet34",
        "cifar10",
        128,
        1e-3,
        10,
        "none",
        epochs=10,
        optimizer="adam",
        weight_decay=0,
        schedule="constant",
    ),
    "modern": Recipe(
        "resnet50",
        None,
        512,
        5e-4,
        100,
        "resized_crop",
        epochs=100,
        optimizer="adamw",
        weight_decay=0.05,
        decay_norm=False,
        schedule="cosine",
        warm_up_share=0.05,
        label_smoothing=0.1,
        mixup=0.1,
        cutmix=1.0,
        rand_augment=6,
        ema=0.9999,
    ),
    "finetune": Recipe(
        "resnet50",
        None,
        64,
        0.01,
        10,
        "resized_crop",
        epochs=10,
        decay_norm=False,
        schedule="cosine",
        warm_up_share=0.05,
        label_smoothing=0.1,
    ),
}


OF_RECIPE: Any = None  # until `__post_init__` or `complete` fills it in
_DERIVED = ("iterations", "eval_every", "save_every", "warm_up_iterations")  # by `complete`


@dataclass
class Settings:
    """What decides a run's numbers; what is left out is the recipe's.

    It stands in the checkpoint, and a resumed run has the same but for more iterations. Paths are made absolute.

    Raises:
        ValueError: a value that is none of those accepted.
    """

    recipe: str = "cifar"
    model: str = OF_RECIPE
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    init: str | None = None  # weights to start from; see `initial.read`
    freeze: str | None = None  # the last part whose weights stay as they are; see `initial.freeze`
    data: str = OF_RECIPE  # see `data.load`
    holdout: int = 0  # training images kept for the evaluations on the way
    pixel_mean: bool = OF_RECIPE  # subtract the mean image, not the mean colour
    iterations: int = OF_RECIPE  # the milestones move in proportion
    batch: int = OF_RECIPE  # images an iteration, over all processes
    optimizer: str = OF_RECIPE
    lr: float = OF_RECIPE
    weight_decay: float = OF_RECIPE
    decay_norm: bool = OF_RECIPE  # weight decay on BN's parameters and on biases, too
    schedule: str = OF_RECIPE
    warm_up: bool | None = None  # the paper's, at a tenth of the rate; None: for the recipe's depths
    warm_up_iterations: int = OF_RECIPE  # from 0 to the rate in a line
    label_smoothing: float = OF_RECIPE
    mixup: float = OF_RECIPE  # of its Beta distribution; 0: none
    cutmix: float = OF_RECIPE  # likewise
    rand_augment: int = OF_RECIPE  # magnitude of RandAugment's two operations, up to 10; 0: none
    ema: float = OF_RECIPE  # decay of the weights' moving average; 0: none
    dtype: str = "fp32"
    sync_bn: bool = False
    seed: int = 0
    eval_every: int = OF_RECIPE
    save_every: int = OF_RECIPE
    log_every: int = 50

    def __post_init__(self) -> None:
        accepted: dict[str, Collection[str]] = {
            "recipe": RECIPES,
            "dtype": DTYPES,
            "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES,
        }
        for name, values in accepted.items():
            if (value := getattr(self, name)) is not None and value not in values:
                raise ValueError(f"{name}: unknown {value!r}; there are: {', '.join(values)}")
        for name in ("iterations", "batch", "eval_every", "save_every", "log_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("weight_decay", "mixup", "cutmix", "warm_up_iterations"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        for name in ("label_smoothing", "ema"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be 0 or more and less than 1, got {value}")
        if self.rand_augment is not None and not 0 <= self.rand_augment <= 10:
            raise ValueError(f"rand_augment must be from 0 to 10, got {self.rand_augment}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be a positive number, got {self.lr}")
        recipe = RECIPES[self.recipe]
        for f in fields(recipe):
            if f.name not in _DERIVED and getattr(self, f.name, 0) is None:
                setattr(self, f.name, getattr(recipe, f.name))
        if self.data is None:
            raise ValueError(f"recipe {self.recipe} needs data, for instance imagefolder:FOLDER")
        if self.schedule == "step" and not recipe.milestones:
            rest = ", ".join(s for s in SCHEDULES if s != "step")
            raise ValueError(f"schedule: recipe {self.recipe} has no steps; it takes {rest}")
        kind, _, path = self.data.partition(":")
        if kind in ("cifar10", "imagefolder") and path:
            self.data = f"{kind}:{_absolute(path)}"
        if self.init is not None and Path(self.init).exists():
            self.init = _absolute(self.init)

    def resume(self, config: dict[str, Any], step: int) -> None:
        """Take over the lengths of a run that stands at `step`, which have to be its own but for more iterations.

        Raises:
            ValueError: a setting differs from the run's; the message names it.
        """
        for name in _DERIVED:
            if getattr(self, name) is None:
                setattr(self, name, config.get(name))
        for f in fields(self):
            own, its = getattr(self, f.name), config.get(f.name, "unknown")
            if f.name == "iterations" and own > its:
                continue
            if own != its:
                also = f"; more iterations may follow, it stands at {step}" if f.name == "iterations" else ""
                raise ValueError(f"{f.name} is {own!r}, and {its!r} in the run: a resumed run keeps its settings{also}")

    def complete(self, count: int) -> None:
        """Fill in the lengths, for `count` training images."""
        recipe = RECIPES[self.recipe]
        self.iterations = self.iterations or recipe.iterations or math.ceil(recipe.epochs * count / self.batch)
        windows = math.ceil(self.iterations / self.log_every)
        self.eval_every = self.eval_every or self.log_every * math.ceil(windows / recipe.evaluations)
        self.save_every = self.save_every or self.log_every * math.ceil(min(windows / 20, 1000 / self.log_every))
        if self.warm_up_iterations is None:
            self.warm_up_iterations = round(recipe.warm_up_share * self.iterations)

    def milestones(self) -> list[int]:
        """The iterations after which the learning rate is divided by 10."""
        steps = RECIPES[self.recipe].milestones if self.schedule == "step" else ()
        return [round(m * self.iterations) for m in steps]


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
