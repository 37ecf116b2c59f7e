"""Table 1 of https://arxiv.org/abs/1512.03385, read off the models."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..dispatch import registry
from ..models.costs import count
from .experiments import Network

SIZE = 224
PAPER = {18: 1.8, 34: 3.6, 50: 3.8, 101: 7.6, 152: 11.3}  # 10^9 multiply-adds
_STAGES = {
    "conv1": "relu",
    "max pool, conv2_x": "layer1",
    "conv3_x": "layer2",
    "conv4_x": "layer3",
    "conv5_x": "layer4",
}


def table(networks: list[Network]) -> list[dict[str, Any]]:
    """A row a stage: its output's size, and what every network has there; then the head, and the multiply-adds."""
    columns = {network.label: _column(network) for network in networks}
    first = next(iter(columns.values()))
    return [
        {"layer name": stage, "output size": size} | {label: column[stage][1] for label, column in columns.items()}
        for stage, (size, _) in first.items()
    ]


def _column(network: Network) -> dict[str, tuple[str, str]]:
    """Of every row: the output's size and what the network has there."""
    with torch.device("meta"):
        model = models.get_model(network.model, **network.kwargs)
    sizes = _sizes(models.get_model(network.model, **network.kwargs))
    column = {"conv1": (sizes["relu"], f"{_convolution(model.conv1)}, stride {model.conv1.stride[0]}")}
    for name, module in list(_STAGES.items())[1:]:
        stage = getattr(model, module)
        inside = [m for key, m in stage[-1].named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in key]
        column[name] = (sizes[module], f"[{', '.join(map(_convolution, inside))}] x {len(stage)}")
    column["average pool, fc"] = (sizes["avgpool"], str(model.fc.out_features))
    column["10^9 FLOPs"] = ("", f"{count(model, SIZE)[1] / 1e9:.2f} (paper: {PAPER[network.depth]})")
    return column


def _convolution(m: Any) -> str:
    return f"{m.kernel_size[0]}x{m.kernel_size[1]} {m.out_channels}"


def _sizes(model: nn.Module) -> dict[str, str]:
    """Height and width of what the stem, the stages and the pooling give for an image of 224 x 224."""
    found: dict[str, str] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, y: Tensor) -> None:
            found[name] = "x".join(map(str, y.shape[2:]))

        return hook

    handles = [getattr(model, name).register_forward_hook(watch(name)) for name in (*_STAGES.values(), "avgpool")]
    try:
        with torch.no_grad(), registry.backend(registry.PLAIN):
            model.eval()(torch.empty(0, 3, SIZE, SIZE))  # no images: shapes alone
    finally:
        for handle in handles:
            handle.remove()
    return found
