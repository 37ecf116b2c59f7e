"""Interleaved timing: what slows a machine down for a while slows every variant down."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from . import nvml

ROUNDS, SECONDS = 10, 40.0  # unless asked otherwise; once the seconds are over, three rounds are enough
SHORT_MS = 20.0  # single calls up to here are timed too

Track = Callable[[Sequence[Any], str], Iterable[Any]]  # wraps a loop: (items, label) -> items


def silent(items: Sequence[Any], label: str) -> Iterable[Any]:
    return items


def time_rounds(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    min_sample_ms: float = 100.0,
    seconds: float = math.inf,
    track: Track = silent,
    energy: dict[str, float] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds a call, one sample a round; a round runs every call, and each round starts with another one.

    A call shorter than `min_sample_ms` is repeated within its sample. Once `seconds` are over, three rounds are enough.
    The calls must have run before. energy: takes the joules of each name's call, where the device counts them.
    """
    names = list(calls)
    repeats = {name: math.ceil(min_sample_ms / max(_sample_ms(calls[name], 1, device), 1e-3)) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    joules: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    for i in track(range(1, rounds + 1), "timing round") if names else ():
        if i > 3 and time.perf_counter() - began > seconds:
            break
        first = (i - 1) % len(names)
        for name in names[first:] + names[:first]:
            before = nvml.joules(device) if energy is not None else None
            samples[name].append(_sample_ms(calls[name], repeats[name], device))
            if energy is not None and before is not None:
                joules[name].append(((nvml.joules(device) or before) - before) / repeats[name])
    if energy is not None:
        energy |= {name: math.fsum(found) / len(found) for name, found in joules.items() if found}
    return samples


def paired_ratios(baseline_ms: Sequence[float], samples_ms: Sequence[float]) -> list[float]:
    """Speed against the baseline, round by round, so that what slows a whole round cancels; empty without either."""
    return [b / s for b, s in zip(baseline_ms, samples_ms, strict=True)] if baseline_ms and samples_ms else []


def latency(call: Callable[[], object], device: torch.device, calls: int = 100) -> list[float]:
    """The median and the 99th percentile of single calls, each awaited, in milliseconds; the call must have run."""
    found = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append((time.perf_counter() - began) * 1e3)
    return [statistics.median(found), statistics.quantiles(found, n=100, method="inclusive")[-1]]


def _sample_ms(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) * 1e3 / repeats


def peak_mib(call: Callable[[], object], held: int, device: torch.device) -> float | None:
    """Peak of PyTorch's allocator beyond what was held before the model was built; CPU memory has no such counter."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - held) / 2**20
