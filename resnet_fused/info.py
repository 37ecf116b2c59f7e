"""What `resnet-fused info` prints: versions, devices, backends, and the models' sizes."""

import platform
from typing import Any

import torch

from ._version import __version__
from .dispatch import registry
from .dispatch.store import installed_version


def collect() -> dict[str, Any]:
    """Versions, devices, how the extension was built, and why a backend is not there."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "resnet_fused": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": installed_version("torchvision"),
            "triton": installed_version("triton"),
            "cuda": torch.version.cuda,
        },
        "devices": {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
        | {str(d): _gpu(d) for d in gpus},
        "extension": registry.extension(),
        "backend": registry.get_backend(),
        "backends": {
            str(device): {name: registry.unavailable(name, device) for name in registry.BACKENDS}
            for device in (torch.device("cpu"), *(gpus or [torch.device("cuda")]))
        },
    }


def _gpu(device: torch.device) -> str:
    p = torch.cuda.get_device_properties(device)
    return f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"


def text(info: dict[str, Any]) -> str:
    """What `collect` found, line by line."""
    lines = ["versions", *_rows(info["versions"]), "", "devices", *_rows(info["devices"]), ""]
    lines += ["CUDA extension _C", *_rows(info["extension"])]
    if reason := registry.unknown(info["backend"]):
        lines += ["", reason]
    for device, backends in info["backends"].items():
        here = "" if device in info["devices"] else ", none here"
        lines += ["", f"backends on {device} (in use: {info['backend']}{here})"]
        lines += _rows({name: f"no: {reason}" if reason else "yes" for name, reason in backends.items()})
    return "\n".join(lines)


def _rows(values: dict[str, Any]) -> list[str]:
    return [f"  {key:14}{'none' if value is None else value}" for key, value in values.items()]


def models_text(rows: list[dict[str, Any]]) -> str:
    """The rows of `models.costs.table` as a table."""
    lines = [f"{'model':52}{'image':>5}{'parameters':>14}{'multiply-adds':>16}"]
    for row in rows:
        name = ", ".join([row["model"], *(f"{key}={value}" for key, value in row["arguments"].items())])
        size, parameters, multiply_adds = row["image_size"], row["parameters"] / 1e6, row["multiply_adds"] / 1e9
        lines.append(f"{name:52}{size:5}{parameters:12.2f} M{multiply_adds:14.3f} G")
    lines += ["", "Multiply-adds are those of the convolutions and linear layers for one image, from their shapes."]
    lines += [
        "The paper's ResNet-50, 101 and 152 have the stride on the first 1x1 convolution, torchvision's on the 3x3."
    ]
    lines += ["VGG is torchvision's."]
    return "\n".join(lines)
