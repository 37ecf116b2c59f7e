"""The CIFAR networks of He et al., "Deep Residual Learning for Image Recognition", section 4.2.

https://arxiv.org/abs/1512.03385: 6n + 2 layers, three stages of widths 16, 32 and 64, global pooling. Parameters and
errors on CIFAR-10 are in the paper's table 6. Those of bottlenecks, 9n + 2 layers, are the "original" networks of
"Identity Mappings in Deep Residual Networks", https://arxiv.org/abs/1603.05027, table 3.
"""

from typing import Any

from .blocks import BasicBlock, Bottleneck
from .network import ResNet, build
from .weights import WeightsArg


def _cifar(name: str, n: int, weights: WeightsArg, progress: bool, kwargs: dict[str, Any], **fixed: Any) -> ResNet:
    defaults = {"num_classes": 10} if fixed else {"num_classes": 10, "shortcut": "A"}
    fixed |= {"stem": "cifar", "widths": (16, 32, 64)}
    return build(name, ResNet, BasicBlock, [n] * 3, weights, progress, kwargs, defaults, **fixed)


def cifar_resnet20(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-20 for CIFAR, 0.27 M parameters, of https://arxiv.org/abs/1512.03385.

    Args:
        weights: None, or the path of a `.pth` or `.safetensors` file; none are published.
        progress: takes no effect here.
        **kwargs: of `ResNet`; by default num_classes=10 and shortcut="A", as in the paper.

    Shape: [N, 3, H, W] -> [N, num_classes]; in the paper H = W = 32.
    """
    return _cifar("cifar_resnet20", 3, weights, progress, kwargs)


def cifar_resnet32(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-32 for CIFAR, 0.46 M parameters; arguments and shapes as `cifar_resnet20`."""
    return _cifar("cifar_resnet32", 5, weights, progress, kwargs)


def cifar_resnet44(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-44 for CIFAR, 0.66 M parameters; arguments and shapes as `cifar_resnet20`."""
    return _cifar("cifar_resnet44", 7, weights, progress, kwargs)


def cifar_resnet56(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-56 for CIFAR, 0.85 M parameters; arguments and shapes as `cifar_resnet20`."""
    return _cifar("cifar_resnet56", 9, weights, progress, kwargs)


def cifar_resnet110(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-110 for CIFAR, 1.7 M parameters; arguments and shapes as `cifar_resnet20`."""
    return _cifar("cifar_resnet110", 18, weights, progress, kwargs)


def cifar_resnet1202(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-1202 for CIFAR, 19.4 M parameters; arguments and shapes as `cifar_resnet20`."""
    return _cifar("cifar_resnet1202", 200, weights, progress, kwargs)


def _bottlenecks(name: str, n: int, weights: WeightsArg, progress: bool, kwargs: dict[str, Any]) -> ResNet:
    defaults = {"num_classes": 10, "stride_in_1x1": True}
    fixed = {"stem": "cifar", "widths": (16, 32, 64)}
    return build(name, ResNet, Bottleneck, [n] * 3, weights, progress, kwargs, defaults, **fixed)


def cifar_resnet164(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-164 for CIFAR, of bottlenecks, 1.7 M parameters; arguments and shapes as `cifar_resnet20`.

    By default num_classes=10, projections where a stage changes the shape, and stride_in_1x1=True: the twin of
    `cifar_preact_resnet164`, with its units in the original order.
    """
    return _bottlenecks("cifar_resnet164", 18, weights, progress, kwargs)


def cifar_resnet1001(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-1001 for CIFAR, of bottlenecks, 10.3 M parameters; otherwise as `cifar_resnet164`."""
    return _bottlenecks("cifar_resnet1001", 111, weights, progress, kwargs)


def cifar_plain20(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """`cifar_resnet20` without shortcuts; arguments and shapes as there."""
    return _cifar("cifar_plain20", 3, weights, progress, kwargs, shortcut=None)


def cifar_plain32(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """`cifar_resnet32` without shortcuts; arguments and shapes as there."""
    return _cifar("cifar_plain32", 5, weights, progress, kwargs, shortcut=None)


def cifar_plain44(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """`cifar_resnet44` without shortcuts; arguments and shapes as there."""
    return _cifar("cifar_plain44", 7, weights, progress, kwargs, shortcut=None)


def cifar_plain56(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """`cifar_resnet56` without shortcuts; arguments and shapes as there."""
    return _cifar("cifar_plain56", 9, weights, progress, kwargs, shortcut=None)


def cifar_plain110(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """`cifar_resnet110` without shortcuts; arguments and shapes as there."""
    return _cifar("cifar_plain110", 18, weights, progress, kwargs, shortcut=None)
