"""Under which conditions a measurement is made: the machine, the versions, the settings."""

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..dispatch.store import installed_version
from . import nvml


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
        "commit": commit(),
        "torch": torch.__version__,
        "torchvision": installed_version("torchvision"),
        "triton": installed_version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if with_gpu else None,
        "cudnn_benchmark": with_gpu,
        "conv_fp32_precision": torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # made at import
        if with_gpu
        else None,
        "onnxruntime": installed_version("onnxruntime"),
        "openvino": installed_version("openvino"),
        "gpu": nvml.state(device),  # at the start
    }


def commit() -> str | None:
    """Of the sources that run, with a + where they were edited; None where they are no checkout."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        edited = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + "+" * bool(edited)


def same_sources(conditions: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether one commit measured both; without a checkout, one release."""
    return all(conditions.get(name) == others.get(name) for name in ("commit", "resnet_fused"))


def result_name(task: str, dtype: str, layout: str, device: torch.device) -> str:
    """The name of a result file: task-dtype-layout-torch-cuda-device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {_cpu_name()}"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    release = torch.__version__.split("+")[0]
    return f"{task}-{dtype}-{layout}-torch{release}-cuda{torch.version.cuda or 'none'}-{slug}.json"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
