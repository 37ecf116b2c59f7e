"""ResNet v1, ResNeXt and wide ResNet with torchvision's names, parameters and state_dict keys; the plain networks.

He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385;
Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", https://arxiv.org/abs/1611.05431;
Zagoruyko and Komodakis, "Wide Residual Networks", https://arxiv.org/abs/1605.07146.
"""

import warnings
from typing import Any

from .blocks import BasicBlock, Block, Bottleneck
from .blocks import conv1x1 as conv1x1
from .blocks import conv3x3 as conv3x3  # torchvision's module has both
from .network import ResNet, build
from .weights import WeightsArg


def _resnet(
    name: str,
    block: type[Block],
    layers: list[int],
    weights: WeightsArg | bool,
    progress: bool,
    kwargs: dict[str, Any],
    **fixed: Any,
) -> ResNet:
    if weights is None and "pretrained" in kwargs:  # torchvision's builders still take it, in weights' place too
        weights = bool(kwargs.pop("pretrained"))
    if isinstance(weights, bool):
        weights = "IMAGENET1K_V1" if weights else None
        warnings.warn(f"'pretrained' is deprecated; it stands for weights={weights!r}", UserWarning, stacklevel=3)
    return build(name, ResNet, block, layers, weights, progress, kwargs, **fixed)


def resnet18(weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18 of https://arxiv.org/abs/1512.03385.

    Args:
        weights: None, a torchvision weights enum or its name, a run's folder, or the path of a checkpoint.
        progress: show a progress bar while weights are downloaded.
        **kwargs: of `ResNet`.

    Shape: [N, 3, H, W] -> [N, num_classes].
    """
    return _resnet("resnet18", BasicBlock, [2, 2, 2, 2], weights, progress, kwargs)


def resnet34(weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34 of https://arxiv.org/abs/1512.03385; arguments and shapes as `resnet18`."""
    return _resnet("resnet34", BasicBlock, [3, 4, 6, 3], weights, progress, kwargs)


def resnet50(weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 (v1.5) of https://arxiv.org/abs/1512.03385; arguments and shapes as `resnet18`.

    `weights="MSRA"` is the paper's own model, converted from its Caffe release; it implies `stem="caffe"` and
    `stride_in_1x1=True`.
    """
    return _resnet("resnet50", Bottleneck, [3, 4, 6, 3], weights, progress, kwargs)


def resnet101(weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 (v1.5) of https://arxiv.org/abs/1512.03385; arguments and shapes as `resnet18`."""
    return _resnet("resnet101", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs)


def resnet152(weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152 (v1.5) of https://arxiv.org/abs/1512.03385; arguments and shapes as `resnet18`."""
    return _resnet("resnet152", Bottleneck, [3, 8, 36, 3], weights, progress, kwargs)


def resnext50_32x4d(weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50 32x4d of https://arxiv.org/abs/1611.05431; arguments and shapes as `resnet18`."""
    return _resnet("resnext50_32x4d", Bottleneck, [3, 4, 6, 3], weights, progress, kwargs, groups=32, width_per_group=4)


def resnext101_32x8d(weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101 32x8d of https://arxiv.org/abs/1611.05431; arguments and shapes as `resnet18`."""
    return _resnet(
        "resnext101_32x8d", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs, groups=32, width_per_group=8
    )


def resnext101_64x4d(weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101 64x4d of https://arxiv.org/abs/1611.05431; arguments and shapes as `resnet18`."""
    return _resnet(
        "resnext101_64x4d", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs, groups=64, width_per_group=4
    )


def wide_resnet50_2(weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-50-2 of https://arxiv.org/abs/1605.07146; arguments and shapes as `resnet18`."""
    return _resnet("wide_resnet50_2", Bottleneck, [3, 4, 6, 3], weights, progress, kwargs, width_per_group=128)


def wide_resnet101_2(weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-101-2 of https://arxiv.org/abs/1605.07146; arguments and shapes as `resnet18`."""
    return _resnet("wide_resnet101_2", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs, width_per_group=128)


def plain18(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """`resnet18` without shortcuts, the plain network of https://arxiv.org/abs/1512.03385; no weights are published."""
    return _resnet("plain18", BasicBlock, [2, 2, 2, 2], weights, progress, kwargs, shortcut=None)


def plain34(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """`resnet34` without shortcuts, the plain network of https://arxiv.org/abs/1512.03385; no weights are published."""
    return _resnet("plain34", BasicBlock, [3, 4, 6, 3], weights, progress, kwargs, shortcut=None)
