"""What a measurement says and under which conditions it was made: as a table and as JSON."""

import datetime
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..dispatch.store import atomic_write, installed_version


@dataclass
class Result:
    """One variant: its parity, and its samples where it was timed."""

    variant: str
    layout: str  # of the images: "nchw" or "nhwc"
    status: str = "measured"  # or "refused" (wrong numbers), "unavailable", "failed"
    reason: str = ""
    error: float | None = None  # largest difference from float64: a logit's, or in training a gradient's, relative
    limit: float | None = None
    bit_identical: bool | None = None  # to torchvision in channels_last
    ran: dict[str, int] = field(default_factory=dict)  # what served the layers, and how many
    peak_mib: float | None = None
    samples_ms: list[float] = field(default_factory=list)  # one a round, milliseconds a batch
    ratios: list[float] = field(default_factory=list)  # speed against the baseline, round by round

    @property
    def parity(self) -> str:
        if self.status != "measured":
            return self.status
        return "torchvision-nhwc's bits" if self.bit_identical else f"error {self.error:.1e} (allowed {self.limit:.1e})"


@dataclass
class Report:
    """One model in all its variants."""

    model: str
    batch: int
    image_size: int
    dtype: str
    device: str
    baseline: str
    conditions: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    task: str = "inference"  # the suite

    @property
    def ok(self) -> bool:
        """No variant was refused and none failed."""
        return all(result.status in ("measured", "unavailable") for result in self.results)

    def table(self) -> str:
        """A line for each variant; medians over the rounds, with the first and third quartile."""
        c = self.conditions
        lines = [
            f"{self.model} {self.task}, {self.batch} x 3 x {self.image_size} x {self.image_size}, {self.dtype}, "
            f"{c['device']}, {c['threads']} threads, load {c['load']:.1f}, torch {c['torch']}",
            "",
        ]
        per_call = "ms/step" if self.task == "training" else "ms/batch"
        rows = [("variant", "img/s", per_call, "(quartiles)", "ratio", "(quartiles)", "peak MiB", "parity")]
        for r in self.results:
            figures = ("-",) * 5
            if r.samples_ms:
                ms, speed = quartiles(r.samples_ms), quartiles(r.ratios)
                figures = (
                    f"{self.batch * 1e3 / ms[1]:.1f}",
                    f"{ms[1]:.2f}",
                    f"({ms[0]:.2f} - {ms[2]:.2f})",
                    f"{speed[1]:.2f}" if speed else "-",
                    f"({speed[0]:.2f} - {speed[2]:.2f})" if speed else "",
                )
            rows.append((r.variant, *figures, "n/a" if r.peak_mib is None else f"{r.peak_mib:.0f}", r.parity))
        rounds = max((len(r.samples_ms) for r in self.results), default=0)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        for name, *cells, parity in rows:
            padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            lines.append("  ".join((name.ljust(widths[0]), *padded, parity)))
        lines += ["", f"ratio: speed against {self.baseline}, taken in each of {rounds} interleaved rounds."]
        lines += [f"{r.variant} {r.status}: {r.reason}" for r in self.results if r.reason]
        lines += [
            f"{r.variant} ran " + ", ".join(f"{what} ({n})" for what, n in r.ran.items()) for r in self.results if r.ran
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON, with medians and quartiles beside the samples."""
        out = asdict(self)
        for entry, result in zip(out["results"], self.results, strict=True):
            if result.error is not None and not math.isfinite(result.error):
                entry["error"] = None  # JSON has no NaN; the reason says it
            if result.samples_ms:
                entry["ms_quartiles"] = quartiles(result.samples_ms)
                entry["img_per_s"] = self.batch * 1e3 / statistics.median(result.samples_ms)
                entry["ratio_quartiles"] = quartiles(result.ratios)
        return out


def quartiles(samples: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile; empty for no samples."""
    if len(samples) < 2:
        return [*samples] * 3
    return statistics.quantiles(samples, n=4, method="inclusive")


def conditions(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the settings of a measurement that starts now."""
    with_gpu = device.type == "cuda"
    script = Path(sys.argv[0])
    program = [f"python -m {script.parent.name}" if script.name == "__main__.py" else script.name]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([*program, shlex.join(sys.argv[1:])]),
        "device": torch.cuda.get_device_name(device) if with_gpu else f"CPU {_cpu_name()}",
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # what else was running
        "platform": platform.platform(),
        "python": platform.python_version(),
        "resnet_fused": __version__,
        "torch": torch.__version__,
        "torchvision": installed_version("torchvision"),
        "triton": installed_version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if with_gpu else None,
        "cudnn_benchmark": with_gpu,
        "conv_fp32_precision": torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # made at import
        if with_gpu
        else None,
    }


def result_name(task: str, dtype: str, layout: str, device: torch.device) -> str:
    """The name of a result file: task-dtype-layout-torch-cuda-device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {_cpu_name()}"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    release = torch.__version__.split("+")[0]
    return f"{task}-{dtype}-{layout}-torch{release}-cuda{torch.version.cuda or 'none'}-{slug}.json"


def write_json(path: Path, content: Any) -> None:
    """Write a whole file or leave what was there."""
    with atomic_write(path) as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.write("\n")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
