"""Augmentation: a batch's crops and flips on its device, transforms of single images, mixtures of a batch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

PAD = 4
RESIZE, CROP = 256, 224  # the short side and the centre that a network is tested on


def crop_flip(x: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Every image padded by `PAD` zeros, cropped to its size at its own offset, and mirrored where its flip is set.

    v2's crops and flips are the same for a whole batch.

    Args:
        x: [N, C, H, W].
        offsets: int64 [N, 2], row and column between 0 and 2 * PAD.
        flips: bool [N].

    Returns:
        [N, C, H, W] in channels_last.
    """
    n, _, h, w = x.shape
    column = torch.arange(w, device=x.device)
    rows = offsets[:, :1] + torch.arange(h, device=x.device)  # [N, H]
    columns = offsets[:, 1:] + torch.where(flips[:, None], column.flip(0), column)  # [N, W]
    image = torch.arange(n, device=x.device)[:, None, None]
    padded = F.pad(x, (PAD,) * 4).permute(0, 2, 3, 1)
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Lighting(v2.Transform):
    """AlexNet's colour augmentation: shifts along the principal components of ImageNet's colours.

    Krizhevsky et al., 2012, section 4.1; the components are those that fb.resnet.torch publishes for colours in [0, 1].
    """

    eigenvalues = (0.2175, 0.0188, 0.0045)
    eigenvectors = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

    def make_params(self, flat_inputs: list[Tensor]) -> dict[str, Tensor]:
        alpha = torch.randn(3) * 0.1
        return {"shift": torch.tensor(self.eigenvectors) @ (alpha * torch.tensor(self.eigenvalues))}

    def transform(self, inpt: Tensor, params: dict[str, Tensor]) -> Tensor:
        return inpt + params["shift"][:, None, None]


class Normalise(v2.Transform):
    """PIL image or uint8 tensor -> float32 [3, H, W], scaled to [0, 1], less mean, over std: [3, 1, 1] or [3, H, W].

    Args:
        lighting: shift the colours first, see `Lighting`.
    """

    def __init__(self, mean: Tensor, std: Tensor, lighting: bool = False) -> None:
        super().__init__()
        steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        self._scale = v2.Compose([*steps, Lighting()] if lighting else steps)
        self._mean, self._std = mean, std

    def forward(self, image: Any) -> Tensor:
        return (self._scale(image) - self._mean) / self._std


def scale_jitter() -> list[v2.Transform]:
    """The first paper's: the short side drawn from [256, 480], a crop of 224, a flip."""
    sides = list(range(RESIZE, 481))
    return [v2.RandomShortestSize(sides), v2.RandomCrop(CROP), v2.RandomHorizontalFlip()]


def resized_crop() -> list[v2.Transform]:
    """Inception's: 8 to 100 % of the image, its sides 3:4 to 4:3, resized to 224, and a flip."""
    return [v2.RandomResizedCrop(CROP), v2.RandomHorizontalFlip()]


def pad_crop() -> list[v2.Transform]:
    """`crop_flip` of one small image of any size."""
    return [_PadCrop(), v2.RandomHorizontalFlip()]


def center_crop() -> list[v2.Transform]:
    """Short side 256, the centre 224."""
    return [v2.Resize(RESIZE), v2.CenterCrop(CROP)]


def rand_augment(magnitude: int) -> list[v2.Transform]:
    """RandAugment's two operations of a strength from 0 to 10, https://arxiv.org/abs/1909.13719."""
    return [v2.RandAugment(2, magnitude, num_magnitude_bins=11)] if magnitude else []


class _PadCrop(v2.Transform):
    def forward(self, image: Any) -> Any:
        return v2.RandomCrop(v2.functional.get_size(image), padding=PAD)(image)


class Mix:
    """Mixup or CutMix of a batch with itself, https://arxiv.org/abs/1710.09412 and 1905.04899: one of both, evenly.

    Args:
        mixup, cutmix: of their Beta distributions; 0: never.
        num_classes: outputs of the network.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int) -> None:
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self._choices = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]

    def __call__(self, x: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """x: [N, 3, H, W], labels: int64 [N] -> the same shape in channels_last, and float32 [N, num_classes]."""
        if not self._choices:
            return x, labels
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            x, labels = v2.RandomChoice(self._choices)(x, labels)
        return x.contiguous(memory_format=torch.channels_last), labels
