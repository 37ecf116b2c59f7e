"""A trained network with what its images have to go through and what its outputs stand for."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import models
from ..models.weights import TORCHVISION_ENUMS, WeightsArg, torchvision_enum
from ..train import load_model
from ..train.augment import IMAGENET_MEAN, IMAGENET_STD


class Network(NamedTuple):
    """A network in eval mode."""

    name: str  # for messages
    model: models.ResNet
    mean: Tensor  # of images in [0, 1]: [3, 1, 1], or [3, H, W] where images have that size
    std: Tensor
    classes: tuple[str, ...] | None  # of the outputs; None where they are not known by name
    recipe: str  # that it was trained by
    data: str | None = None  # that it was trained on
    crops: bool = True  # it sees crops; else whole images

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike) -> "Network":
        """What `resnet-fused train` left, from the checkpoint's file or its run's folder.

        Raises:
            FileNotFoundError, ValueError: see `train.load_model`.
        """
        model, meta = load_model(path)
        config = meta["config"]
        known = meta["mean"], meta["std"], tuple(meta["classes"]), config["recipe"], config["data"]
        return cls(str(path), model, *known, crops=meta["crop"] is not None)

    @classmethod
    def from_weights(cls, name: str, weights: WeightsArg, num_classes: int) -> "Network":
        """A model with ImageNet's normalisation.

        Args:
            name: as for `models.get_model`.
            weights: as the model takes them.
            num_classes: of weights in a file; published ones have ImageNet's 1000.

        Raises:
            ValueError: a CIFAR network, whose images' mean is not known here.
            ValueError, FileNotFoundError, FetchError, ImportError: of the model's constructor.
        """
        if name.startswith("cifar_"):
            raise ValueError(f"{name} needs its checkpoint of resnet-fused train, which has the images' mean")
        published = weights is not None and not Path(str(weights)).is_file()
        model = models.get_model(name, weights=weights, **({} if published else {"num_classes": num_classes}))
        classes = None
        if published:
            classes = tuple(torchvision_enum(TORCHVISION_ENUMS[name]).DEFAULT.meta["categories"])
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        return cls(f"{name}, weights {weights}", model.eval(), mean, std, classes, "imagenet")

    def targets(self, classes: Sequence[str]) -> Tensor:
        """The output that stands for each of a data set's classes: by name where all are known, by place where none is.

        Returns:
            int64 [len(classes)].

        Raises:
            ValueError: neither goes.
        """
        own = self.classes or ()
        known = {c: i for i, c in enumerate(own) if own.count(c) == 1}
        if all(c in known for c in classes):
            return torch.tensor([known[c] for c in classes])
        outputs = self.model.fc.out_features
        if len(classes) == outputs and not any(c in known for c in classes):
            return torch.arange(outputs)
        unknown = next(c for c in classes if c not in known)
        raise ValueError(
            f"{self.name} has {outputs} classes, the data have {len(classes)}, of which {unknown!r} is none of them"
        )
