"""What `resnet-fused info` prints: versions, devices, backends, and the models' sizes."""

import platform
from typing import Any

import torch

from ._version import __version__
from .dispatch import registry, speed
from .dispatch.store import installed_version
from .tables import table


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
        "problems": _problems(),
        "backends": {
            str(device): {name: registry.unavailable(name, device) for name in registry.BACKENDS}
            for device in (torch.device("cpu"), *(gpus or [torch.device("cuda")]))
        },
    }


def _problems() -> list[str]:
    """What is wrong with the environment's variables."""
    found = [reason] if (reason := registry.unknown(registry.get_backend())) else []
    try:
        speed.mode()
    except ValueError as error:
        found.append(str(error))
    return found


def _gpu(device: torch.device) -> str:
    p = torch.cuda.get_device_properties(device)
    return f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"


def text(info: dict[str, Any]) -> str:
    """What `collect` found, in tables."""
    shown = {info["extension"].get("reason"): "CUDA extension _C, above"}
    parts = [("versions", info["versions"]), ("devices", info["devices"]), ("CUDA extension _C", info["extension"])]
    for device, backends in info["backends"].items():
        here = "" if device in info["devices"] else ", none here"
        served = {name: f"no: {shown.get(reason, reason)}" if reason else "yes" for name, reason in backends.items()}
        parts.append((f"backends on {device} (in use: {info['backend']}{here})", served))
    return "\n\n".join([f"{title}\n{_rows(values)}" for title, values in parts])


def _rows(values: dict[str, Any]) -> str:
    return table([(key, "none" if value is None else value) for key, value in values.items()], indent=2)


def models_text(rows: list[dict[str, Any]]) -> str:
    """The rows of `models.costs.table` as a table."""
    cells = []
    for row in rows:
        name = ", ".join([row["model"], *(f"{key}={value}" for key, value in row["arguments"].items())])
        parameters, multiply_adds = row["parameters"] / 1e6, row["multiply_adds"] / 1e9
        cells.append((name, row["image_size"], f"{parameters:.2f} M", f"{multiply_adds:.3f} G"))
    lines = [table(cells, ("model", "image", "parameters", "multiply-adds"), right=(1, 2, 3)), ""]
    lines += ["Multiply-adds are half of the FLOPs that torch.utils.flop_counter counts for one image."]
    lines += [
        "The paper's ResNet-50, 101 and 152 have the stride on the first 1x1 convolution, torchvision's on the 3x3."
    ]
    lines += ["VGG is torchvision's."]
    return "\n".join(lines)
