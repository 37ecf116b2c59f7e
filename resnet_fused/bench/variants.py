"""The variants of a model: their names, and what each makes of it."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..deploy import deploy
from ..deploy.engines import ENGINES as PEERS
from ..dispatch import registry
from ..graphs import graphed

Run = Callable[[Tensor], Tensor]

TORCHVISION = ("torchvision-nchw", "torchvision-nhwc", "torchvision-compile")
FREEZING, DEPLOY = "torchvision-freezing", "resnet_fused+deploy"
COMPILED: dict[str, dict[str, Any]] = {
    "torchvision-compile": {},
    "resnet_fused+compile": {},
    FREEZING: {"options": {"freezing": True}},
    "torchvision-compile+graph": {"mode": "reduce-overhead"},
    "torchvision-max-autotune": {
        "options": {
            "max_autotune": True,
            "coordinate_descent_tuning": True,
            "triton.cudagraphs": True,
            "freezing": True,
        }
    },
}
GRAPHED = ("torchvision-nhwc+graph", "torchvision-compile+graph", "resnet_fused+graph")
INFERENCE_ONLY = (*GRAPHED, "torchvision-max-autotune", FREEZING, DEPLOY, *PEERS)
TRAINING_ONLY = ("resnet_fused+activations", "resnet_fused+blocks")  # what `recompute` leaves out
VARIANTS = (
    *(*TORCHVISION, "resnet_fused", "resnet_fused+compile", *(f"resnet_fused-{name}" for name in registry.BACKENDS)),
    *(*INFERENCE_ONLY, *TRAINING_ONLY),
)
FUSED = {  # with --fuse the variants are other people's models as they are, and fused
    name: name.replace("torchvision", "original").replace("resnet_fused", "fused")
    for name in VARIANTS
    if name not in TRAINING_ONLY
}


def default_variants(device: torch.device, suite: str = "inference") -> tuple[str, ...]:
    """torchvision's, this package's, every further backend that is there and serves, on the CPU the peers installed."""
    backends = registry.apart_from_auto(device)
    if suite == "training":
        backends = [name for name in backends if registry.serves(name, "batch_norm_act")]
    ours = ("resnet_fused", "resnet_fused+compile", *(f"resnet_fused-{name}" for name in backends))
    if suite == "training":
        return (*TORCHVISION, *ours)
    if device.type != "cpu":
        return (*TORCHVISION, *ours, DEPLOY)
    return (*TORCHVISION, FREEZING, *ours, DEPLOY, *(p for p in PEERS if importlib.util.find_spec(p)))


def is_ours(name: str) -> bool:
    """Of this package, or another's model fused by it."""
    return name.startswith(("resnet_fused", "fused"))


def made(name: str, net: nn.Module, x: Tensor) -> Run:
    """What the variant calls in place of the model.

    Raises:
        BackendUnavailable: it can't be had on this device or in this dtype.
    """
    if name in GRAPHED and x.device.type != "cuda":
        raise registry.BackendUnavailable(f"CUDA graphs need a CUDA device, this is {x.device}")
    if name in COMPILED:
        return torch.compile(net, dynamic=False, **COMPILED[name])
    if name in GRAPHED:
        return graphed(net, x)
    if name == DEPLOY:
        return deploy(net, x)
    return PEERS[name](net, x) if name in PEERS else net
