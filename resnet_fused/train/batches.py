"""Batches as a function of seed and iteration alone, so that a run resumes anywhere and processes share them out."""

import functools
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from . import augment, data
from .distributed import World
from .recipes import Settings

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

Batch = tuple[Tensor, Tensor]  # images [N, 3, H, W], labels [N]
Samples = Union["ImageFolder", "_Transformed"]


def make_source(settings: Settings, world: World, device: torch.device, workers: int) -> "InMemory | Loaded":
    """The data of a run, prepared as its recipe says.

    Raises:
        ValueError, FileNotFoundError: of `data.load`, or data that don't go with the recipe or the batch.
    """
    if settings.batch % world.size:
        raise ValueError(f"batch {settings.batch} does not divide among {world.size} processes")
    if settings.recipe == "imagenet":
        if settings.holdout:
            raise ValueError("holdout is for the recipes cifar and tutorial: an image folder has its val/")
        train = _samples(settings.data, "train", augment.imagenet_train())
        test = _samples(settings.data, "test", augment.imagenet_eval())
        data.check_classes(settings.data, train.classes, test.classes)
        return Loaded(settings, world, device, workers, train, test)
    if settings.data.startswith("imagefolder:"):
        raise ValueError(f"recipe {settings.recipe} takes cifar10 or synthetic; an image folder goes with imagenet")
    return InMemory(settings, world, device)


class InMemory:
    """Images that stay on the device and are augmented there; no iteration waits for the host."""

    def __init__(self, settings: Settings, world: World, device: torch.device) -> None:
        self._settings, self._world = settings, world
        splits = {"train": data.load(settings.data, "train"), "test": data.load(settings.data, "test")}
        self.classes = splits["train"].classes
        if settings.holdout:
            splits["train"], splits["val"] = data.hold_out(splits["train"], settings.holdout)
        self.count = len(splits["train"].labels)
        if settings.recipe == "cifar":
            total = sum(chunk.sum(0, dtype=torch.float64) for chunk in splits["train"].images.split(10_000))
            self.mean, self.std = (total / self.count / 255).float(), torch.ones(3, 1, 1)
        else:
            self.mean, self.std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5)
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
            augmented = self._settings.recipe == "cifar"
            yield augment.crop_flip(x, offsets, flips) if augmented else _nhwc(x), labels[index]

    def evaluation(self, split: str) -> Iterator[Batch]:
        """This process's part of a split: "test", or "val" where images are held out."""
        images, labels = (t[self._world.rank :: self._world.size] for t in self._splits[split])
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            yield _nhwc(data.normalise(x, *self._norm)), y

    def _draw(self, epoch: int) -> tuple[Tensor, ...]:
        """An epoch's order [N], crop offsets [N, 2] and flips [N]."""
        generator = torch.Generator().manual_seed(_seed(self._settings.seed, epoch))
        order = torch.randperm(self.count, generator=generator)
        offsets = torch.randint(2 * augment.PAD + 1, (self.count, 2), generator=generator)
        flips = torch.rand(self.count, generator=generator) < 0.5
        return tuple(t.to(self._device) for t in (order, offsets, flips))


class Loaded:
    """Samples that worker processes read, decode and augment."""

    def __init__(
        self, settings: Settings, world: World, device: torch.device, workers: int, train: Samples, test: Samples
    ) -> None:
        self._settings, self._world, self._device, self._workers = settings, world, device, workers
        self._train, self._test = train, test
        self.classes, self.count = train.classes, len(train)
        self.mean = torch.tensor(augment.IMAGENET_MEAN)[:, None, None]
        self.std = torch.tensor(augment.IMAGENET_STD)[:, None, None]

    def train(self, start: int, stop: int) -> Iterator[Batch]:
        """As `InMemory.train`."""
        order = _Order(self.count, self._settings, self._world, start, stop)
        yield from self._batches(_Seeded(self._train), batch_sampler=order)

    def evaluation(self, split: str) -> Iterator[Batch]:
        """As `InMemory.evaluation`."""
        part = Subset(self._test, range(self._world.rank, len(self._test), self._world.size))
        size = max(1, self._settings.batch // self._world.size)
        yield from self._batches(part, batch_size=size)

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
                    generator = torch.Generator().manual_seed(_seed(seed, e))
                    epoch, order = e, torch.randperm(self._count, generator=generator).tolist()
                keys += [(order[i], _seed(seed, e, i)) for i in range(part.start, part.stop)]
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

    def __init__(self, images: data.Images, transform: Any) -> None:
        self._images, self._transform, self.classes = images, transform, images.classes

    def __len__(self) -> int:
        return len(self._images.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._transform(self._images.images[index]), self._images.labels[index]


def _samples(name: str, split: str, transform: Any) -> Samples:
    found = data.load(name, split, transform)
    return _Transformed(found, transform) if isinstance(found, data.Images) else found


def _spans(first: int, length: int, count: int) -> Iterator[tuple[int, slice]]:
    """The positions first to first + length of an endless row of epochs, as parts of epochs of `count`."""
    while length:
        epoch, begin = divmod(first, count)
        end = min(count, begin + length)
        yield epoch, slice(begin, end)
        first, length = first + end - begin, length - (end - begin)


def _seed(*parts: int) -> int:
    """32 bits, all that the CPU's generator takes."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
