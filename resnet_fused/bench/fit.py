"""`bench --suite training --fit 24GiB`: the cheapest recompute mode, and its largest batch, that fits a memory.

The peak is counted, as `ledger` does: weights, gradients, momentum, what is kept for backward, and what a step holds
for a moment. What is not in it: the CUDA context, cuDNN's workspaces, and the allocator's rounding.
"""

import argparse
import re
from typing import Any

import torch

from .. import models
from .conditions import conditions
from .report import aligned
from .timing import peak_mib
from .traffic import RECOMPUTE, name_of, train_step

LEAST = 2  # images: a BN in training needs two values a channel
_UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}


def memory(text: str) -> int:
    """Bytes, of "24GiB"."""
    found = re.fullmatch(r"([\d.]+) ?([MG]i?B)", text)
    try:
        value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    except ValueError:
        value = 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no memory: a number and one of {', '.join(_UNITS)}, as 24GiB")
    return int(value)


def largest_batch(model: str, dtype: torch.dtype, image_size: int, mode: str | None, budget: int) -> tuple[int, int]:
    """The largest batch whose train step fits, and its peak in bytes; 0 and the peak of the least where none does."""

    found: dict[int, int] = {}

    def fit(batch: int) -> bool:
        found[batch] = train_step(models, model, batch, dtype, image_size, mode).peak
        return found[batch] <= budget

    fits, over = LEAST, 0
    if not fit(fits):
        return 0, found[fits]
    while over - fits != 1:
        guess = 2 * fits
        if len(found) > 1:  # the peak is nearly a straight line
            (a, at_a), (b, at_b) = sorted(found.items())[-2:]
            guess = a + int((budget - at_a) * (b - a) / (at_b - at_a))
        guess = max(guess, fits + 1)
        guess = min(guess, over - 1) if over else guess
        fits, over = (guess, over) if fit(guess) else (fits, guess)
    return fits, found[fits]


def measure(model: str, budget: int, dtype: str, batch: int | None, image_size: int, device: torch.device) -> dict:
    """Print the modes and name the one to take; "fits" says whether there is one.

    Args:
        budget: bytes.
        batch: that has to fit; without it the mode is named that needs least time, with its largest batch.
    """
    modes: list[dict[str, Any]] = []
    for mode in RECOMPUTE:
        largest, peak = largest_batch(model, getattr(torch, dtype), image_size, mode, budget)
        modes.append({"recompute": mode, "largest_batch": largest, "peak": peak})
    chosen = next((m for m in modes if m["largest_batch"] >= (batch or 1)), None)
    table = [("mode", "largest batch", "peak MiB", "")]
    table += [(name_of(m["recompute"]), str(m["largest_batch"]), f"{m['peak'] / 2**20:.0f}", "") for m in modes]
    print(f"{model} training, {image_size} x {image_size}, {dtype}, in {budget / 2**30:.2f} GiB, counted\n")
    print("\n".join(line.rstrip() for line in aligned(table)))
    found: dict[str, Any] = {"task": "fit", "model": model, "dtype": dtype, "image_size": image_size, "batch": batch}
    found |= {"budget": budget, "conditions": conditions(device), "modes": modes, "chosen": chosen}
    if chosen is None:
        print(f"\nno mode fits {batch or 'any'} images")
        return found | {"fits": False}
    images = batch or chosen["largest_batch"]
    print(f"\ntake recompute={chosen['recompute']!r}: up to {chosen['largest_batch']} images")
    found["fits"] = True
    if device.type == "cuda":
        found["measured_peak"] = peak = run(model, dtype, images, image_size, chosen["recompute"], device)
        found["fits"] = peak <= budget
        print(f"a run with {images} images took {peak / 2**20:.0f} MiB: {'fits' if found['fits'] else 'does not fit'}")
    return found


def run(model: str, dtype: str, batch: int, image_size: int, mode: str | None, device: torch.device) -> int:
    """Bytes that PyTorch's allocator took at most for two train steps."""
    net = models.get_model(model, weights=None, recompute=mode).to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
    x, labels = torch.randn(batch, 3, image_size, image_size, device=device), torch.zeros(batch, device=device).long()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, getattr(torch, dtype), dtype != "float32"):
            loss = torch.nn.functional.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()

    step()
    return int((peak_mib(step, 0, device) or 0) * 2**20)
