"""Where weights come from: torchvision's enums, local checkpoints, and the paper's own ResNet-50 ("MSRA")."""

import argparse
import enum
import http.client
import json
import os
import re
import urllib.error
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..fetch import FetchError, fetch

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

WeightsArg = None | str | os.PathLike | enum.Enum

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
_LOCAL = (".pth", ".pt", ".safetensors")


class Source(NamedTuple):
    name: str
    model_kwargs: dict[str, Any]  # what the model's constructor must be given
    state_dict: Callable[[bool], dict[str, Tensor]]  # progress -> tensors


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


def resolve(model_name: str | None, weights: WeightsArg) -> Source | None:
    """What `weights` stands for, nothing loaded yet; None for None.

    Args:
        model_name: the model that will take them, or None where it is not known by name.
        weights: None; a torchvision enum member or its name ("IMAGENET1K_V2", "DEFAULT", "ResNet50_Weights.DEFAULT");
            the path of a .pth, .pt or .safetensors file; for resnet50 also "MSRA".

    Raises:
        ValueError: none of these, or weights of another model.
        FileNotFoundError: no file at that path.
        ImportError: an enum's name without torchvision.
    """
    if weights is None:
        return None
    if weights == "MSRA":
        if model_name not in (None, "resnet50"):
            raise ValueError(f"weights='MSRA' are those of resnet50, not of {model_name}")
        return Source("MSRA", {"num_classes": 1000, "stem": "caffe", "stride_in_1x1": True}, _msra)
    if isinstance(weights, enum.Enum):
        return _enum_source(_member(model_name, type(weights).__name__, weights.name, weights))
    if isinstance(weights, (str, os.PathLike)):
        path = Path(weights)
        if path.suffix.lower() in _LOCAL:
            if not path.is_file():
                raise FileNotFoundError(f"weights={str(weights)!r}: there is no such file")
            return Source(str(path), {}, lambda progress: _read(path))
        class_name, _, member = str(weights).rpartition(".")
        class_name = class_name or TORCHVISION_ENUMS.get(model_name or "", "")
        if isinstance(weights, str) and class_name in TORCHVISION_ENUMS.values() and member.isidentifier():
            return _enum_source(_member(model_name, class_name, member, weights))
    raise _unknown(model_name, weights)


def load_weights(model: nn.Module, weights: WeightsArg, progress: bool = True) -> None:
    """Load weights into an existing model, which is left as it was where they don't fit; None loads nothing.

    Args:
        model: any model with torchvision's keys.
        weights: as in `resnet50(weights=...)`; torchvision's by enum or full name ("ResNet50_Weights.IMAGENET1K_V2").
        progress: show a progress bar while weights are downloaded.

    Raises:
        ValueError: the weights don't fit the model, or not its stem or stride_in_1x1.
    """
    source = resolve(None, weights)
    if source is None:
        return
    for key, torchvisions in (("stem", "imagenet"), ("stride_in_1x1", False)):
        own = getattr(model, key, torchvisions)
        if own != (expected := source.model_kwargs.get(key, own)):
            raise ValueError(f"weights={weights!r} are those of a model with {key}={expected!r}, this one has {own!r}")
    load_state_dict(model, source.state_dict(progress), source.name)


