"""Batches as a function of seed and iteration alone, so that a run resumes anywhere and processes share them out."""

import functools
import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2

from ..models.features import IMAGENET_MEAN, IMAGENET_STD
from . import augment, data
from .distributed import World
from .recipes import RECIPES, Settings

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

Batch = tuple[Tensor, Tensor]  # images [N, 3, H, W], labels [N]
Normalization = tuple[Tensor, Tensor]  # mean [3, 1, 1] or [3, H, W] and std [3, 1, 1] of images in [0, 1]
IMAGENET = (torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None])
Samples = Union["ImageFolder", "_Transformed"]


def make_source(
    settings: Settings,
    world: World,
    device: torch.device,
    workers: int,
    normalization: Normalization | None = None,
) -> "InMemory | Loaded":
    """The data of a run, prepared as its recipe says: an image folder in crops, the other data as whole images.

    Args:
        workers: processes that read images.
        normalization: mean and std of the weights that the run starts from; a mean image of another size gives its mean
            colour. None: of the recipe.

    Raises:
        ValueError, FileNotFoundError, FetchError: of `data.load`, or data that don't go with the recipe or the batch.
    """
    if settings.batch % world.size:
        raise ValueError(f"batch {settings.batch} does not divide among {world.size} processes")
    way, folder = RECIPES[settings.recipe].augment, settings.data.startswith("imagefolder:")
    if folder and way in ("none", "crop_flip"):
        others = [name for name, recipe in RECIPES.items() if recipe.augment not in ("none", "crop_flip")]
        raise ValueError(f"recipe {settings.recipe} takes no image folder; one goes with {', '.join(others)}")
    crops = folder or way == "scale_jitter"
    if crops and settings.holdout:
        raise ValueError(f"holdout is for images that are seen whole, not for crops of {settings.data}")
    if crops or settings.rand_augment:
        return Loaded(settings, world, device, workers, crops, normalization)
    return InMemory(settings, world, device, normalization)


class InMemory:
    """Images that stay on the device and are augmented there; no iteration waits for the host."""

    resize: int | None = None  # images are seen whole
    crop: int | None = None

    def __init__(
        self, settings: Settings, world: World, device: torch.device, normalization: Normalization | None = None
    ) -> None:
        self._settings, self._world = settings, world
        splits = _splits(settings)
        self.classes, self.count = splits["train"].classes, len(splits["train"].labels)
        self.mean, self.std = _fitting(normalization, splits["train"]) or _normalization(settings, splits["train"])
        self._splits = {k: (v.images.to(device), v.labels.to(device)) for k, v in splits.items()}
        self._norm = (self.mean.to(device), self.std.to(device))
        self._device = device
        self._epoch = functools.lru_cache(maxsize=2)(self._draw)

    def train(self, start: int, stop: int) -> Iterator[Batch]:
        """This process's part of the batches of iterations start to stop."""
        images, labels = self._splits["train"]
        share = self._settings.batch // self._world.size
        for step in range(start, stop):
            first = step * self._settings.batch + self._world.rank * share
            parts = [[t[part] for t in self._epoch(e)] for e, part in _spans(first, share, self.count)]
            index, offsets, flips = (torch.cat(p) for p in zip(*parts, strict=True))
            x = data.normalise(images[index], *self._norm)
            augmented = RECIPES[self._settings.recipe].augment != "none"
            yield augment.crop_flip(x, offsets, flips) if augmented else _nhwc(x), labels[index]

    def evaluation(self, split: str) -> Iterator[Batch]:
        """This process's part of a split: "test", or "val" where images are held out."""
        images, labels = (t[self._world.rank :: self._world.size] for t in self._splits[split])
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            yield _nhwc(data.normalise(x, *self._norm)), y

    def _draw(self, epoch: int) -> tuple[Tensor, ...]:
        """An epoch's order [N], crop offsets [N, 2] and flips [N]."""
        generator = torch.Generator().manual_seed(seed_of(self._settings.seed, epoch))
        order = torch.randperm(self.count, generator=generator)
        offsets = torch.randint(2 * augment.PAD + 1, (self.count, 2), generator=generator)
        flips = torch.rand(self.count, generator=generator) < 0.5
        return tuple(t.to(self._device) for t in (order, offsets, flips))


