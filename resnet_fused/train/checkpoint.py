"""A run's checkpoint: one file, replaced whole, from which the run goes on and its model is rebuilt.

It is a dict that `torch.load(path, weights_only=True)` reads. For whoever uses the network:

- `model`, `model_kwargs`: its name and arguments, as `models.get_model` takes them;
- `state_dict`: its weights, those that were evaluated: the moving average where the run keeps one;
- `classes`: list of the names of its outputs;
- `mean`, `std`: of its images in [0, 1]; tensors [3, 1, 1], or [3, H, W] for images of that size only;
- `resize`, `crop`: short side and centre of its images, 256 and 224; both None where it sees whole images;
- `config`: the run's `Settings` as a dict (`recipe`, `data`, ...); `step`: the iterations done;
- `evaluation`: (loss, error in percent) of the last evaluation, or None; `evaluated`: the iteration of it.

For the run itself: `trained_state_dict` (None without a moving average) and `averaged` (its updates), `optimizer`,
`schedule`, `scaler`, `rng`, `seconds`, and `window`: [N, 2], loss and error of the iterations not logged yet.
"""

import io
import os
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..dispatch.store import atomic_write
from ..models.weights.files import RUN_CHECKPOINT, RUN_FORMAT

NAME = RUN_CHECKPOINT


def save(folder: Path, content: dict[str, Any]) -> Path:
    """Put a checkpoint into the run's folder in the place of the one before.

    Raises:
        OSError: the disk is full or not writable; the checkpoint before is as it was.
        FloatingPointError: a weight or a statistic is not finite.
    """
    for name in ("state_dict", "trained_state_dict"):
        for key, tensor in (content.get(name) or {}).items():
            if not tensor.isfinite().all():
                raise FloatingPointError(f"{key} is not finite after iteration {content['step']}")
    buffer = io.BytesIO()  # torch.save itself answers a full disk with an assertion of its zip writer
    torch.save({"format": RUN_FORMAT, **content}, buffer)
    with atomic_write(folder / NAME, "wb") as file:
        file.write(buffer.getbuffer())
    return folder / NAME


def read(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU, from its file or its run's folder: the keys above.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is something else.
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler fails in many ways
        raise ValueError(f"{path} can't be read as a checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != RUN_FORMAT:
        raise ValueError(f"{path} is not a checkpoint of resnet-fused train")
    return complete(content)


def complete(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's content with the keys that runs of before did not write."""
    crops = content["config"]["recipe"] == "imagenet"
    return {"resize": 256 if crops else None, "crop": 224 if crops else None} | content


def load_model(path: str | os.PathLike) -> tuple[models.ResNet, dict[str, Any]]:
    """The model of a checkpoint, in eval mode on the CPU, and the rest of its content: see `read`.

    Args:
        path: a checkpoint's file or its run's folder.
    """
    meta = read(path)
    model = models.get_model(meta["model"], **meta["model_kwargs"])
    model.load_state_dict(meta["state_dict"])
    return model.eval(), meta
