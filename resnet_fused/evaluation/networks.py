"""A trained network with what its images have to go through and what its outputs stand for."""

import contextlib
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import models
from ..models.features import IMAGENET_MEAN, IMAGENET_STD
from ..models.weights import Source, WeightsArg, describe, files, resolve, torchvision_enum
from ..train import checkpoint, load_model
from ..train.data import image_size
from .views import CROP, SHORT_SIDE, Views, center, resized

_WNID = re.compile(r"n\d{8}")  # WordNet's number of a class, the name of its folder in ImageNet


class Network(NamedTuple):
    """A network in eval mode."""

    name: str  # for messages
    model: models.ResNet
    mean: Tensor  # of images in [0, 1]: [3, 1, 1], or [3, H, W] where images have that size
    std: Tensor
    classes: tuple[str, ...] | None  # of the outputs; None where they are not known by name
    recipe: str  # that it was trained by
    data: str | None = None  # that it was trained on
    resize: int | None = SHORT_SIDE  # short side of the images that it sees a crop of; None: it sees them whole
    crop: int | None = CROP  # height and width of that crop
    size: int | None = None  # height and width of whole images, where it is known
    model_name: str = ""  # as `models.get_model` takes it

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike) -> "Network":
        """What `resnet-fused train` left, from the checkpoint's file or its run's folder.

        Raises:
            FileNotFoundError, ValueError: see `train.load_model`.
        """
        model, meta = load_model(path)
        return cls._of_run(str(path), model, meta)

    @classmethod
    def from_weights(cls, name: str | None, weights: WeightsArg) -> "Network":
        """A model with its weights' classes, preprocessing and normalisation, ImageNet's where a file says nothing.

        Args:
            name: as for `models.get_model`; None: the run's own, what a file's tensors look like, or else resnet50.
            weights: as the model takes them, a run's folder included.

        Raises:
            ValueError: a CIFAR network from a file that is no run: its images' mean is not known.
            ValueError, FileNotFoundError, FetchError, ImportError: of the model's constructor.
        """
        file = isinstance(weights, (str, os.PathLike)) and files.find(weights) is not None
        source = resolve(name if file else name or "resnet50", weights)
        if source is None:
            raise ValueError("weights must be given: without them the network is not trained")
        name = name or (source.run or {}).get("model") or _guess(source)
        if source.run is None and name.startswith("cifar_"):
            raise ValueError(f"{name} needs its checkpoint of resnet-fused train, which has the images' mean")
        model = models.get_model(name, weights=source).eval()
        if source.run:
            return cls._of_run(source.name, model, checkpoint.complete(source.run))
        shown = f"{name}, weights {weights}"
        if published := source.member:
            preset: Any = published.transforms()
            how = {"resize": preset.resize_size[0], "crop": preset.crop_size[0]}
            mean, std = (torch.tensor(v)[:, None, None] for v in (preset.mean, preset.std))
            classes = tuple(published.meta["categories"])
            return cls(shown, _of_bytes(model, mean, std), mean, std, classes, "imagenet", **how, model_name=name)
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        known = _of_bytes(model, mean, std), mean, std, _imagenet(model.fc.out_features)
        return cls(shown, *known, "imagenet", model_name=name)

    @classmethod
    def from_argument(cls, text: str) -> "Network":
        """A network of the command line: a run, or MODEL:WEIGHTS.

        Raises:
            FileNotFoundError, ValueError, FetchError, ImportError: as the two above.
        """
        name, separator, weights = text.partition(":")
        if separator and name in models.list_models():
            return cls.from_weights(name, weights)
        return cls.from_checkpoint(text)

    @classmethod
    def _of_run(cls, name: str, model: models.ResNet, meta: dict[str, Any]) -> "Network":
        config, mean = meta["config"], meta["mean"]
        size = None if meta["crop"] else mean.shape[-1] if mean.shape[-1] > 1 else image_size(config["data"])
        known = mean, meta["std"], tuple(meta["classes"]), config["recipe"], config["data"]
        how = {"resize": meta["resize"], "crop": meta["crop"], "size": size, "model_name": meta["model"]}
        return cls(name, _of_bytes(model, mean, meta["std"]), *known, **how)

    def takes_bytes(self) -> bool:
        """Whether the model normalises images of bytes itself, and as this network's are."""
        own = getattr(self.model, "input_normalization", None)
        return own is not None and all(
            torch.equal(a.cpu(), b.flatten().cpu()) for a, b in zip(own, (self.mean, self.std), strict=True)
        )

    def views(self) -> Views:
        """What it is shown of a photograph: the centre that it was evaluated on, or the whole, in its own size.

        Raises:
            ValueError: it sees whole images, and their size is not known.
        """
        if self.resize and self.crop:
            return center(self.resize, self.crop)
        if self.size is None:
            raise ValueError(f"{self.name} sees whole images, of a size that its checkpoint doesn't tell")
        return resized(self.size)

    def targets(self, classes: Sequence[str]) -> Tensor:
        """The output that stands for each of a data set's classes.

        By name where all are known, ImageNet's wnids included (any subset of them); by place where none is.

        Returns:
            int64 [len(classes)].

        Raises:
            ValueError: none of these goes.
            ImportError: a subset by wnids, and timm is missing.
        """
        own = self.classes or ()
        outputs = self.model.fc.out_features
        imagenets = outputs == 1000 and self.classes == _imagenet(outputs)
        if imagenets and len(classes) < outputs and all(map(_WNID.fullmatch, classes)):
            own = _wnids()
        known = {c: i for i, c in enumerate(own) if own.count(c) == 1}
        if all(c in known for c in classes):
            return torch.tensor([known[c] for c in classes])
        if len(classes) == outputs and not any(c in known for c in classes):
            return torch.arange(outputs)
        unknown = next(c for c in classes if c not in known)
        raise ValueError(
            f"{self.name} has {outputs} classes, the data have {len(classes)}, of which {unknown!r} is none of them"
        )


def _guess(source: Source) -> str:
    """The model whose keys and shapes a file has, or resnet50."""
    if source.published:
        return "resnet50"
    found = (describe(source.state_dict(False)) or "").partition(" ")[0]
    return found if found in models.list_models() else "resnet50"


def _of_bytes(model: models.ResNet, mean: Tensor, std: Tensor) -> models.ResNet:
    """The model, whose stem takes bytes where mean and std are of channels: fewer to read, and no pass of its own."""
    if mean.shape[1:] == std.shape[1:] == (1, 1):
        with contextlib.suppress(ValueError):  # a mean outside 0 to 1: normalised in front of the model
            model.set_input_normalization(mean.flatten(), std.flatten())
    return model


def _imagenet(outputs: int) -> tuple[str, ...] | None:
    """The names of ImageNet's classes, of a network with as many outputs."""
    return tuple(torchvision_enum("ResNet50_Weights").IMAGENET1K_V1.meta["categories"]) if outputs == 1000 else None


def _wnids() -> tuple[str, ...]:
    """ImageNet's 1000 in the order of the outputs."""
    try:
        from timm.data import ImageNetInfo
    except ImportError as error:
        message = f"which output stands for which wnid is asked of timm, which can't be imported ({error})"
        raise ImportError(f"{message}: pip install timm", name="timm") from error
    return tuple(ImageNetInfo("imagenet-1k").label_names())
