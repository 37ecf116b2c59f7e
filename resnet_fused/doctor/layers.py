"""Every kind of layer of a ResNet-50: the microseconds of eager and of each backend, and the device's own floor."""

from typing import Any

import torch
from torch import Tensor

from .. import models
from ..dispatch import measured, registry, speed
from ..ops.conv_bn_act import Call, out_shape
from ..ops.stem import Call as Stem
from ..ops.stem import flops as stem_flops
from ..ops.stem import out_shape as stem_shape

Row = dict[str, Any]
_GEMM, _COPY_BYTES = 8192, 2**29


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device itself reaches: a copy's GB/s, read and write, and the TFLOP/s of a large product in float16."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(_GEMM, _GEMM, device=device, dtype=torch.float16) for _ in range(2))
    found = speed.measure({"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}, device)
    return {
        "copy_gb_s": 2 * _COPY_BYTES / found["copy"] / 1e3,
        "gemm_tflop_s": 2 * _GEMM**3 / found["gemm"] / 1e6,
    }


def rows(device: torch.device, batch: int, size: int, limits: dict[str, float], training: bool) -> list[Row]:
    """Every kind of layer in float16, or under autocast in training: microseconds by backend, and how often it runs.

    A convolution also has its `floor_us`: the time of its least traffic or of its products at the device's ceilings.
    """
    model = models.resnet50().to(device).train(training)
    x = torch.randn(batch, 3, size, size, device=device)
    calls: dict[str, Any] = {}
    counts: dict[str, int] = {}

    def listen(op: str, choice: registry.Choice, call: Any) -> None:
        layer = call.layer_class() if call else None
        if layer is not None:
            calls.setdefault(layer, call)
            counts[layer] = counts.get(layer, 0) + 1

    with registry.heard_by(listen), torch.no_grad() if not training else torch.autocast(device.type, torch.float16):
        (model if training else model.half())(x if training else x.half())
    found = []
    for layer, call in calls.items():
        row = {"layer": layer, "layers": counts[layer], "us": measured(call)}
        found.append(row | ({"floor_us": _floor(call, limits)} if isinstance(call, Call | Stem) else {}))
    return found


def _floor(call: Call | Stem, limits: dict[str, float]) -> float:
    if isinstance(call, Stem):
        results = torch.Size(stem_shape(call.x, call.weight)).numel()
        flops = stem_flops(call.x.shape, call.weight.shape)
    else:
        results = torch.Size(out_shape(call.x, call.weight, call.stride, call.padding, call.dilation)).numel()
        flops = 2 * results * call.weight[0].numel()
    size = sum(t.numel() * t.element_size() for t in call if isinstance(t, Tensor))
    size += results * call.weight.element_size()
    return max(size / limits["copy_gb_s"] / 1e3, flops / limits["gemm_tflop_s"] / 1e6)
