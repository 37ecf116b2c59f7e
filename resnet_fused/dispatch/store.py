"""What is remembered between runs, as JSON in the cache folder: written by atomic replace, never trusted blindly."""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from .._version import __version__


def cache_dir() -> Path:
    """RESNET_FUSED_HOME, or `resnet_fused` under XDG_CACHE_HOME or ~/.cache; it need not exist."""
    home = os.environ.get("RESNET_FUSED_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() if home else Path(cache).expanduser() / "resnet_fused"


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file that takes the place of `path`, whole and on the disk, when the block ends; an error leaves all as it was.

    Raises:
        OSError: it can't be written; `filename` is `path`.
    """
    partial = None
    try:
        with tempfile.NamedTemporaryFile(mode, dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            partial = file.name
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException as error:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def environment(device: torch.device) -> dict[str, str]:
    """What a verdict or a timing depends on: the device, its driver and the versions."""
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        name = f"{torch.cuda.get_device_name(device)} (compute capability {capability})"
        driver = _driver_version()
    else:
        name, driver = device.type, "none"
    triton = installed_version("triton") or "none"
    versions = {"torch": torch.__version__, "triton": triton, "resnet_fused": __version__, "kernels": _kernels_digest()}
    return {"device": name, "driver": driver, **versions}


def _driver_version() -> str:
    """The CUDA version of the driver, "13000", which PyTorch doesn't tell."""
    found = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    return str(found.value)


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def _kernels_digest() -> str:
    """Of the kernels, the compiled module and the checks: an edited one is another version."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    sources = (p for part in ("backends", "dispatch", "ops") for p in (package / part).rglob("*.py"))
    for path in sorted([*sources, *package.glob("_C*.so")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """The entries of one kind, `verdicts` or `tuned`, for one device; a damaged or unwritable file is a warning."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self.environment = environment(device)
        slug = "".join(c if c.isalnum() else "-" for c in self.environment["device"])
        self.path = cache_dir() / f"{kind}-{slug}.json"
        self.entries: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text())
            if content["environment"] == self.environment and isinstance(content["entries"], dict):
                return content["entries"]
            problem = f"it was written for {content['environment']}, this is {self.environment}"
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"it can't be read ({type(error).__name__}: {error})"
        warnings.warn(f"resnet_fused: {self.path} is left aside: {problem}", stacklevel=2)
        return {}

    def __setitem__(self, key: str, value: Any) -> None:
        self.entries[key] = value
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                json.dump({"environment": self.environment, "entries": self.entries}, file, indent=1)
        except OSError as error:
            warnings.warn(f"resnet_fused: {self.path} can't be written ({error}); nothing is remembered", stacklevel=2)
