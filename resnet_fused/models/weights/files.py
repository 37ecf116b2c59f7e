"""Checkpoint files as {key: tensor}, without what training scripts, wrappers and runs of `train` put around them."""

import argparse
import contextlib
import os
import pathlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RUN_CHECKPOINT = "checkpoint.pt"  # in a run's folder
RUN_FORMAT = "resnet_fused run 1"
NAMES = (".pth", ".pt", ".safetensors", ".ckpt", ".bin", ".pth.tar")
_PROGRAMS = {".onnx": "an ONNX model", ".pt2": "a program of torch.export or AOTInductor"}
_CONTAINERS = ("state_dict", "model", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, Lightning
_OBJECT = re.compile(r"GLOBAL ([\w.]+)")  # in the unpickler's message


def find(weights: str | os.PathLike) -> tuple[Path, str | None] | None:
    """The file that `weights` names, and the part of it after "::"; None where it names no file.

    Raises:
        FileNotFoundError: it is a file's name, and there is none, or a folder without a run.
    """
    text = os.fspath(weights)
    name, separator, part = (text, "", "") if os.path.exists(text) else text.rpartition("::")
    path = Path(name) if separator else Path(text)
    if path.is_dir():
        if not (path / RUN_CHECKPOINT).is_file():
            raise FileNotFoundError(f"weights={text!r}: that folder holds no {RUN_CHECKPOINT} of resnet-fused train")
        path = path / RUN_CHECKPOINT
    if path.is_file():
        return path, part or None
    if path.name.lower().endswith(NAMES) or separator:
        raise FileNotFoundError(f"weights={text!r}: there is no such file")
    return None


def read(path: Path, part: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict in a file without what wraps it and its keys, and the file's whole content.

    Args:
        path: of torch.save or safetensors.
        part: the key whose value is wanted, where the content holds several state_dicts.

    Raises:
        ValueError: it can't be read, holds something else, or several of which `part` names none.
        OSError, ImportError: no access, or safetensors is missing.
    """
    if program := _PROGRAMS.get(path.suffix.lower()):
        raise ValueError(f"weights {path} are {program}; accepted are the tensors of a {', '.join(NAMES)} file")
    content = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _load(path)
    if not isinstance(content, dict):
        raise ValueError(f"weights {path} hold a {type(content).__name__}, expected a state_dict")
    state = _unwrap(content, path, part)
    metadata = getattr(state, "_metadata", None)
    state = {key: value for key, value in state.items() if key != "n_averaged"}  # of AveragedModel
    if not all(isinstance(key, str) for key in state) or not any(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"weights {path} hold no tensors by name: save model.state_dict()")
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return _Annotated(state, metadata), content


class _Annotated(dict):
    """A state_dict with what its modules noted, as PyTorch's have it."""

    def __init__(self, state: dict[str, Tensor], metadata: Any) -> None:
        super().__init__(state)
        self._metadata = metadata or {}


def notes(state: Mapping[str, Tensor], keys: tuple[str, ...]) -> dict[str, Any]:
    """What the network noted beside its state_dict, of these keys; empty where another one wrote it."""
    metadata = getattr(state, "_metadata", None) or {}
    noted: dict[str, Any] = next((entry for entry in metadata.values() if set(keys) <= set(entry)), {})
    return {key: noted[key] for key in keys if key in noted}


def _unwrap(content: dict[str, Any], path: Path, part: str | None) -> dict[str, Any]:
    if part is not None:
        if not isinstance(content.get(part), dict):
            held = [key for key, value in content.items() if isinstance(value, dict)]
            raise ValueError(f"weights {path} hold no {part!r}; there are: {', '.join(map(str, held)) or 'none'}")
        content = content[part]
    while held := [key for key in _CONTAINERS if isinstance(content.get(key), dict)]:
        if len(held) > 1:
            raise ValueError(f"weights {path} hold {' and '.join(held)}: name one, as '{path}::{held[-1]}'")
        content = content[held[0]]
    return content


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # on a broken file the unpickler raises whatever it comes across
        raise ValueError(f"weights {path} can't be read: {_reason(str(error))}") from error


def _harmless() -> list[Any]:
    """What training scripts put beside the tensors: their options, and scores that are NumPy's."""
    found: list[Any] = [argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath]
    with contextlib.suppress(ImportError):
        import numpy
        from numpy._core.multiarray import scalar

        kinds = [type(numpy.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
        found += [numpy.dtype, scalar, (scalar, "numpy.core.multiarray.scalar"), *kinds]
    return found


def _reason(message: str) -> str:
    if held := _OBJECT.search(message):
        return f"it holds an object ({held[1]}), and only tensors are read; save model.state_dict() instead"
    if "TorchScript" in message:
        return "it is a TorchScript archive; save the state_dict() of the module that it was made from"
    first = (message.strip().splitlines() or [""])[0]
    return "it is damaged, or no checkpoint" + (f" ({first})" if 0 < len(first) < 120 else "")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        needs = 'safetensors: pip install "resnet_fused[export]"'
        raise ImportError(f"reading {path} needs {needs}", name="safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights {path} can't be read: {_reason(str(error))}") from error
