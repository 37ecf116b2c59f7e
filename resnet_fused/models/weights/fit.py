"""Whether tensors are a model's, and what they are where they aren't."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {  # by whether there are bottlenecks, and the blocks of every stage
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
_WIDTHS: dict[tuple[int, ...], str] = {  # by the shape of the first 3x3 convolution
    (64, 64): "resnet{}",
    (128, 128): "wide_resnet{}_2",
    (128, 4): "resnext{}_32x4d",
    (256, 8): "resnext{}_32x8d",
    (256, 4): "resnext{}_64x4d",
}
_FOREIGN = {  # parts of timm's ResNets that no model here has, by a key
    "conv1.0.weight": "a deep stem",
    "layer1.0.downsample.2.weight": "pooling in the shortcuts",
    "layer1.0.se.fc1.weight": "squeeze-and-excitation",
    "layer1.0.se.conv.weight": "channel attention",
}
_COUNTER = "num_batches_tracked"
_LARGEST = 2.64  # of torchvision's normalised images: (1 - 0.406) / 0.225


def load_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Copy `state_dict` into the model's own tensors, whose memory layout stays.

    Everything is checked before the first copy. `num_batches_tracked` may be missing, as in checkpoints of old PyTorch,
    or be too much, as for torchvision's `FrozenBatchNorm2d`.

    Args:
        source: where the tensors come from, for messages.

    Raises:
        ValueError: keys or shapes differ, and what the tensors are where that is known; or they take images in 0..255.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state_dict and not k.endswith(_COUNTER)]
    counters = {k.removesuffix("running_mean") + _COUNTER for k in own if k.endswith("running_mean")}
    unexpected = [k for k in state_dict if k not in own and k not in counters]
    shapes = [
        f"{k} is {_shape(state_dict[k])}, the model's is {_shape(v)}"
        for k, v in own.items()
        if k in state_dict and _shape(state_dict[k]) != _shape(v)
    ]
    differ = {w: ks for w, ks in (("missing", missing), ("unexpected", unexpected), ("shape", shapes)) if ks}
    if differ:
        what = "; ".join(f"{what}: {_first(keys)}" for what, keys in differ.items())
        if hint := _hint(state_dict, own):
            first, keys = next(iter(differ.items()))
            what = f"{hint} ({first}: {_first(keys, 1)})"
        raise ValueError(f"weights {source} don't fit {type(model).__name__}: {what}")
    if _of_raw_images(state_dict):
        raise ValueError(
            f"weights {source} take a Caffe model's images, in 0..255 (BN's first running_var is larger than "
            "normalised ones can make it); of resnet50, weights='MSRA' is that model, converted"
        )
    model.load_state_dict(state_dict, strict=False)


def describe(state: Mapping[str, Any]) -> str | None:
    """The model whose keys and shapes these are, e.g. "resnet34"; None where it is none of this package's families."""
    stages: dict[int, set[str]] = {}
    for key in state:
        parts = key.split(".")
        if parts[0].startswith("layer") and parts[0][5:].isdigit() and len(parts) > 2:
            stages.setdefault(int(parts[0][5:]), set()).add(parts[1])
    stem, first = _sizes(state, "conv1.weight"), _sizes(state, "layer1.0.conv2.weight")
    if not stages or len(stem) != 4 or len(first) != 4:
        return None
    blocks, bottleneck = tuple(len(stages[i]) for i in sorted(stages)), "layer1.0.conv3.weight" in state
    order = "preact_" if "norm.weight" in state else ""
    small = stem[-1] == 3
    if len(blocks) == 3:
        return f"cifar_{order}resnet{(3 if bottleneck else 2) * sum(blocks) + 2}"
    depth, family = _DEPTHS.get((bottleneck, blocks)), _WIDTHS.get(first[:2])
    if depth is None or family is None:
        return None
    return order + family.format(depth) + " with CIFAR's 3x3 stem (stem='cifar')" * small


def _hint(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> str | None:
    if parts := [part for key, part in _FOREIGN.items() if key in state and key not in own]:
        return f"they have {' and '.join(parts)}, as timm's; build timm's model and hand it to resnet_fused.fuse"
    given, model = describe(state), describe(own)
    if given is None and model is not None and not any(key in own for key in state):
        return f"their keys are not torchvision's, but {_first(list(state), 2)}"
    if given is not None and model is not None and given != model:
        return f"they are of {given}, the model is {model}"
    if len(_sizes(state, "fc.weight")) == len(_sizes(own, "fc.weight")) == 2:
        classes, outputs = len(state["fc.weight"]), len(own["fc.weight"])
        if classes != outputs:
            return f"they have {classes} classes, the model {outputs}; build it with num_classes={classes}"
    if not any(key.endswith("running_mean") for key in state) and any(key.endswith("running_mean") for key in own):
        return "they have no BN statistics, as of GroupNorm; build the model with that norm_layer"
    return None


def _of_raw_images(state: Mapping[str, Tensor]) -> bool:
    """Whether a converted Caffe model, which counts no batches, saw images in 0..255.

    What a filter gives of images of magnitude m is at most m times its weights' magnitudes, and so is its deviation.
    """
    if any(key.endswith("num_batches_tracked") for key in state):
        return False
    weight, var = state.get("conv1.weight"), state.get("bn1.running_var")
    if not isinstance(weight, Tensor) or not isinstance(var, Tensor) or weight.shape[1:] != (3, 7, 7):
        return False
    most = _LARGEST * weight.double().abs().sum((1, 2, 3))
    return bool(torch.any(var.double().sqrt() > 2 * most))


def _sizes(state: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = state.get(key)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _shape(value: Any) -> list[int] | str:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _first(items: list[str], count: int = 3) -> str:
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")
