"""The models, under torchvision's names: `import resnet_fused.models as models` replaces `torchvision.models`."""

import fnmatch
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

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
    cifar_resnet164,
    cifar_resnet1001,
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

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

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
        cifar_resnet164,
        cifar_resnet1001,
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
    "get_model_builder",
    "get_model_weights",
    "get_weight",
    "list_models",
    "load_weights",
    *_BUILDERS,
]


Patterns = str | Iterable[str] | None


def list_models(module: ModuleType | None = None, include: Patterns = None, exclude: Patterns = None) -> list[str]:
    """The names that `get_model` takes, family by family.

    Args:
        module: as torchvision's: only the models that this module has.
        include: shell patterns such as "cifar_*", one or several; names that match any of them; by default all.
        exclude: likewise, of names that are left out.
    """

    def matches(name: str, patterns: Patterns) -> bool:
        patterns = [patterns] if isinstance(patterns, str) else patterns or ()
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    included = [n for n in _BUILDERS if (include is None or matches(n, include)) and not matches(n, exclude)]
    return included if module is None else [n for n in included if hasattr(module, n)]


def get_model(name: str, **kwargs: Any) -> ResNet:
    """The model of that name, e.g. `get_model("resnet50", num_classes=10)`; ValueError for an unknown name."""
    return get_model_builder(name)(**kwargs)


def get_model_builder(name: str) -> Callable[..., ResNet]:
    """The function that builds the model of that name, e.g. `resnet50`; ValueError for an unknown name."""
    if name.lower() not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}; there are: {', '.join(_BUILDERS)}")
    return _BUILDERS[name.lower()]


def get_model_weights(name: str | Callable[..., ResNet]) -> "type[WeightsEnum]":
    """torchvision's enum of the weights of a model, e.g. `ResNet50_Weights` for "resnet50" or the function `resnet50`.

    Raises:
        ValueError: an unknown name, or a model of which none are published.
        ImportError: torchvision is missing.
    """
    builder = get_model_builder(name if isinstance(name, str) else name.__name__)
    if builder.__name__ not in TORCHVISION_ENUMS:
        raise ValueError(
            f"no weights are published for {builder.__name__}; there are of {', '.join(TORCHVISION_ENUMS)}"
        )
    return torchvision_enum(TORCHVISION_ENUMS[builder.__name__])


def get_weight(name: str) -> "WeightsEnum":
    """The member of torchvision's enum of that full name, e.g. "ResNet50_Weights.IMAGENET1K_V2".

    Raises:
        ValueError: another name.
        ImportError: torchvision is missing.
    """
    class_name, _, member = name.partition(".")
    if class_name not in TORCHVISION_ENUMS.values():
        known = ", ".join(TORCHVISION_ENUMS.values())
        raise ValueError(f"weight must be a full name such as 'ResNet50_Weights.DEFAULT', of {known}; got {name!r}")
    members = torchvision_enum(class_name).__members__
    if member not in members:
        raise ValueError(f"weight {name!r}: {class_name} has {', '.join(members)}")
    return members[member]


def __getattr__(name: str) -> Any:
    if name in TORCHVISION_ENUMS.values():  # ResNet50_Weights and its kin are torchvision's own
        return torchvision_enum(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
