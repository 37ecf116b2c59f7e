"""`bench --suite parity`: the error of every operator and model, by dtype and backend, beside PyTorch's own.

Errors are largest and mean absolute differences from float64, an operator's of all its results together.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..dispatch import registry
from ..testing import CASES, OPS, REFERENCES, Case, as_tuple, limits, make_inputs, map_tensors, nan_filled_memory, wrong
from .cases import Inference
from .collect import Row

BATCH, SIZE = 4, 64  # a model's images


def backends(device: torch.device) -> list[str]:
    """Those that are there; not Triton's interpreter, which takes hours."""
    there = [name for name in registry.BACKENDS if registry.unavailable(name, device) is None]
    return [n for n in there if n == registry.PLAIN or n in registry.apart_from_auto(device)]


def rows(
    torchvision: ModuleType, models: Sequence[str], dtypes: dict[str, torch.dtype], device: torch.device
) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The keys of all rows, and what makes them."""
    for dtype in dtypes:
        for case in CASES:
            if not case.large or device.type == "cuda":
                yield f"{case.id} {dtype}", functools.partial(operator, case, dtype, dtypes[dtype], device)
        for model in models:
            yield f"{model} {dtype}", functools.partial(network, torchvision, model, dtype, dtypes[dtype], device)


@torch.no_grad()
def operator(case: Case, name: str, dtype: torch.dtype, device: torch.device) -> Row:
    args, kwargs = make_inputs(case, dtype=dtype, device=device)
    exact = as_tuple(REFERENCES[case.op](*_double(args), **_double(kwargs)))
    budget = list(limits(REFERENCES[case.op], args, kwargs))
    found: dict[str, Any] = {}
    for backend in backends(device):
        try:
            with registry.backend(backend), nan_filled_memory():
                results = as_tuple(OPS[case.op](*args, **kwargs))
        except registry.BackendUnavailable as error:
            found[backend] = {"status": "unavailable", "reason": str(error)}
            continue
        reason = wrong(results, budget)
        found[backend] = {"status": "refused" if reason else "ok", "reason": reason, **_errors(results, exact)}
    own = _errors(as_tuple(REFERENCES[case.op](*args, **kwargs)), exact)
    return {"what": "operator", "name": case.id, "dtype": name, "pytorch": own, "backends": found}


def network(torchvision: ModuleType, model: str, name: str, dtype: torch.dtype, device: torch.device) -> Row:
    """Logits in eval mode, of torchvision's channels_last run and of this package's."""
    case = Inference(torchvision, model, BATCH, SIZE, dtype, device)
    found: dict[str, Any] = {}
    for backend in backends(device):
        result, call = case.prepare(f"resnet_fused-{backend}")
        found[backend] = {"status": {"measured": "ok"}.get(result.status, result.status), "reason": result.reason}
        if call is not None:
            with case.grad_mode():
                found[backend] |= _errors((call(),), tuple(case.expected))
    own = _errors(tuple(case.nhwc), tuple(case.expected))
    return {"what": "model", "name": model, "dtype": name, "pytorch": own, "backends": found}


def line(row: Row) -> str:
    shown = [f"pytorch {_shown(row['pytorch'])}"]
    for backend, found in row["backends"].items():
        shown.append(f"{backend} {_shown(found) if found['status'] == 'ok' else found['status']}")
    return f"{row['name']:40}{row['dtype']:10}" + "  ".join(shown)


def ok(report: Row) -> bool:
    """Nothing was wrong and nothing failed."""
    return all(b["status"] in ("ok", "unavailable") for row in report["rows"] for b in row["backends"].values())


def _shown(errors: dict[str, Any]) -> str:
    return "empty" if errors["max"] is None else f"{errors['max']:.1e} ({errors['mean']:.1e})"


def _double(value: Any) -> Any:
    return map_tensors(value, lambda t: t.double())


def _errors(results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float | None]:
    differences = [(r.double() - e.double()).abs().flatten() for r, e in zip(results, exact, strict=True)]
    joined = torch.cat(differences)
    if joined.numel() == 0 or not joined.isfinite().all():  # JSON has no NaN
        return {"max": None, "mean": None}
    return {"max": joined.max().item(), "mean": joined.mean().item()}
