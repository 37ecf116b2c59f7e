"""Scores of a data set's images, averaged over views and networks, and the errors that they make."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..train import data
from .networks import Network
from .views import Views, fully_convolutional


@dataclass
class Result:
    """Errors in percent."""

    images: int
    top1_error: float
    top5_error: float | None  # None where there are fewer than 5 classes
    per_class: list[dict[str, Any]] = field(default_factory=list)  # class, images, top1_error


class Samples(Dataset):
    """Images of a split: their views and their class.

    Args:
        name, split: as for `train.data.load`.
        views: see `Views`.
        limit: so many images, drawn evenly from the split; None: all.

    Raises:
        ValueError, FileNotFoundError: of `train.data.load`.
    """

    def __init__(self, name: str, views: Views, split: str = "test", limit: int | None = None) -> None:
        self._data = data.load(name, split)
        self.views = views
        self.in_memory = isinstance(self._data, data.Images)
        self.classes = tuple(self._data.classes)
        count = len(self._data.labels) if self.in_memory else len(self._data)
        limit = count if limit is None else min(limit, count)
        self._indices = [i * count // limit for i in range(limit)]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        i = self._indices[index]
        image, label = (self._data.images[i], self._data.labels[i]) if self.in_memory else self._data[i]
        return self.views.transform(image), int(label)


def evaluate(
    networks: Sequence[Network],
    samples: Samples,
    *,
    batch: int = 64,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    workers: int = 4,
) -> Result:
    """The errors of one network, or of several whose probabilities are averaged.

    Args:
        networks: moved to the device.
        samples: the images; each network sees the same views.
        batch: images at a time.
        dtype: autocast to it where it is not float32.
        workers: processes that read images of a folder.

    Raises:
        ValueError: networks that don't go with each other or with the images, or an image that can't be read.
        FloatingPointError: scores that are not finite.
    """
    from tqdm import tqdm  # late: --help works without it

    device = torch.device(device)
    targets = [network.targets(samples.classes) for network in networks]
    for network, other in zip(networks[1:], targets[1:], strict=True):
        same = network.model.fc.out_features == networks[0].model.fc.out_features
        if not (same and torch.equal(other, targets[0])):
            raise ValueError(f"{networks[0].name} and {network.name} have different classes: they make no ensemble")
    target = targets[0].to(device)
    scorers = [Scorer(network, samples.views, device, dtype) for network in networks]
    ranks, labels, finite = [], [], []
    with torch.inference_mode(), _cudnn_benchmark(device):
        for groups, label in tqdm(_loader(samples, batch, workers, device), desc="eval", unit="batch", disable=None):
            label = label.to(device, non_blocking=True)
            scores = _sum(scorer(groups) for scorer in scorers)
            ranks.append(_rank(scores, target[label]))
            labels.append(label)
            finite.append(scores.isfinite().all())
    if not torch.stack(finite).all():
        raise FloatingPointError(f"scores of {', '.join(n.name for n in networks)} are not finite")
    top5 = scores.shape[1] >= 5
    return _result(torch.cat(ranks).cpu(), torch.cat(labels).cpu(), samples.classes, top5)


def batches(
    network: Network, samples: Samples, batch: int = 64, device: torch.device | str = "cpu", workers: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images [N, 3, H, W] in channels_last with a network's own labels, of samples with a single view."""
    device = torch.device(device)
    target, prepare = network.targets(samples.classes), _Normalise(network, device)
    for groups, label in _loader(samples, batch, workers, device):
        ((images, _),) = groups[0]  # one size, one shape
        yield prepare(images[:, 0]), target[label].to(device)


Groups = list[list[tuple[Tensor, Tensor]]]  # of every size: views [N, views, 3, h, w] of one shape, and of which images


