"""Time what can serve each convolution of a model on this device, and keep the winners."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _registry, _tuned
from .graphs import trains
from .ops.conv_bn_act import backends, reference

Timer = Callable[[Callable[[], Any]], float]  # a launch -> milliseconds


def _cuda_timer(launch: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return do_bench(launch, warmup=5, rep=20, return_mode="median")


def tune(model: nn.Module, x: Tensor, timer: Timer = _cuda_timer) -> dict[str, dict[str, Any]]:
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
    if timer is _cuda_timer and not x.is_cuda:
        raise ValueError(f"x must be on a CUDA device to be timed, got {x.device}")
    if not _registry.fuses(x.device):
        raise ValueError(f"nothing is fused on {x.device} under backend {_registry.get_backend()!r}: nothing to tune")
    found: dict[str, dict[str, Any]] = {}

    def listen(op: str, choice: _registry.Choice, args: tuple) -> None:
        if op == "conv_bn_act" and args and backends.key(args) not in found and args[0].numel():
            found[backends.key(args)] = _fastest(args, timer)

    previous, _registry.listener = _registry.listener, listen
    try:
        with torch.no_grad():
            model(x)
    finally:
        _registry.listener = previous
    for key, entry in found.items():
        if entry["backend"] is not None:
            _tuned.remember(x.device, key, entry)
    return found


def _fastest(args: tuple, timer: Timer) -> dict[str, Any]:
    x, weight, _, *vectors, _, _, _, _, _, _, relu = args
    times: list[tuple[float, str, backends.Config]] = []
    for backend in _registry.candidates(x.device, backends.shape_class(weight)):
        if _registry.unavailable(backend, x.device) or backends.supported(backend, x, weight, tuple(vectors), relu):
            continue
        for config in backends.configs(backend, args):
            with warnings.catch_warnings():  # a candidate that does not fit this device is no news here
                warnings.simplefilter("ignore")
                wrong = backends.refused(backend, args, config, reference)
            if wrong is None:
                times.append((timer(lambda b=backend, c=config: backends.launch(b, args, c)), backend, config))
    ms, backend, config = min(times, key=lambda t: t[0], default=(None, None, None))
    return {"backend": backend, "config": config, "ms": ms, "candidates": len(times)}
