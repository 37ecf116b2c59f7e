"""The compiled module `_C`, whose import registers the CUDA operators; this one imports without it or a driver."""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_REBUILD = "RESNET_FUSED_FORCE_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ."


def unavailable(device_type: str, index: int | None = None) -> str | None:
    """Why the CUDA kernels can't run on this device, with the remedy, or None where they can."""
    if device_type != "cuda":
        return f"the CUDA kernels run on CUDA devices, the tensor is on {device_type}; move it"
    if _C is None or _REASON is not None:
        return _REASON
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device; check the driver with nvidia-smi"
    return device_mismatch(_C.build_info()["archs"], torch.cuda.get_device_capability(index))


def build_info() -> dict[str, Any]:
    """How `_C` was built (`cuda`, `torch`, `torch_target`, `archs`, `compiler`), or the `reason` why it isn't there."""
    return {"reason": _REASON} if _C is None else _C.build_info()


def torch_mismatch(torch_version: str, cuda: str | None, hip: str | None) -> str | None:
    """Why CUDA kernels can't run with this PyTorch, or None."""
    if hip is not None:
        return "ROCm runs eager: the CUDA kernels need a PyTorch built for CUDA"
    if cuda is None:
        return f"PyTorch {torch_version} was built without CUDA; install a CUDA build of it"
    return None


def cuda_mismatch(compiled: str, running: str) -> str | None:
    """Why a `_C` compiled for one CUDA version can't run with a PyTorch built for another, or None."""
    if compiled.partition(".")[0] == running.partition(".")[0]:
        return None
    return f"_C was compiled for CUDA {compiled}, PyTorch is built for CUDA {running}; rebuild with: {_REBUILD}"


def device_mismatch(archs: Sequence[str], capability: tuple[int, int]) -> str | None:
    """Why binaries for `archs` ("sm_80", "sm_90a", "compute_80") can't run on this compute capability, or None."""
    if any(_runs_on(arch, capability) for arch in archs):
        return None
    major, minor = capability
    return (
        f"_C was compiled for {', '.join(archs)}, this device has compute capability {major}.{minor}; "
        f"rebuild with: TORCH_CUDA_ARCH_LIST={major}.{minor} {_REBUILD}"
    )


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
    if match is None:
        return False
    kind, major, minor, suffix = match.groups()
    built = (int(major), int(minor))
    if suffix == "a":  # one capability only
        return built == capability
    if kind == "sm" or suffix == "f":  # binaries run on later minors of the same major
        return built[0] == capability[0] and built[1] <= capability[1]
    return built <= capability  # PTX: every later device


def load_failure(message: str, cuda: str) -> str:
    """The reason to give when importing `_C` failed with `message` under a PyTorch built for `cuda`."""
    runtime = re.search(r"libcudart\.so\.(\d+)", message)
    mismatch = runtime and cuda_mismatch(runtime[1], cuda)
    return mismatch or f"_C failed to load ({message}); rebuild with: {_REBUILD}"


def not_built(recorded: Path) -> str:
    """The reason that the build recorded, or that nothing was built here."""
    why = recorded.read_text().strip() if recorded.exists() else "this source tree was never built"
    return f"_C was not built: {why}; to build it, have nvcc and run: {_REBUILD}"


def _load() -> tuple[ModuleType | None, str | None]:
    cuda = torch.version.cuda
    reason = torch_mismatch(torch.__version__, cuda, torch.version.hip)
    if cuda is None or reason is not None:
        return None, reason
    top = __package__.partition(".")[0]
    name = f"{top}._C"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            return None, load_failure(str(error), cuda)
        folder = Path(next(iter(importlib.import_module(top).__path__)))
        return None, not_built(folder / "_build_reason.txt")
    except (ImportError, OSError) as error:
        return None, load_failure(str(error), cuda)
    return module, cuda_mismatch(module.build_info()["cuda"], cuda)


_C, _REASON = _load()