def _loader(samples: Samples, batch: int, workers: int, device: torch.device) -> data.Loader:
    workers = 0 if samples.in_memory else workers
    pinned = device.type == "cuda"
    return data.Loader(samples, batch_size=batch, num_workers=workers, collate_fn=_collate, pin_memory=pinned)


def _collate(samples: list[tuple[list[Tensor], int]]) -> tuple[Groups, Tensor]:
    """In the workers: a batch's views, and its classes [N]."""
    return group([views for views, _ in samples]), torch.tensor([label for _, label in samples])


def group(images: Sequence[list[Tensor]]) -> Groups:
    """Images whose views have the same shape go through the network together.

    Args:
        images: of each image a tensor uint8 [views, 3, h, w] for each size.
    """
    found: Groups = []
    for views in zip(*images, strict=True):
        members: dict[torch.Size, list[int]] = {}
        for i, x in enumerate(views):
            members.setdefault(x.shape, []).append(i)
        found.append([(torch.stack([views[i] for i in own]), torch.tensor(own)) for own in members.values()])
    return found


@contextlib.contextmanager
def _cudnn_benchmark(device: torch.device) -> Iterator[None]:
    """cuDNN picks its fastest algorithms, as in training."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = device.type == "cuda" or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class _Normalise:
    def __init__(self, network: Network, device: torch.device) -> None:
        self._mean, self._std, self._device = network.mean.to(device), network.std.to(device), device
        self._name, self._size = network.name, network.mean.shape[1:]

    def __call__(self, x: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 in channels_last, on the device."""
        if self._size != (1, 1) and self._size != x.shape[2:]:
            sizes = [" x ".join(map(str, size)) for size in (self._size, x.shape[2:])]
            raise ValueError(f"{self._name} takes images of {sizes[0]}, these are {sizes[1]}")
        x = data.normalise(x.to(self._device, non_blocking=True), self._mean, self._std)
        return x.contiguous(memory_format=torch.channels_last)


class Scorer:
    """One network's probabilities, averaged over an image's views."""

    def __init__(self, network: Network, views: Views, device: torch.device, dtype: torch.dtype) -> None:
        model = fully_convolutional(network.model) if views.convolutional else network.model
        self._model = model.to(device).to(memory_format=torch.channels_last)  # as the images lie
        self._device, self._dtype = device, dtype
        self._prepare = self._as_bytes if network.takes_bytes() else _Normalise(network, device)

    def __call__(self, groups: Groups) -> Tensor:
        """Of `group` -> float64 [images, classes]."""
        return _sum(map(self._one_size, groups)) / len(groups)

    def _one_size(self, groups: list[tuple[Tensor, Tensor]]) -> Tensor:
        parts = []
        for views, _ in groups:
            with self._autocast():
                logits = self._model(self._prepare(views.flatten(0, 1)))
            parts.append(logits.softmax(1, torch.float64).unflatten(0, views.shape[:2]).mean(1))
        order = torch.cat([members for _, members in groups])
        return torch.cat(parts)[order.argsort().to(self._device)]

    def _as_bytes(self, x: Tensor) -> Tensor:
        return x.to(self._device, non_blocking=True).contiguous(memory_format=torch.channels_last)

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)


def _sum(scores: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, scores)


def _rank(scores: Tensor, target: Tensor) -> Tensor:
    """How many classes come before the right one; of equal scores the first, as argmax has it."""
    right = scores.gather(1, target[:, None])
    first = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    return ((scores > right) | (scores == right) & first).sum(1)


def _result(ranks: Tensor, labels: Tensor, classes: tuple[str, ...], top5: bool) -> Result:
    def error(ranks: Tensor, top: int = 1) -> float:
        return 100 * (ranks >= top).sum().item() / len(ranks)

    per_class = []
    for i, name in enumerate(classes):
        own = ranks[labels == i]
        if len(own):
            per_class.append({"class": name, "images": len(own), "top1_error": error(own)})
    return Result(len(ranks), error(ranks), error(ranks, 5) if top5 else None, per_class)
