"""The ways of looking at an image: whole, the centre, ten crops, or whole at several scales."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import registry
from ..models import ResNet

SHORT_SIDE, CROP = 256, 224
SCALES = (224, 256, 384, 480, 640)  # He et al., https://arxiv.org/abs/1512.03385, section 3.4


class Views(NamedTuple):
    """What a network is shown of an image; the scores of all views are averaged."""

    name: str
    transform: Callable[[Any], list[Tensor]]  # PIL image or uint8 [3, H, W] -> uint8 [views, 3, h, w] for each size
    convolutional: bool = False  # the classifier is applied at every position


def _functional() -> Any:
    from torchvision.transforms.v2 import functional  # late: --help works without it

    return functional


def _single(image: Any) -> list[Tensor]:
    return [_functional().to_image(image)[None]]


class _Center:
    def __init__(self, resize: int, crop: int) -> None:
        self._resize, self._crop = resize, crop

    def __call__(self, image: Any) -> list[Tensor]:
        crop = _functional().center_crop(_functional().resize(image, [self._resize]), [self._crop])
        return [_functional().to_image(crop)[None]]


def center(resize: int, crop: int) -> Views:
    """The centre of an image whose short side is resized first."""
    return Views(f"center crop of {crop}, short side {resize}", _Center(resize, crop))


class _Resized:
    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, image: Any) -> list[Tensor]:
        return [_functional().to_image(_functional().resize(image, [self._size, self._size]))[None]]


def resized(size: int) -> Views:
    """The whole image, squeezed into a square."""
    return Views(f"the whole image, resized to {size} x {size}", _Resized(size))


def _ten_crops(image: Any) -> list[Tensor]:
    crops = _functional().ten_crop(_functional().resize(image, [SHORT_SIDE]), [CROP])
    return [torch.stack([_functional().to_image(crop) for crop in crops])]


SINGLE = Views("the whole image", _single)
CENTER = center(SHORT_SIDE, CROP)
TEN_CROPS = Views(f"10 crops of {CROP}, short side {SHORT_SIDE}", _ten_crops)


class _MultiScale:
    def __init__(self, scales: tuple[int, ...]) -> None:
        self._scales = scales

    def __call__(self, image: Any) -> list[Tensor]:
        whole = [_functional().to_image(_functional().resize(image, [scale])) for scale in self._scales]
        return [torch.stack((x, x.flip(-1))) for x in whole]


def multi_scale(scales: Sequence[int] = SCALES) -> Views:
    """The whole image, and mirrored, with its short side resized to each scale; see `fully_convolutional`.

    Raises:
        ValueError: a scale is below the crop that the network was trained on, or there is none.
    """
    if not scales or min(scales) < CROP:
        raise ValueError(f"scales must be short sides from {CROP} on, got {list(scales)}")
    return Views(f"fully convolutional, short sides {', '.join(map(str, scales))}", _MultiScale(tuple(scales)), True)


def fully_convolutional(model: ResNet, crop: int = CROP) -> ResNet:
    """The network for images of any size from `crop` on; parameters are shared with `model`, which stays as it was.

    Its pooling window is what a crop fills and moves over the image by one position of the last stage at a time; the
    linear layer becomes a 1x1 convolution, whose score map is averaged (Simonyan and Zisserman,
    https://arxiv.org/abs/1409.1556, section 3.2). On an image of crop x crop the scores are `model`'s.

    Args:
        model: one of this package's.
        crop: height and width of the images that it was trained on.

    Shape: [N, 3, H, W] -> [N, num_classes].
    """
    window: list[int] = []
    handle = model.avgpool.register_forward_pre_hook(lambda _, inputs: window.extend(inputs[0].shape[2:]))
    try:
        with torch.no_grad(), registry.backend(registry.PLAIN):
            model(next(model.parameters()).new_empty(0, 3, crop, crop))
    finally:
        handle.remove()
    height, width = window
    twin = copy.copy(model)
    twin._modules = {**model._modules, "avgpool": nn.AvgPool2d((height, width), stride=1), "fc": _ScoreMap(model.fc)}
    return twin


class _ScoreMap(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, channels * positions]."""
        x = x.unflatten(1, (self.linear.in_features, -1))
        return F.conv1d(x, self.linear.weight[:, :, None], self.linear.bias).mean(-1)
