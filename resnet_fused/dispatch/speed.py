"""What is fastest on this device: the winners that `tune` found by layer shape, and what a layer's first use measured.

At the first use of a layer class on a GPU (`serve.timed`) the default configuration of every trusted backend and eager
itself are timed, and the microseconds are kept. RESNET_FUSED_CALIBRATE=off leaves it to the table of guesses, `full`
times every configuration as `tune` does.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import plans, registry
from .store import Store

Launch = Callable[[], Any]
Timer = Callable[[Launch], float]  # a launch -> milliseconds, as Triton has them
MODES = ("auto", "off", "full")  # of RESNET_FUSED_CALIBRATE
_TIMED_DEVICES = ("cuda",)
_ROUNDS, _ROUND_US, _SLOW_US = 3, 2000.0, 2000.0  # a slow launch is timed once
_stores: dict[tuple[str, torch.device], Store] = {}


def mode() -> str:
    """RESNET_FUSED_CALIBRATE, "auto" where it is not set.

    Raises:
        ValueError: it is neither "auto" nor "off" nor "full".
    """
    value = os.environ.get("RESNET_FUSED_CALIBRATE", "auto")
    if value not in MODES:
        raise ValueError(f"RESNET_FUSED_CALIBRATE must be one of {', '.join(MODES)}; got {value!r}")
    return value


def calibrates(device: torch.device) -> bool:
    """Whether layers are timed on this device, or what was kept of it serves."""
    return (
        device.type in _TIMED_DEVICES
        and registry.get_backend() == "auto"
        and not torch.are_deterministic_algorithms_enabled()
        and mode() != "off"
    )


def lookup(device: torch.device, key: str) -> dict[str, Any] | None:
    """{"backend": name, "config": tile or None} for this problem, or None where it was not tuned."""
    entry = _store("tuned", device).entries.get(key)
    return entry if isinstance(entry, dict) and entry.keys() >= {"backend", "config"} else None


def remember(device: torch.device, key: str, entry: dict[str, Any]) -> None:
    plans.forget()
    _store("tuned", device)[key] = entry


def times(device: torch.device, layer_class: str) -> dict[str, float]:
    """Microseconds by backend, eager among them; empty where the class was not timed."""
    entry = _store("times", device).entries.get(layer_class)
    if (
        isinstance(entry, dict)
        and registry.PLAIN in entry
        and all(type(t) is float and 0 < t < math.inf for t in entry.values())
    ):
        return entry
    return {}


def keep_times(device: torch.device, layer_class: str, found: dict[str, float]) -> None:
    _store("times", device)[layer_class] = found


def forget() -> None:
    """Drop what is in memory; the files are read anew."""
    plans.forget()
    _stores.clear()


def _store(kind: str, device: torch.device) -> Store:
    store = _stores.get((kind, device))
    if store is None:
        store = _stores[kind, device] = Store(kind, device)
    return store


def rotated(call: Any) -> Iterator[Any]:
    """Copies of a call in turn, together larger than the L2 cache, where they are few; what it writes is always one."""
    cache = torch.cuda.get_device_properties(call[0].device).L2_cache_size if call[0].is_cuda else 0
    size = sum(t.numel() * t.element_size() for t in call if isinstance(t, Tensor))
    copies = min(8, -(-2 * cache // max(1, size)))
    written = {id(t) for t in call.written()}

    def copy(a: Any) -> Any:
        return a.detach().clone() if isinstance(a, Tensor) and (copies > 1 or id(a) in written) else a

    return itertools.cycle([type(call)(*map(copy, call)) for _ in range(max(1, copies))])


def measure(launches: dict[str, Launch], device: torch.device) -> dict[str, float]:
    """Microseconds of each launch, the host's part included, as a model runs it: one behind the other, by CUDA events.

    The rounds are interleaved and the least of each counts; a launch takes part in the first round to be warm.
    """
    found = dict.fromkeys(launches, float("inf"))
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def timed(launch: Launch, times: int) -> float:
            start.record()
            for _ in range(times):
                launch()
            end.record()
            end.synchronize()
            return 1e3 * start.elapsed_time(end) / times

        for launch in launches.values():
            launch()
        first = {name: timed(launch, 1) for name, launch in launches.items()}
        for _ in range(1 if max(first.values()) > _SLOW_US else _ROUNDS):
            for name, launch in launches.items():
                times = int(min(10, max(1, _ROUND_US // max(1.0, first[name]))))
                found[name] = min(found[name], timed(launch, times))
    return found


def cuda_timer(launch: Callable[[], Any]) -> float:
    """Milliseconds by CUDA events."""
    from triton.testing import do_bench

    return do_bench(launch, warmup=5, rep=20, return_mode="median")
