"""The models, under torchvision's names: `import resnet_fused.models as models` replaces `torchvision.models`."""

from typing import Any

from .blocks import BasicBlock, Bottleneck
from .cifar import (
    cifar_plain20,
    cifar_plain32,
    cifar_plain44,
    cifar_plain56,
    cifar_plain110,
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
    cifar_resnet1202,
)
from .preact import (
    PreActBasicBlock,
    PreActBottleneck,
    PreActResNet,
    cifar_preact_resnet110,
    cifar_preact_resnet164,
    cifar_preact_resnet1001,
    preact_resnet18,
    preact_resnet34,
    preact_resnet50,
    preact_resnet101,
    preact_resnet152,
    preact_resnet200,
)
from .resnet import (
    ResNet,
    plain18,
    plain34,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .weights import TORCHVISION_ENUMS, load_weights, torchvision_enum

_BUILDERS = {
    builder.__name__: builder
    for builder in (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        resnext50_32x4d,
        resnext101_32x8d,
        resnext101_64x4d,
        wide_resnet50_2,
        wide_resnet101_2,
        plain18,
        plain34,
        cifar_resnet20,
        cifar_resnet32,
        cifar_resnet44,
        cifar_resnet56,
        cifar_resnet110,
        cifar_resnet1202,
        cifar_plain20,
        cifar_plain32,
        cifar_plain44,
        cifar_plain56,
        cifar_plain110,
        preact_resnet18,
        preact_resnet34,
        preact_resnet50,
        preact_resnet101,
        preact_resnet152,
        preact_resnet200,
        cifar_preact_resnet110,
        cifar_preact_resnet164,
        cifar_preact_resnet1001,
    )
}

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActResNet",
    "ResNet",
    "get_model",
    "list_models",
    "load_weights",
    *_BUILDERS,
]


def list_models() -> list[str]:
    """The names that `get_model` takes."""
    return list(_BUILDERS)


def get_model(name: str, **kwargs: Any) -> ResNet:
    """The model of that name, e.g. `get_model("resnet50", num_classes=10)`; ValueError for an unknown name."""
    if name not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}; there are: {', '.join(_BUILDERS)}")
    return _BUILDERS[name](**kwargs)


def __getattr__(name: str) -> Any:
    if name in TORCHVISION_ENUMS.values():  # ResNet50_Weights and its kin are torchvision's own
        return torchvision_enum(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
