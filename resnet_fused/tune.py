"""Time what can serve each convolution of a model on this device, and keep the winners."""

from typing import Any

import torch
from torch import Tensor, nn

from .dispatch import fastest, registry, speed
from .dispatch.speed import Timer, cuda_timer
from .graphs import trains


def tune(model: nn.Module, x: Tensor, timer: Timer = cuda_timer) -> dict[str, dict[str, Any]]:
    """Run the eval-mode model on x, time every verified candidate for each convolution, and remember the fastest.

    Later calls of these shapes on this device take the winner, in this process and in later ones: it is kept in a JSON
    file of the cache folder (RESNET_FUSED_HOME).

    Args:
        model: in eval mode.
        x: [N, 3, H, W] on the model's device.
        timer: times one launch, in milliseconds; by default with CUDA events.

    Returns:
        {layer shape: {"backend", "config", "ms", "candidates"}}, the fastest of `candidates` for every layer shape.

    Raises:
        ValueError: the model is in train mode, x is not on a CUDA device and no timer is given, or nothing is fused
            there.
    """
    if trains(model):
        raise ValueError("model must be in eval mode to be tuned: only that runs the convolutions that are timed")
    if timer is cuda_timer and not x.is_cuda:
        raise ValueError(f"x must be on a CUDA device to be timed, got {x.device}")
    if not registry.fuses(x.device):
        raise ValueError(f"nothing is fused on {x.device} under backend {registry.get_backend()!r}: nothing to tune")
    found: dict[str, dict[str, Any]] = {}

    def listen(op: str, choice: registry.Choice, call: Any) -> None:
        problem = call.problem() if call else None
        if problem is not None and problem not in found and call[0].numel():
            found[problem] = fastest(call, timer)

    with registry.heard_by(listen), torch.no_grad():
        model(x)
    for key, entry in found.items():
        if entry["backend"] is not None:
            speed.remember(x.device, key, entry)
    return found
