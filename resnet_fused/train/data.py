"""Data sets by name: CIFAR-10 and synthetic images in memory, folders in ImageNet's layout on disk."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..dispatch.store import cache_dir
from ..fetch import cached, damaged, fetch

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
KINDS = "cifar10, cifar10:FOLDER, imagefolder:FOLDER, synthetic, synthetic:COUNT or synthetic:COUNTxSIZE"
_SYNTHETIC = re.compile(r"synthetic(?::(\d+)(?:x(\d+))?)?")


class Images(NamedTuple):
    """A split held in memory."""

    images: Tensor  # uint8 [N, 3, H, W]
    labels: Tensor  # int64 [N]
    classes: tuple[str, ...]


def load(name: str, split: str = "train") -> "Images | ImageFolder":
    """One split of a data set.

    Args:
        name: "cifar10", what `resnet-fused fetch cifar10` brings, fetched where it is missing; "cifar10:FOLDER",
            torchvision's cifar-10-batches-py in that folder; "imagefolder:FOLDER", images as train/CLASS/* and
            val/CLASS/*; "synthetic:COUNTxSIZE", ten classes of noisy patterns, COUNT training images and a quarter as
            many test images (default: 4096x32).
        split: "train" or "test"; an image folder's "test" is its val/.

    Returns:
        `Images`, or for an image folder torchvision's `ImageFolder`; both have `classes`.

    Raises:
        ValueError: another name or split.
        FileNotFoundError, FetchError: the data are not there; the message says how to get them.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    kind, _, rest = name.partition(":")
    if kind == "cifar10":
        return _cifar10_folder(Path(rest), split) if rest else _cifar10(split)
    if kind == "imagefolder" and rest:
        return _image_folder(Path(rest), split)
    if match := _SYNTHETIC.fullmatch(name):
        return _synthetic(int(match[1] or 4096), int(match[2] or 32), split)
    raise ValueError(f"data must be {KINDS}; got {name!r}")


def image_size(name: str) -> int | None:
    """Height and width of a data set's images, where all have the same: see `load`."""
    if name.partition(":")[0] == "cifar10":
        return 32
    return int(match[2] or 32) if (match := _SYNTHETIC.fullmatch(name)) else None


class Loader:
    """A DataLoader whose workers' ValueErrors are the one line that says what was wrong, not their whole traceback."""

    def __init__(self, samples: Dataset, **options: Any) -> None:
        # its own generator: how often batches are begun leaves the process's random numbers as they are
        self._batches = DataLoader(samples, generator=torch.Generator().manual_seed(0), **options)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._batches
        except ValueError as error:
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def hold_out(data: Images, count: int) -> tuple[Images, Images]:
    """The images without `count` that are drawn once and for all, whatever the seed of the run, and those `count`."""
    if not 0 < count < len(data.labels):
        raise ValueError(f"holdout must lie between 1 and {len(data.labels) - 1} images, got {count}")
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))
    parts = order[count:].sort().values, order[:count].sort().values
    kept, held_out = (Images(data.images[part], data.labels[part], data.classes) for part in parts)
    return kept, held_out


def check_classes(name: str, train: Sequence[str], test: Sequence[str]) -> None:
    """Both splits of an image folder number their own classes: the same number has to be the same class.

    Raises:
        ValueError: a class is in one of both only.
    """
    lacks = [
        f"{split}/ lacks {', '.join(map(repr, missing[:3]))}{' and more' * (len(missing) > 3)}"
        for split, missing in (("train", sorted({*test} - {*train})), ("val", sorted({*train} - {*test})))
        if missing
    ]
    if lacks:
        raise ValueError(f"{name} must have the same classes in train/ and val/: {'; '.join(lacks)}")


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> float32, scaled to [0, 1], minus mean, over std; both [3, 1, 1] or [3, H, W]."""
    return (images / 255 - mean) / std


def _cifar10(split: str) -> Images:
    folder = cached("cifar10")
    if folder is None:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir() / "cifar10.lock"):  # one of torchrun's processes fetches
            folder = fetch("cifar10")
    try:
        content = torch.load(folder / "cifar10.pt", weights_only=True)
        return Images(content[f"{split}_images"], content[f"{split}_labels"], CIFAR10_CLASSES)
    except Exception as error:  # the unpickler fails in many ways
        raise damaged(folder, error) from error


def _cifar10_folder(folder: Path, split: str) -> Images:
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(folder, train=split == "train")
    except RuntimeError as error:  # missing, or another checksum
        raise FileNotFoundError(f"no whole cifar-10-batches-py lies in {folder}: {error}") from None
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor(data.targets), tuple(data.classes))


def _image_folder(folder: Path, split: str) -> "ImageFolder":
    from torchvision.datasets import ImageFolder

    part = folder / ("train" if split == "train" else "val")
    if not part.is_dir():
        raise FileNotFoundError(f"imagefolder:{folder} needs the folders train/CLASS and val/CLASS; there is no {part}")
    return ImageFolder(str(part), loader=_open)


def _open(path: str) -> Any:
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image {path} can't be read: {error}") from None


def _synthetic(count: int, size: int, split: str) -> Images:
    """A coarse pattern for each class under a third as much noise."""
    if count < 40 or size < 8:
        raise ValueError(f"synthetic data take at least 40 images of 8 x 8, got {count} of {size} x {size}")
    generator = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randint(0, 192, (10, 3, 4, 4), generator=generator).float(), size=(size, size))
    if split == "test":
        count //= 4
        generator.manual_seed(1)
    labels = torch.arange(count) % 10
    noise = torch.randint(0, 64, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return Images(patterns.byte()[labels] + noise, labels, tuple(f"pattern {i}" for i in range(10)))
