"""Where weights come from: torchvision's enums, checkpoints, runs of `train`, the paper's own ResNet-50 ("MSRA")."""

import enum
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from . import files
from .fit import describe, load_state_dict
from .msra import convert_keras
from .msra import load as _msra
from .published import TORCHVISION_ENUMS, cached_file, tensors, torchvision_enum, torchvision_models

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

__all__ = [
    "TOPOLOGY",
    "TORCHVISION_ENUMS",
    "Source",
    "WeightsArg",
    "cached_file",
    "convert_keras",
    "describe",
    "load_state_dict",
    "load_weights",
    "resolve",
    "torchvision_enum",
    "torchvision_models",
]

WeightsArg = None | str | os.PathLike | enum.Enum
TOPOLOGY = ("stem", "shortcut", "stride_in_1x1")  # what tensors don't tell: networks note it beside their state_dict
_TORCHVISIONS = {"stem": "imagenet", "shortcut": "B", "stride_in_1x1": False}


class Source(NamedTuple):
    name: str
    model_kwargs: dict[str, Any]  # what the model's constructor must be given
    state_dict: Callable[[bool], dict[str, Tensor]]  # progress -> tensors
    published: bool = False  # for ImageNet, by torchvision or the paper's authors
    member: "WeightsEnum | None" = None  # of torchvision's enum
    run: dict[str, Any] | None = None  # the checkpoint of a run of resnet-fused train


def resolve(model_name: str | None, weights: "WeightsArg | Source") -> Source | None:
    """What `weights` stands for; files are read at once, nothing is downloaded yet. None for None.

    Args:
        model_name: the model that will take them, or None where it is not known by name.
        weights: None; a torchvision enum member or its name ("IMAGENET1K_V2", "DEFAULT", "ResNet50_Weights.DEFAULT");
            for resnet50 also "MSRA"; a run's folder; or the path of a checkpoint (.pth, .pt, .safetensors, .ckpt, .bin,
            .pth.tar), as PATH::KEY where it holds several state_dicts, such as "last.pth.tar::state_dict_ema".

    Raises:
        ValueError: none of these, weights of another model, or a file that can't be read.
        FileNotFoundError: no file at that path.
        ImportError: an enum's name without torchvision.
    """
    if weights is None or isinstance(weights, Source):
        return weights
    if isinstance(weights, str) and weights == "MSRA":
        if model_name not in (None, "resnet50"):
            raise ValueError(f"weights='MSRA' are those of resnet50, not of {model_name}")
        kwargs = {"num_classes": 1000, "stem": "caffe", "stride_in_1x1": True}
        return Source("MSRA", kwargs, lambda progress: _msra(progress), published=True)
    if isinstance(weights, enum.Enum):
        return _published(_member(model_name, type(weights).__name__, weights.name, weights))
    if isinstance(weights, (str, os.PathLike)):
        if found := files.find(weights):
            return _file(model_name, os.fspath(weights), *files.read(*found))
        class_name, _, member = str(weights).rpartition(".")
        class_name = class_name or TORCHVISION_ENUMS.get(model_name or "", "")
        if isinstance(weights, str) and class_name in TORCHVISION_ENUMS.values() and member.isidentifier():
            return _published(_member(model_name, class_name, member, weights))
    raise _unknown(model_name, weights)


def load_weights(model: nn.Module, weights: WeightsArg, progress: bool = True) -> None:
    """Load weights into an existing model, which is left as it was where they don't fit; None loads nothing.

    Args:
        model: any model with torchvision's keys.
        weights: as in `resnet50(weights=...)`; torchvision's by enum or full name ("ResNet50_Weights.IMAGENET1K_V2").
        progress: show a progress bar while weights are downloaded.

    Raises:
        ValueError: the weights don't fit the model, or not its stem, shortcut or stride_in_1x1.
    """
    source = resolve(None, weights)
    if source is None:
        return
    other = not source.published and describe(source.state_dict(progress)) != describe(model.state_dict())
    for key, torchvisions in () if other else _TORCHVISIONS.items():  # of others load_state_dict says what they are
        own = getattr(model, key, torchvisions)
        if own != (expected := source.model_kwargs.get(key, own)):
            raise ValueError(
                f"weights={str(weights)!r} are those of a model with {key}={expected!r}, this one has {own!r}"
            )
    load_state_dict(model, source.state_dict(progress), source.name)


def _file(model_name: str | None, name: str, state: dict[str, Tensor], content: dict[str, Any]) -> Source:
    run = content if content.get("format") == files.RUN_FORMAT else None
    if run and model_name not in (None, run["model"]):
        raise ValueError(f"weights={name!r} are a run of {run['model']}, not of {model_name}")
    classifier = state.get("fc.weight")
    kwargs = {"num_classes": len(classifier)} if isinstance(classifier, Tensor) else {}
    kwargs |= files.notes(state, TOPOLOGY) | (run["model_kwargs"] if run else {})
    return Source(name, kwargs, lambda progress: state, run=run)


def _unknown(model_name: str | None, weights: Any) -> ValueError:
    file = f"a run's folder, or the path of a {', '.join(files.NAMES)} file"
    if model_name is not None and model_name not in TORCHVISION_ENUMS:
        return ValueError(f"weights={weights!r}: none are published for {model_name}; accepted are None, {file}")
    class_name = TORCHVISION_ENUMS.get(model_name or "resnet50", "ResNet50_Weights")
    names = "a full name such as" if model_name is None else "its name such as 'DEFAULT' or"
    msra = ", 'MSRA'" if model_name in (None, "resnet50") else ""
    return ValueError(
        f"weights={weights!r} is not known; accepted are None, a member of torchvision's {class_name}, "
        f"{names} '{class_name}.DEFAULT'{msra}, {file}"
    )


def _member(model_name: str | None, class_name: str, member: str, weights: Any) -> "WeightsEnum":
    if model_name is not None and model_name not in TORCHVISION_ENUMS:
        raise _unknown(model_name, weights)
    expected = TORCHVISION_ENUMS.get(model_name or "")
    if expected and class_name != expected:
        raise ValueError(f"weights={weights!r} are of {class_name}; {model_name} takes {expected}")
    if class_name not in TORCHVISION_ENUMS.values():
        raise _unknown(model_name, weights)
    members = torchvision_enum(class_name).__members__
    if member not in members:
        msra = "; beside them there is 'MSRA'" if class_name == "ResNet50_Weights" else ""
        raise ValueError(f"weights={weights!r}: {class_name} has {', '.join(members)}{msra}")
    return members[member]


def _published(weights: "WeightsEnum") -> Source:
    kwargs = {"num_classes": len(weights.meta["categories"]), "stem": "imagenet", "stride_in_1x1": False}
    name = f"{type(weights).__name__}.{weights.name}"
    return Source(name, kwargs, lambda progress: tensors(weights, progress), published=True, member=weights)
