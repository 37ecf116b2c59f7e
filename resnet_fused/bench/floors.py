"""The least time that a model's layers can take on a device, there or not: by its bandwidth and its matrix rate.

Of each layer the greater of its bytes over the bandwidth and its multiply-adds over the rate. Operands and results
count once, as in `ledger`; a convolution with a stride over its kernel meets its own pixels only.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from .. import models
from ..dispatch import registry
from .ceilings import Ceilings

DEVICES = {  # peak bandwidth and dense 16-bit rate, from the makers' data sheets
    "h200": Ceilings(4.8e12, 989e12),
    "h100": Ceilings(3.35e12, 989e12),
    "a100": Ceilings(2.04e12, 312e12),
}
SCHEMES = ("unfused", "epilogue apart", "fused", "unfused training")


@dataclass(frozen=True)
class Layer:
    """One convolution with what follows it; bytes and operations of one image."""

    name: str
    x: float  # bytes of the input that are met
    whole_x: float  # bytes of the whole input, whose gradient is written
    z: float  # bytes of the output
    weight: float  # bytes, shared among the batch
    flops: float
    joins: bool  # a residual is added to it
    shortcut: bool  # it is the residual's own projection
    first: bool  # its input needs no gradient

    def moved(self, scheme: str) -> list[tuple[float, float]]:
        """(bytes, operations) of every kernel that the scheme launches for the layer."""
        conv, z = (self.x + self.z + self.weight, self.flops), self.z
        if scheme == "fused":
            return [(conv[0] + self.joins * z, self.flops)]
        if scheme == "epilogue apart":  # a projection's BN is part of the block's end
            return [conv, *([] if self.shortcut else [((2 + self.joins) * z, 0.0)])]
        relu = not self.shortcut
        if scheme == "unfused":
            return [conv, (2 * z, 0.0), *self.joins * [(3 * z, 0.0)], *relu * [(2 * z, 0.0)]]
        forward = [conv, (3 * z, 0.0), *self.joins * [(3 * z, 0.0)], *relu * [(2 * z, 0.0)]]
        gradients = [conv, *(not self.first) * [(z + self.whole_x + self.weight, self.flops)]]
        return [*forward, *relu * [(3 * z, 0.0)], (5 * z, 0.0), *self.joins * [(3 * z, 0.0)], *gradients]


def layers(model: str, batch: int, itemsize: int = 2, image_size: int = 224) -> list[Layer]:
    """Of one of torchvision's names, in the order of the forward pass."""
    net = models.get_model(model, weights=None)
    found: list[Layer] = []
    modules = dict(net.named_modules())

    def hook(name: str, conv: nn.Conv2d):
        block = name.rpartition(".")[0]
        last = "conv3" if f"{block}.conv3" in modules else "conv2"

        def add(module: nn.Module, inputs: tuple, y: torch.Tensor) -> None:
            x, z = inputs[0].shape[1:].numel() * itemsize, y.shape[1:].numel()
            met = x
            for k, s in zip(conv.kernel_size, conv.stride, strict=True):
                met = met * k // s if k < s else met
            weight = conv.weight.numel() * itemsize / batch
            flops = 2.0 * z * conv.weight[0].numel()
            joins, shortcut = block != "" and name == f"{block}.{last}", "downsample" in name
            found.append(Layer(name, met, x, z * itemsize, weight, flops, joins, shortcut, not found))

        conv.register_forward_hook(add)

    for name, module in modules.items():
        if isinstance(module, nn.Conv2d):
            hook(name, module)
    with torch.no_grad(), registry.backend(registry.PLAIN):
        net.eval()(torch.empty(0, 3, image_size, image_size))
    return found


def pool(stem: Layer, scheme: str) -> Layer:
    """The max pooling behind the stem, as a layer."""
    steps = 2 if scheme.endswith("training") else 1
    return dataclasses.replace(stem, name="maxpool", x=steps * 1.25 * stem.z, z=0.0, weight=0.0, flops=0.0)


def seconds(layer: Layer, scheme: str, device: Ceilings) -> float:
    return sum(device.floor(*kernel) for kernel in layer.moved(scheme))


def totals(model: str, batch: int, device: Ceilings, scheme: str, image_size: int = 224) -> dict[str, float]:
    """Of one image: GFLOP, MB without the pooling, and the images a second that the floors, pooling and all, allow."""
    found = layers(model, batch, image_size=image_size)
    extra = pool(found[0], scheme)
    time = sum(seconds(layer, scheme, device) for layer in found) + device.floor(extra.x, 0.0)
    moved = sum(bytes_ for layer in found for bytes_, _ in layer.moved(scheme))
    return {"gflop": sum(layer.flops for layer in found) / 1e9, "mb": moved / 1e6, "images_per_s": 1 / time}
