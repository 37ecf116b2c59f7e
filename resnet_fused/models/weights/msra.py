"""The paper's own ResNet-50 ("MSRA"), converted from the Caffe model that was published for Keras."""

import json
import re
from typing import Any

import torch
from torch import Tensor

from ...fetch import damaged, fetch
from ..features import IMAGENET_MEAN, IMAGENET_STD


def load(progress: bool) -> dict[str, Tensor]:
    folder = fetch("resnet50-msra", progress)
    try:
        layers = json.loads((folder / "model.json").read_text())
        (group,) = layers["weightsManifest"]
        data = bytearray().join((folder / path).read_bytes() for path in group["paths"])
        tensors = torch.frombuffer(data, dtype=torch.float32)
        shapes = {w["name"]: w["shape"] for w in group["weights"]}
        parts = tensors.split([torch.Size(shape).numel() for shape in shapes.values()])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise damaged(folder, error) from error
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
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=torch.float64) * 255
    caffe_mean = torch.tensor([123.68, 116.779, 103.939], dtype=torch.float64)
    rgb = kernel.double().flip(1)
    # exact but for the zero padding, which now stands for torchvision's mean: at most 0.5 of 255 off at the rim
    shift = torch.einsum("ochw,c->o", rgb, mean - caffe_mean)
    return (rgb * std.view(1, 3, 1, 1)).float(), shift
