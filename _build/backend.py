"""The build backend: setuptools, asking for torch and compiling CUDA only where `why_not_cuda` finds no objection."""

import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that are not overridden

CUTLASS = "nvidia-cutlass==4.2.0.0"  # for its headers
CUDA_REQUIREMENTS = ["torch>=2.11", "ninja", CUTLASS]
DEFAULT_ARCHS = ["8.0+PTX", "9.0a", "10.0", "12.0"]  # without a GPU to ask: PTX serves what has no binary
_GO_AHEAD = "to compile them, have a CUDA toolkit and set RESNET_FUSED_FORCE_CUDA=1"

toolkit: Path | None = None  # set while a build that compiles CUDA runs: setup.py reads both
not_compiled: str | None = "no wheel was being built"


def find_toolkit(environ: Mapping[str, str]) -> Path | None:
    """The folder with bin/nvcc and include/cuda_runtime.h of a CUDA toolkit; nvcc on PATH may be a wrapper script."""
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if home:
        candidates = [Path(home)]
    else:
        nvcc = shutil.which("nvcc", path=environ.get("PATH"))
        candidates = [Path(nvcc).resolve().parents[1], _dryrun_root(nvcc)] if nvcc else []
        candidates.append(Path("/usr/local/cuda"))
    for root in candidates:
        if root and (root / "bin/nvcc").exists() and (root / "include/cuda_runtime.h").exists():
            return root
    return None


def _dryrun_root(nvcc: str) -> Path | None:
    try:
        run = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    top = re.search(r"^#\$ TOP=(.+)$", run.stderr, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else None


def visible_capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs that the CUDA driver shows; [] without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    return [(_attribute(driver, 75, i), _attribute(driver, 76, i)) for i in range(count.value)]


def _attribute(driver: ctypes.CDLL, attribute: int, index: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, index)  # a device's handle is its ordinal
    return value.value


def why_not_cuda(environ: Mapping[str, str], toolkit: Path | None, capabilities: list[tuple[int, int]]) -> str | None:
    """Why the CUDA kernels are not compiled, in one sentence, or None where they are."""
    forced = environ.get("RESNET_FUSED_FORCE_CUDA")
    if forced == "0":
        return "RESNET_FUSED_FORCE_CUDA=0 was set"
    if toolkit is None:
        return "no CUDA toolkit was found (CUDA_HOME, nvcc on PATH, /usr/local/cuda)"
    if forced == "1" or environ.get("TORCH_CUDA_ARCH_LIST") or capabilities:
        return None
    return "this machine shows no GPU, and neither TORCH_CUDA_ARCH_LIST nor RESNET_FUSED_FORCE_CUDA=1 asks for it"


def toolkit_archs(toolkit: Path) -> list[str]:
    """What a toolkit's nvcc compiles for: "compute_80", "compute_120"."""
    run = subprocess.run([toolkit / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return run.stdout.split()


def arch_list(environ: Mapping[str, str], capabilities: list[tuple[int, int]], known: list[str]) -> list[str]:
    """What to compile for, as in TORCH_CUDA_ARCH_LIST: "9.0a", "8.0+PTX"; `known` as of `toolkit_archs`."""
    if environ.get("TORCH_CUDA_ARCH_LIST"):
        return re.split(r"[ ;,]+", environ["TORCH_CUDA_ARCH_LIST"].strip(" ;,"))
    if capabilities:
        return sorted({"9.0a" if capability == (9, 0) else "{}.{}".format(*capability) for capability in capabilities})
    return [arch for arch in DEFAULT_ARCHS if "compute_" + re.sub(r"\D", "", arch) in known]


def gencode(archs: list[str]) -> dict[str, str]:
    """From each target ("sm_90a", "compute_80") to nvcc's flag for it; what is below 8.0 is left out, with a note.

    Raises:
        ValueError: an entry is not a compute capability, or none is 8.0 or later.
    """
    flags = {}
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected capabilities such as 8.0, 9.0a or 8.0+PTX, got {arch!r}")
        if int(match[1]) < 8:
            print(f"resnet_fused: TORCH_CUDA_ARCH_LIST: {arch} is left out, the kernels need 8.0 or later")
            continue
        number = match[1] + match[2] + match[3]
        for target in [f"sm_{number}"] + [f"compute_{number}"] * (match[4] is not None):
            flags[target] = f"-gencode=arch=compute_{number},code={target}"
    if not flags:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected a capability of 8.0 or later, got {' '.join(archs)!r}")
    return flags


def conv_targets(targets: Iterable[str]) -> dict[str, list[str]]:
    """The targets ("sm_90a", "compute_80") for which each kernel family of the convolutions is compiled."""
    families: dict[str, list[str]] = {}
    for target in targets:
        families.setdefault("sm90a" if target.endswith("_90a") else "sm80", []).append(target)
    return families


def cutlass_includes() -> list[str]:
    """CUTLASS's header folders, from the installed nvidia-cutlass.

    Raises:
        RuntimeError: they are not there.
    """
    try:
        source = importlib.metadata.distribution("nvidia-cutlass").locate_file("cutlass_library/source")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(f"CUTLASS's headers were not found; pip install --no-deps {CUTLASS}") from None
    return [str(source / "include"), str(source / "tools/util/include")]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _cuda_requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _cuda_requirements()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return _build(build_meta.build_wheel, wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return _build(build_meta.build_editable, wheel_directory, config_settings, metadata_directory)


def _cuda_requirements() -> list[str]:
    return [] if _why_not_here() else CUDA_REQUIREMENTS


def _why_not_here() -> str | None:
    reason = why_not_cuda(os.environ, find_toolkit(os.environ), visible_capabilities())
    if reason and os.environ.get("RESNET_FUSED_FORCE_CUDA") == "1":
        sys.exit(f"RESNET_FUSED_FORCE_CUDA=1, but {reason}")
    return reason


def _build(hook: Callable[..., str], *args) -> str:
    global toolkit, not_compiled
    not_compiled = _why_not_here()
    if not_compiled is None:
        toolkit = find_toolkit(os.environ)
        try:
            return hook(*args)
        except (Exception, SystemExit) as error:
            if os.environ.get("RESNET_FUSED_FORCE_CUDA") == "1":
                raise
            not_compiled = f"compiling them failed ({' '.join(str(error).split())})"
            toolkit = None
    print(
        f"resnet_fused: installing without its CUDA kernels: {not_compiled}. The package works without them: Triton "
        f"serves GPUs and eager mode everything else; {_GO_AHEAD}."
    )
    return hook(*args)