class Loaded:
    """Samples that worker processes read, decode and augment.

    Args:
        crops: show crops of 224; else whole images.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        device: torch.device,
        workers: int,
        crops: bool,
        normalization: Normalization | None = None,
    ) -> None:
        self._settings, self._world, self._device, self._workers = settings, world, device, workers
        self.resize = augment.RESIZE if crops else None
        self.crop = augment.CROP if crops else None
        splits: dict[str, Samples]
        if crops:
            splits = {split: _samples(settings.data, split) for split in ("train", "test")}
            data.check_classes(settings.data, splits["train"].classes, splits["test"].classes)
            self.mean, self.std = _fitting(normalization, None) or self._crops_normalization(splits["train"])
        else:
            images = _splits(settings)
            self.mean, self.std = _fitting(normalization, images["train"]) or _normalization(settings, images["train"])
            splits = {split: _Transformed(found) for split, found in images.items()}
        self.classes, self.count = splits["train"].classes, len(splits["train"])
        for split, samples in splits.items():
            samples.transform = self._transform(crops, split == "train")
        self._splits = splits

    def train(self, start: int, stop: int) -> Iterator[Batch]:
        """As `InMemory.train`."""
        order = _Order(self.count, self._settings, self._world, start, stop)
        yield from self._batches(_Seeded(self._splits["train"]), batch_sampler=order)

    def evaluation(self, split: str) -> Iterator[Batch]:
        """As `InMemory.evaluation`."""
        samples = self._splits[split]
        part = Subset(samples, range(self._world.rank, len(samples), self._world.size))
        size = max(1, self._settings.batch // self._world.size)
        yield from self._batches(part, batch_size=size)

    def _transform(self, crops: bool, train: bool) -> v2.Compose:
        jitter = RECIPES[self._settings.recipe].augment == "scale_jitter"
        steps = augment.center_crop() if crops else []
        if train:
            steps = augment.scale_jitter() if jitter else augment.resized_crop() if crops else augment.pad_crop()
            steps += augment.rand_augment(self._settings.rand_augment)
        return v2.Compose([*steps, augment.Normalise(self.mean, self.std, lighting=train and jitter)])

    def _crops_normalization(self, samples: Samples) -> Normalization:
        """ImageNet's colours, or the mean of the centres of up to 10,000 training images."""
        if not self._settings.pixel_mean:
            return IMAGENET
        samples.transform = v2.Compose([*augment.center_crop(), v2.ToImage()])
        some = range(0, len(samples), math.ceil(len(samples) / 10_000))
        total = torch.zeros(3, augment.CROP, augment.CROP, dtype=torch.float64, device=self._device)
        part = Subset(samples, some[self._world.rank :: self._world.size])
        for x, _ in data.Loader(part, num_workers=self._workers, batch_size=64):
            total += x.sum(0, dtype=torch.float64).to(self._device)
        return (self._world.sum(total) / len(some) / 255).float().cpu(), torch.ones(3, 1, 1)

    def _batches(self, samples: Dataset, **options: Any) -> Iterator[Batch]:
        pinned = self._device.type == "cuda"
        for x, y in data.Loader(samples, num_workers=self._workers, pin_memory=pinned, **options):
            yield _nhwc(x.to(self._device, non_blocking=True)), y.to(self._device, non_blocking=True)


class _Order:
    """Of every iteration: this process's samples, each with the seed of its augmentation."""

    def __init__(self, count: int, settings: Settings, world: World, start: int, stop: int) -> None:
        self._count, self._settings, self._world, self._steps = count, settings, world, range(start, stop)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share, seed = self._settings.batch // self._world.size, self._settings.seed
        epoch, order = -1, []
        for step in self._steps:
            keys = []
            for e, part in _spans(step * self._settings.batch + self._world.rank * share, share, self._count):
                if e != epoch:
                    generator = torch.Generator().manual_seed(seed_of(seed, e))
                    epoch, order = e, torch.randperm(self._count, generator=generator).tolist()
                keys += [(order[i], seed_of(seed, e, i)) for i in range(part.start, part.stop)]
            yield keys


class _Seeded(Dataset):
    """A data set under keys (index, seed): the sample is drawn with that seed, whichever worker draws it."""

    def __init__(self, samples: Dataset) -> None:
        self._samples = samples

    def __getitem__(self, key: tuple[int, int]) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(key[1])
            return self._samples[key[0]]


class _Transformed(Dataset):
    """In-memory images sent through a transform, sample by sample."""

    def __init__(self, images: data.Images) -> None:
        self._images, self.classes = images, images.classes
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self._images.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self._images.images[index]), self._images.labels[index]


def _samples(name: str, split: str) -> Samples:
    found = data.load(name, split)
    return _Transformed(found) if isinstance(found, data.Images) else found


def _splits(settings: Settings) -> dict[str, data.Images]:
    """Of data in memory: "train", "test", and "val" where images are held out."""
    splits = {split: data.load(settings.data, split) for split in ("train", "test")}
    if settings.holdout:
        splits["train"], splits["val"] = data.hold_out(splits["train"], settings.holdout)
    return splits


def _normalization(settings: Settings, train: data.Images) -> Normalization:
    """Of whole images: less the mean image; or the mean colour, over the colours' std; or [-1, 1]."""
    if not settings.pixel_mean and RECIPES[settings.recipe].augment == "none":
        return torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5)
    chunks, count = train.images.split(10_000), len(train.labels)
    mean = sum(chunk.sum(0, dtype=torch.float64) for chunk in chunks) / count / 255
    if settings.pixel_mean:
        return mean.float(), torch.ones(3, 1, 1)
    mean = mean.mean((1, 2), keepdim=True)
    variance = sum(((chunk / 255 - mean) ** 2).mean((2, 3)).sum(0) for chunk in chunks) / count
    return mean.float(), variance.sqrt().float()[:, None, None]


def _fitting(normalization: Normalization | None, images: data.Images | None) -> Normalization | None:
    """That of the weights; of a mean image of another size than the images' (None: the crop's) the mean colour."""
    if normalization is None:
        return None
    mean, std = normalization
    size = (augment.CROP, augment.CROP) if images is None else tuple(images.images.shape[2:])
    return (mean if tuple(mean.shape[1:]) in ((1, 1), size) else mean.mean((1, 2), keepdim=True)), std


def _spans(first: int, length: int, count: int) -> Iterator[tuple[int, slice]]:
    """The positions first to first + length of an endless row of epochs, as parts of epochs of `count`."""
    while length:
        epoch, begin = divmod(first, count)
        end = min(count, begin + length)
        yield epoch, slice(begin, end)
        first, length = first + end - begin, length - (end - begin)


def seed_of(*parts: int | str) -> int:
    """32 bits, all that the CPU's generator takes."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
