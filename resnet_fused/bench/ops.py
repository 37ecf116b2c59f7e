"""`bench --suite ops`: every case of `testing.CASES`: microseconds, GB/s, TFLOP/s, share of its floor, ratios.

A call is timed as a program makes it, launch included; eager and, where it is asked for, torch.compile in the same
interleaved rounds. A backend whose result is wrong is shown as wrong and not timed.
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..dispatch import registry
from ..testing import CASES, OPS, REFERENCES, Case, as_tuple, assert_within_budget, make_inputs, nan_filled_memory
from .ceilings import SAMPLE_MS, Ceilings
from .collect import Row
from .report import NOISY, spread
from .timing import paired_ratios, time_rounds

ROUNDS, COMPILED = 10, "compile"


def rows(
    names: Sequence[str], dtypes: dict[str, torch.dtype], device: torch.device, ceilings: dict[str, Ceilings]
) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The keys of all rows, and what makes them; names: backends, and "compile" for PyTorch's operators compiled."""
    for dtype in dtypes:
        for case in CASES:
            if not case.large or device.type == "cuda":
                arguments = (case, dtype, dtypes[dtype], names, device, ceilings[dtype])
                yield f"{case.id} {dtype}", functools.partial(measure, *arguments)


@torch.no_grad()
def measure(
    case: Case, dtype_name: str, dtype: torch.dtype, names: Sequence[str], device: torch.device, ceilings: Ceilings
) -> Row:
    args, kwargs = make_inputs(case, dtype=dtype, device=device)
    calls, found = {registry.PLAIN: functools.partial(call, case, registry.PLAIN, args, kwargs)}, dict[str, Any]()
    for name in names:
        run: functools.partial[Any] = functools.partial(call, case, name, args, kwargs)
        if name == COMPILED:
            torch.compiler.reset()
            compiled = torch.compile(REFERENCES[case.op], dynamic=False)
            run = functools.partial(compiled, *args, **kwargs)
        try:
            with nan_filled_memory():
                results = as_tuple(run())
            assert_within_budget(case, results, args, kwargs)
        except registry.BackendUnavailable as error:
            found[name] = {"status": "unavailable", "reason": str(error)}
        except AssertionError as error:
            found[name] = {"status": "refused", "reason": str(error)}
        except Exception as error:
            found[name] = {"status": "failed", "reason": next(iter(str(error).splitlines()), type(error).__name__)}
        else:
            found[name], calls[name] = {"status": "ok"}, run
    samples = time_rounds(calls, ROUNDS, device, min_sample_ms=SAMPLE_MS)
    for name in found.keys() & samples.keys():
        found[name] |= figures(case, dtype, samples[name], samples[registry.PLAIN], ceilings)
    shape = {"op": case.op, "shape": list(case.shape), "dtype": dtype_name}
    return {"case": case.id, **shape, "bytes": case.bytes(dtype), "flops": case.flops(), "backends": found}


def call(case: Case, backend: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    with registry.backend(backend):
        return OPS[case.op](*args, **kwargs)


def figures(
    case: Case, dtype: torch.dtype, samples: list[float], eager: list[float], ceilings: Ceilings
) -> dict[str, Any]:
    us = statistics.median(samples) * 1e3
    return {
        "microseconds": us,
        "spread": spread(samples),
        "gb_per_s": case.bytes(dtype) / us / 1e3,
        "tflop_per_s": case.flops() / us / 1e6,
        "share_of_floor": ceilings.floor(case.bytes(dtype), case.flops()) * 1e6 / us,
        "ratio_to_eager": statistics.median(paired_ratios(eager, samples)),
    }


def line(row: Row) -> str:
    """One for each backend."""
    lines = []
    for name, b in row["backends"].items():
        start = f"{row['case']:36}{row['dtype']:9} {name:8}"
        if b["status"] != "ok":
            lines.append(f"{start}{b['status']}: {b['reason']}"[:120])
            continue
        shown = f"{b['microseconds']:10.1f} us{b['gb_per_s']:8.1f} GB/s{b['tflop_per_s']:8.2f} TFLOP/s"
        noisy = "  noisy" if b["spread"] > NOISY else ""
        lines.append(f"{start}{shown}{b['share_of_floor']:6.0%} of floor{b['ratio_to_eager']:6.2f}x eager{noisy}")
    return "\n".join(lines)
