"""`bench --suite traffic` and `memory`: the ledger of a forward pass and of a train step beside torchvision's.

Nothing runs and nothing is timed: the figures are the same on every machine.
"""

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models
from .conditions import conditions
from .ledger import Counting, Ledger, counted
from .report import aligned

RECOMPUTE = (None, "activations", "blocks")
RIVAL, OURS = "torchvision-nhwc", "resnet_fused"
BATCH = 256


def built(library: Any, name: str, dtype: torch.dtype, recompute: str | None = None) -> nn.Module:
    """A model of a library with `get_model`, in channels_last."""
    model = library.get_model(name, weights=None, **({"recompute": recompute} if recompute else {}))
    for module in model.modules():  # nn.Module.to would swap fake parameters, which something refers to
        for held in (module._parameters, module._buffers):
            for key, t in held.items():
                if t is not None and t.is_floating_point():
                    layout = torch.channels_last if t.dim() == 4 else torch.preserve_format
                    cast = t.detach().to(dtype, memory_format=layout)
                    held[key] = nn.Parameter(cast) if isinstance(t, nn.Parameter) else cast
    return model


def images(batch: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(batch, 3, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)


def forward(library: Any, name: str, batch: int, dtype: torch.dtype, image_size: int = 224) -> Ledger:
    """Of a forward pass in eval mode, weights and images in the dtype.

    Raises:
        RuntimeError: as `counted`.
    """
    with counted() as counting, torch.no_grad():
        model, x = built(library, name, dtype).eval(), images(batch, image_size, dtype)
        model(x)  # decides, and leaves plans
        _begin(counting)
        model(x)
    return counting.ledger


def train_step(
    library: Any, name: str, batch: int, dtype: torch.dtype, image_size: int = 224, recompute: str | None = None
) -> Ledger:
    """Of forward, cross-entropy, backward and SGD with momentum; float32 weights, under autocast in half precision.

    Raises:
        RuntimeError: as `counted`.
    """
    with counted() as counting:
        model = built(library, name, torch.float32, recompute).train()
        x, labels = images(batch, image_size, torch.float32), torch.empty(batch, dtype=torch.long)
        counting.set_apart((*model.parameters(), *model.buffers(), x, labels))
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, foreach=True)
        low = dtype != torch.float32
        for _ in range(2):  # in the first the momentum is made
            optimizer.zero_grad()
            counting.set_apart(p for state in optimizer.state.values() for p in state.values() if p is not None)
            _begin(counting)
            with torch.autocast("cpu", dtype) if low else contextlib.nullcontext():
                loss = F.cross_entropy(model(x), labels)
            counting.ledger.saved = counting.kept()
            loss.backward()
            optimizer.step()
            del loss
    return counting.ledger


def _begin(counting: Counting) -> None:
    counting.ledger = Ledger(peak=counting.alive)


def name_of(recompute: str | None) -> str:
    """The variant that a mode is."""
    return f"{OURS}+{recompute}" if recompute else OURS


def rows(model: str, batch: int, dtype: torch.dtype, image_size: int = 224) -> Iterator[dict[str, Any]]:
    """A row for each pass and variant: bytes read and written, launches, bytes saved for backward, peak, operators.

    Raises:
        RuntimeError: as `counted`.
        ImportError: torchvision is missing.
    """
    theirs = importlib.import_module("torchvision").models
    settings = (model, batch, dtype, image_size)
    yield _row("forward", RIVAL, forward(theirs, *settings))
    yield _row("forward", OURS, forward(models, *settings))
    yield _row("train step", RIVAL, train_step(theirs, *settings))
    for mode in RECOMPUTE:
        yield _row("train step", name_of(mode), train_step(models, *settings, recompute=mode))


def _row(step: str, variant: str, ledger: Ledger) -> dict[str, Any]:
    totals = {name: getattr(ledger, name) for name in ("launches", "read", "written", "saved", "peak")}
    return {"pass": step, "variant": variant, **totals, "operators": {n: asdict(e) for n, e in ledger.entries.items()}}


def measure(task: str, model: str, batch: int, dtype: str, image_size: int = 224) -> dict[str, Any]:
    """The rows, printed as the suite shows them, under their conditions; task: "traffic" or "memory"."""
    found = list(rows(model, batch, getattr(torch, dtype), image_size))
    print(f"{model} {task}, {batch} x 3 x {image_size} x {image_size}, {dtype}: counted, the same on every machine\n")
    print("\n".join(aligned(list((_traffic if task == "traffic" else _memory)(found, batch)))))
    print("\nresnet_fused as Triton serves it; MB are 10^6 bytes, MiB 2^20; ratios to " + RIVAL)
    settings = {"model": model, "batch": batch, "dtype": dtype, "image_size": image_size}
    return {"task": task, **settings, "conditions": conditions(torch.device("cpu")), "rows": found}


def _traffic(found: list[dict[str, Any]], batch: int) -> Iterator[tuple[str, ...]]:
    yield "pass", "MB/image read", "written", "ratio", "launches", "variant"
    for row in found:
        rival = next(r for r in found if r["pass"] == row["pass"])
        ratio = (row["read"] + row["written"]) / (rival["read"] + rival["written"])
        moved = (f"{row[way] / batch / 1e6:.1f}" for way in ("read", "written"))
        yield row["pass"], *moved, f"{ratio:.2f}", str(row["launches"]), row["variant"]


def _memory(found: list[dict[str, Any]], batch: int) -> Iterator[tuple[str, ...]]:
    yield "pass", "MiB/image saved", "ratio", "peak MiB", "ratio", "variant"
    for row in found:
        rival = next(r for r in found if r["pass"] == row["pass"])
        saved = ("-", "-")
        if rival["saved"]:
            saved = f"{row['saved'] / batch / 2**20:.1f}", f"{row['saved'] / rival['saved']:.2f}"
        yield row["pass"], *saved, f"{row['peak'] / 2**20:.0f}", f"{row['peak'] / rival['peak']:.2f}", row["variant"]
