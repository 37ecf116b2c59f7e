"""A refused kernel's check, run again from its file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..dispatch import compare, registry, replay, trust
from ..ops._library import records
from ..ops.batch_norm_act.training import BackwardCall, TrainingCall

_RECORDS: dict[str, Callable[..., Any]] = records | {
    f"{step.op}_{step.step}": step for step in (TrainingCall, BackwardCall)
}


def run(path: Path, device: torch.device) -> int:
    """0 where the kernel's numbers are right now, else 1; what was and what is wrong is printed.

    Raises:
        ValueError: the file is none of a refused kernel, or its backend is not there on the device.
        OSError: it can't be read.
    """
    try:
        kept = json.loads(path.read_text())
        record, backend, config = _RECORDS[kept["operator"]], kept["backend"], kept["config"]
        fields = replay.fields(kept["fields"], device)
        was = f"{kept['wrong']} ({kept['environment']['device']})"
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no refused kernel's file ({type(error).__name__}: {error})") from error
    lacks = registry.unavailable(backend, device)
    if lacks is not None:
        raise ValueError(f"backend {backend!r} can't run here: {lacks}")
    call = record(*fields)
    if not registry.serves(backend, call.op):
        raise ValueError(f"{path}: backend {backend!r} has no {call.op}")
    try:
        with torch.no_grad():
            wrong = compare(backend, call, config)
    except Exception as error:  # as wrong as any
        wrong = f"it raised {trust.described(error)}"
    print(f"{kept['operator']} on {backend}\n  then  {was}\n  now   {wrong or 'right'}")
    return 1 if wrong else 0
