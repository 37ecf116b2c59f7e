"""What a device reaches at most, measured in the same run as what is held against it."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .timing import time_rounds

ROUNDS, SAMPLE_MS = 7, 5.0


@dataclass(frozen=True)
class Ceilings:
    bytes_per_s: float  # reads and writes of a device copy
    flops_per_s: float  # of a large matrix product

    def floor(self, moved: float, flops: float) -> float:
        """Seconds: the greater of moving everything once and multiplying everything."""
        return max(moved / self.bytes_per_s, flops / self.flops_per_s)


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of a few short samples."""
    call()
    return statistics.median(time_rounds({"": call}, ROUNDS, device, min_sample_ms=SAMPLE_MS)[""])


def measured(dtype: torch.dtype, device: torch.device) -> Ceilings:
    elements, n = (2**29, 8192) if device.type == "cuda" else (2**24, 512)
    source = torch.zeros(elements, dtype=torch.uint8, device=device)
    target, a = torch.empty_like(source), torch.randn(n, n, device=device, dtype=dtype)
    copy = milliseconds(lambda: target.copy_(source), device)
    return Ceilings(2e3 * elements / copy, 2e3 * n**3 / milliseconds(lambda: a @ a, device))
