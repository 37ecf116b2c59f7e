"""What is remembered between runs, as JSON in the cache folder: written by atomic replace, never trusted blindly."""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock

from .._version import __version__


def cache_dir() -> Path:
    """RESNET_FUSED_HOME, or `resnet_fused` under XDG_CACHE_HOME or ~/.cache; it need not exist.

    A user without a home (a container's bare number) has a folder of that number among the temporary files.
    """
    home = os.environ.get("RESNET_FUSED_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(home).expanduser() if home else Path(cache).expanduser() / "resnet_fused"
    except RuntimeError:
        return Path(tempfile.gettempdir(), f"resnet_fused-{os.getuid()}")


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
        driver, cudnn = _driver_version(), str(torch.backends.cudnn.version())
    else:
        name, driver, cudnn = device.type, "none", "none"
    triton = installed_version("triton") or "none"
    versions = {"torch": torch.__version__, "cudnn": cudnn, "triton": triton, "resnet_fused": __version__}
    return {"device": name, "driver": driver, **versions, "kernels": _kernels_digest()}


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
    """The entries of one kind, `verdicts` or `tuned`, for one device; a damaged or unwritable file is a warning.

    Every environment has a file of its own. What other threads, devices and processes wrote there meanwhile is kept.
    """

    def __init__(self, kind: str, device: torch.device) -> None:
        self.environment = environment(device)
        slug = "".join(c if c.isalnum() else "-" for c in self.environment["device"])
        digest = hashlib.sha256(json.dumps(self.environment).encode()).hexdigest()[:8]
        self.path = cache_dir() / f"{kind}-{slug}-{digest}.json"
        self.entries: dict[str, Any] = self._read()
        self._own: dict[str, Any] = {}  # written by this process
        self._writing = threading.Lock()
        self._warned = False

    def _read(self, warn: bool = True) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text())
            if content["environment"] == self.environment and isinstance(content["entries"], dict):
                return content["entries"]
            problem = f"it was written for {content['environment']}, this is {self.environment}"
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"it can't be read ({type(error).__name__}: {error})"
        if warn:
            warnings.warn(f"resnet_fused: {self.path} is left aside: {problem}", stacklevel=2)
        return {}

    def __setitem__(self, key: str, value: Any) -> None:
        self.entries[key] = value
        with self._writing:
            self._own[key] = value
            try:
                self._write()
            except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
                if not self._warned:
                    self._warned = True
                    message = f"resnet_fused: {self.path} can't be written ({error}); nothing is remembered"
                    warnings.warn(message, stacklevel=2)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", timeout=10), atomic_write(self.path) as file:
            entries = self._read(warn=False) | self._own
            json.dump({"environment": self.environment, "entries": entries}, file, indent=1)
