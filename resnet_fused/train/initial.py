"""Where a run's weights come from when they are not drawn, and which of them stay as they are."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..models import ResNet, get_model, weights
from . import checkpoint
from .batches import IMAGENET, Normalization
from .recipes import Settings


class Initial(NamedTuple):
    """Weights to start from."""

    name: str  # for messages
    model_kwargs: dict[str, Any]  # of the model that they are of, without num_classes
    state_dict: dict[str, Tensor]
    normalization: Normalization | None = None  # of the images that they were trained on, where that is known
    classes: list[str] | None = None  # likewise


def run_of(init: str | None) -> dict[str, Any] | None:
    """The checkpoint, where `init` is a run's folder or its checkpoint.pt; see `checkpoint.read`."""
    if init is None:
        return None
    path = Path(init)
    return checkpoint.read(path) if path.is_dir() or path.name == checkpoint.NAME else None


def read(settings: Settings, progress: bool = True) -> Initial | None:
    """The weights that `settings.init` names: a run, or whatever `weights=` of the model takes; None for None.

    Raises:
        ValueError: they are of another model, or can't be read.
        FileNotFoundError, FetchError, ImportError: they are not there; of `weights.resolve`.
    """
    if settings.init is None:
        if settings.freeze is not None:
            raise ValueError(f"freeze={settings.freeze!r} keeps the weights of init, which names none")
        return None
    if run := run_of(settings.init):
        if run["model"] != settings.model:
            raise ValueError(f"init={settings.init!r} is a run of {run['model']}, model is {settings.model}")
        kwargs = {key: value for key, value in run["model_kwargs"].items() if key != "num_classes"}
        found = Initial(settings.init, kwargs, run["state_dict"], (run["mean"], run["std"]), run["classes"])
    else:
        source = weights.resolve(settings.model, settings.init)
        assert source is not None
        kwargs = {key: value for key, value in source.model_kwargs.items() if key != "num_classes"}
        found = Initial(source.name, kwargs, source.state_dict(progress), IMAGENET if source.published else None)
    for key, value in settings.model_kwargs.items():
        if key in found.model_kwargs and found.model_kwargs[key] != value:
            own = found.model_kwargs[key]
            raise ValueError(f"init={found.name!r} is of a model with {key}={own!r}, model_kwargs have {value!r}")
    return found


def load(model: ResNet, initial: Initial, classes: list[str]) -> str | None:
    """Copy the weights into the model; where its classes are others, its classifier stays as it was drawn.

    Args:
        classes: of the data.

    Returns:
        A line that says so.

    Raises:
        ValueError: the weights are not the model's.
    """
    state, head = dict(initial.state_dict), dict(model.fc.state_dict(prefix="fc."))
    outputs = len(state["fc.weight"]) if isinstance(state.get("fc.weight"), Tensor) else 0
    line = None
    if outputs != model.fc.out_features:
        line = f"{initial.name} has {outputs} classes, the model {model.fc.out_features}"
    elif initial.classes is not None and initial.classes != classes:
        line = f"{initial.name} has the classes {_some(initial.classes)}, the data {_some(classes)}"
    weights.load_state_dict(model, state | head if line else state, initial.name)
    return line and f"{line}: the classifier is drawn anew"


def model_kwargs(settings: Settings, start: Initial | None, classes: int) -> dict[str, Any]:
    """The arguments of the model, which gets an output for every class of the data unless it is to have more.

    Raises:
        ValueError: it would have fewer.
    """
    kwargs = {"num_classes": classes, **(start.model_kwargs if start else {}), **settings.model_kwargs}
    if kwargs["num_classes"] < classes:
        raise ValueError(f"num_classes is {kwargs['num_classes']}, and {settings.data} has {classes}")
    return kwargs


def make_model(
    settings: Settings, kwargs: dict[str, Any], start: Initial | None, classes: list[str]
) -> tuple[ResNet, str | None]:
    """The network with the weights to start from, in train mode but for what is frozen; and the line of `load`.

    Raises:
        ValueError: the model does not take these arguments, nor these weights, or has no such part to freeze.
    """
    try:
        model = get_model(settings.model, **kwargs)
    except TypeError as error:
        raise ValueError(f"{settings.model} does not take model_kwargs={settings.model_kwargs}: {error}") from None
    line = load(model, start, classes) if start else None
    if settings.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.train()
    for module in freeze(model, settings.freeze):
        module.eval()
    return model, line


def freeze(model: ResNet, last: str | None) -> list[nn.Module]:
    """Keep the weights of the stem and of the stages up to `last` from being trained.

    Args:
        last: "stem", "layer1", and so on; "backbone": all but the classifier; None: nothing is kept.

    Returns:
        The modules, which belong in eval mode: their BN's statistics stay too.

    Raises:
        ValueError: the model has no such part.
    """
    if last is None:
        return []
    children = dict(model.named_children())
    parts = ["stem", *(name for name in children if name.startswith("layer")), "backbone"]
    if last not in parts:
        raise ValueError(f"freeze must be one of {', '.join(parts)}, got {last!r}")
    names = [name for name in children if name != "fc"]
    if last == "stem":
        names = names[: names.index("layer1")]
    elif last != "backbone":
        names = names[: names.index(last) + 1]
    kept = [children[name] for name in names]
    for module in kept:
        module.requires_grad_(False)
    return kept


def _some(classes: list[str]) -> str:
    return json.dumps(classes[:3], ensure_ascii=False)[1:-1] + " ..." * (len(classes) > 3)
