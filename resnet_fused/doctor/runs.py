"""Whole models: a cold start, and what `auto` gains over eager end to end."""

import contextlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .. import models
from ..bench.timing import time_rounds
from ..dispatch import registry
from . import process

Row = dict[str, Any]
_START = """
import time
began = time.perf_counter()
import torch, resnet_fused
model = resnet_fused.resnet50().eval().to("{device}", torch.float16)
x = torch.randn(1, 3, {size}, {size}, device="{device}", dtype=torch.float16)
ready = time.perf_counter()
with torch.no_grad():
    model(x).sum().item()
print(ready - began, time.perf_counter() - ready)
"""


def cold_start(device: torch.device, size: int) -> Row:
    """Seconds of the first ResNet-50 forward pass of a process, with empty caches and with full ones."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"RESNET_FUSED_HOME": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        found: Row = {}
        for name in ("cold", "warm"):
            try:
                printed = process.run("-c", _START.format(device=device, size=size), **caches)
            except RuntimeError as error:
                return {"wrong": str(error)}
            setup, forward = map(float, printed.split()[-2:])
            found |= {f"{name}_s": forward, f"{name}_setup_s": setup}
    return found


def end_to_end(device: torch.device, batch: int, size: int, training: bool) -> Row:
    """Images a second of ResNet-50 by `auto` and by eager, in float16, or a train step under autocast."""
    row: Row = {"batch": batch, "training": training}
    try:
        calls = {name: _call(device, batch, size, training, name) for name in (registry.PLAIN, "auto")}
        for call in calls.values():
            call(), call()
        samples = time_rounds(calls, 3, device, min_sample_ms=50.0)
    except torch.OutOfMemoryError:
        return row | {"wrong": "out of memory"}
    best = {name: min(found) for name, found in samples.items()}
    speed = {f"{name}_img_s": batch / ms * 1e3 for name, ms in best.items()}
    return row | speed | {"gain": best[registry.PLAIN] / best["auto"]}


def _call(device: torch.device, batch: int, size: int, training: bool, backend: str) -> Callable[[], None]:
    model = models.resnet50().to(device).train(training)
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.zeros(batch, dtype=torch.long, device=device)
    if not training:
        model, x = model.half(), x.half()

    def call() -> None:
        with registry.backend(backend), contextlib.nullcontext() if training else torch.no_grad():
            if not training:
                model(x)
                return
            model.zero_grad()
            with torch.autocast(device.type, torch.float16):
                loss = F.cross_entropy(model(x), target)
            loss.backward()

    return call
