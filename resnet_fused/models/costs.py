"""Parameters and multiply-adds of every model, counted on the models themselves."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..dispatch import registry
from . import get_model, list_models
from .weights import torchvision_models


def count(model: nn.Module, image_size: int) -> tuple[int, int]:
    """Parameters, and the convolutions' and linear layers' multiply-adds for one image [3, image_size, image_size].

    Args:
        model: one on the meta device; it is left in eval mode, without its BN.
    """
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            vars(m)["forward"] = nn.Identity()  # on the meta device BN is a hundred calls of Python, and no FLOP
    x = torch.empty(1, 3, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad(), registry.backend(registry.PLAIN):
        model.eval()(x)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def table() -> list[dict[str, Any]]:
    """One row a model, with its constructor's arguments; VGG-16 and VGG-19 from torchvision where it is there.

    The papers' ResNet-50, 101 and 152 have the stride on the first 1x1 convolution: rows of their own.
    """
    models: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in list_models()]
    last = models.index(("resnet152", {}))
    models[last + 1 : last + 1] = [(f"resnet{depth}", {"stride_in_1x1": True}) for depth in (50, 101, 152)]
    rows = [_row(name, get_model, kwargs, 32 if name.startswith("cifar") else 224) for name, kwargs in models]
    try:
        torchvision = torchvision_models()
    except ImportError:
        return rows
    return rows + [_row(name, torchvision.get_model, {}, 224) for name in ("vgg16", "vgg19")]


def _row(name: str, build: Callable[..., nn.Module], kwargs: dict[str, Any], image_size: int) -> dict[str, Any]:
    with torch.device("meta"):
        model = build(name, **kwargs)
    parameters, multiply_adds = count(model, image_size)
    return {
        "model": name,
        "arguments": kwargs,
        "image_size": image_size,
        "parameters": parameters,
        "multiply_adds": multiply_adds,
    }