def load_state_dict(model: nn.Module, state_dict: dict[str, Tensor], source: str) -> None:
    """Copy `state_dict` into the model's own tensors, whose memory layout stays.

    Everything is checked before the first copy. `num_batches_tracked` may be missing, as in checkpoints of old PyTorch.

    Args:
        source: where the tensors come from, for messages.

    Raises:
        ValueError: keys or shapes differ; the message names the first.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state_dict and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state_dict if k not in own]
    shapes = [
        f"{k} is {_shape(state_dict[k])}, the model's is {_shape(v)}"
        for k, v in own.items()
        if k in state_dict and _shape(state_dict[k]) != _shape(v)
    ]
    differ = [
        f"{what}: {_first(keys)}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("shape", shapes))
        if keys
    ]
    if differ:
        raise ValueError(f"weights {source} don't fit {type(model).__name__}: {'; '.join(differ)}")
    model.load_state_dict(state_dict, strict=False)


def _shape(value: Any) -> list[int] | str:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _first(items: list[str], count: int = 3) -> str:
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")


def _unknown(model_name: str | None, weights: Any) -> ValueError:
    if model_name is not None and model_name not in TORCHVISION_ENUMS:
        return ValueError(
            f"weights={weights!r}: none are published for {model_name}; accepted are None, or the path of a "
            f"{', '.join(_LOCAL)} file"
        )
    class_name = TORCHVISION_ENUMS.get(model_name or "resnet50", "ResNet50_Weights")
    names = "a full name such as" if model_name is None else "its name such as 'DEFAULT' or"
    msra = ", 'MSRA'" if model_name in (None, "resnet50") else ""
    return ValueError(
        f"weights={weights!r} is not known; accepted are None, a member of torchvision's {class_name}, "
        f"{names} '{class_name}.DEFAULT'{msra}, or the path of a {', '.join(_LOCAL)} file"
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
        raise ValueError(f"weights={weights!r}: {class_name} has {', '.join(members)}")
    return members[member]


def _enum_source(weights: "WeightsEnum") -> Source:
    def state_dict(progress: bool) -> dict[str, Tensor]:
        try:
            return weights.get_state_dict(progress=progress, check_hash=True)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, RuntimeError) as error:
            raise FetchError(f"cannot download {weights.url}: {error}; a local .pth file serves as well") from error

    kwargs = {"num_classes": len(weights.meta["categories"]), "stem": "imagenet", "stride_in_1x1": False}
    return Source(f"{type(weights).__name__}.{weights.name}", kwargs, state_dict)


def _read(path: Path) -> dict[str, Tensor]:
    """A checkpoint file as {key: tensor}; the wrappers of training scripts and DataParallel are taken off."""
    content: Any
    try:
        if path.suffix.lower() == ".safetensors":
            content = _read_safetensors(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the "args" of torchvision's training script
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ImportError):
        raise
    except Exception as error:  # on a broken file the unpickler raises whatever it comes across
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"weights {path} can't be read as a checkpoint of tensors: {reason[0]}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"weights {path} hold a {type(content).__name__}, expected a state_dict")
    if content and all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {path} needs safetensors: pip install safetensors", name="safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _msra(progress: bool) -> dict[str, Tensor]:
    folder = fetch("resnet50-msra", progress)
    try:
        layers = json.loads((folder / "model.json").read_text())
        (group,) = layers["weightsManifest"]
        data = bytearray().join((folder / path).read_bytes() for path in group["paths"])
        tensors = torch.frombuffer(data, dtype=torch.float32)
        shapes = {w["name"]: w["shape"] for w in group["weights"]}
        parts = tensors.split([torch.Size(shape).numel() for shape in shapes.values()])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"the cached weights in {folder} are damaged ({error}); delete that folder, they are then fetched anew"
        ) from error
    config = layers["modelTopology"]["model_config"]["config"]["layers"]
    return convert_keras(config, {k: t.view(s) for (k, s), t in zip(shapes.items(), parts, strict=True)})


def convert_keras(layers: list[dict[str, Any]], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keras' ResNet of the Caffe model (BGR on 0..255 less a mean, biased convolutions) as torchvision's state_dict.

    Args:
        layers: Keras' layer list, of which names and classes are read.
        tensors: "<layer>/<weight>" -> tensor; kernels are HWIO.
    """
    state: dict[str, Tensor] = {}
    bias: dict[str, Tensor] = {}  # of the convolution that a BN follows, in float64
    for layer in layers:
        name, kind = layer["name"], layer["class_name"]
        weight = {k.split("/")[1]: t for k, t in tensors.items() if k.startswith(f"{name}/")}
        if kind == "Conv2D":
            conv, bn = _torchvision_keys(name)
            kernel, bias[bn] = weight["kernel"].permute(3, 2, 0, 1), weight["bias"].double()
            if name == "conv1":
                kernel, shift = _stem(kernel)
                bias[bn] += shift
            state[f"{conv}.weight"] = kernel
        elif kind == "BatchNormalization":
            _, bn = _torchvision_keys(name)
            state[f"{bn}.weight"] = weight["gamma"]
            state[f"{bn}.bias"] = weight["beta"]
            state[f"{bn}.running_mean"] = (weight["moving_mean"].double() - bias[bn]).float()
            # for an epsilon of 1e-5, Caffe's and nn.BatchNorm2d's; the 1e-3 in the file is only Keras' default
            state[f"{bn}.running_var"] = weight["moving_variance"]
        elif kind == "Dense":
            state |= {"fc.weight": weight["kernel"].T, "fc.bias": weight["bias"]}
    return state


def _torchvision_keys(name: str) -> tuple[str, str]:
    """Keys of a convolution and its BN: res3b_branch2a and bn3b_branch2a are layer2.1.conv1 and layer2.1.bn1."""
    if name in ("conv1", "bn_conv1"):
        return "conv1", "bn1"
    match = re.fullmatch(r"(?:res|bn)(\d)([a-z])_branch(1|2[abc])", name)
    if match is None:
        raise ValueError(f"{name} is no layer of the Caffe model")
    stage, block, branch = match.groups()
    prefix = f"layer{int(stage) - 1}.{ord(block) - ord('a')}"
    if branch == "1":
        return f"{prefix}.downsample.0", f"{prefix}.downsample.1"
    i = "abc".index(branch[1]) + 1
    return f"{prefix}.conv{i}", f"{prefix}.bn{i}"


def _stem(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """BGR kernel [O, 3, 7, 7] on pixels less Caffe's mean -> RGB kernel on torchvision's input, and a bias [O]."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64) * 255
    caffe_mean = torch.tensor([123.68, 116.779, 103.939], dtype=torch.float64)
    rgb = kernel.double().flip(1)
    # exact but for the zero padding, which now stands for torchvision's mean: at most 0.5 of 255 off at the rim
    shift = torch.einsum("ochw,c->o", rgb, mean - caffe_mean)
    return (rgb * std.view(1, 3, 1, 1)).float(), shift
