"""Every operator, backend and dtype against float64, on random inputs and within the one error budget."""

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import testing
from ..dispatch import numerics, registry
from ..ops._library import records
from ..ops.batch_norm_act.calls import ApplyCall
from ..ops.batch_norm_act.ranks import RanksCall
from ..ops.batch_norm_act.training import BackwardCall, TrainingCall
from . import process

CASES = ("conv-1x1-join", "conv-3x3-join", "conv-3x3-s2", "conv-7x7-s2", "conv-3x3-g32", "conv-bias", "stem",
         "bn-relu", "bn-join", "bn-two-bn-join", "bn-pre-add", "bn-half")  # fmt: skip
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
EPS = 1e-5

Row = dict[str, Any]


def rows(device: torch.device) -> Iterator[Row]:
    """operator, case, dtype, backend, `share` of the budget that the largest error takes, and what is `wrong` or None.

    A backend that does not serve a case has no row.
    """
    backends = [n for n in registry.BACKENDS if n != registry.PLAIN and registry.unavailable(n, device) is None]
    for case in testing.CASES:
        for dtype in DTYPES if case.id in CASES else ():
            calls = _calls(case, DTYPES[dtype], device)
            for name in backends:
                for call in calls:
                    if registry.unsupported(name, call) is None:
                        row = {"operator": call.name, "case": case.id, "dtype": dtype, "backend": name}
                        yield row | _checked(name, call)


def _checked(name: str, call: Any) -> Row:
    implementation = registry.implementation(name, call.op)
    try:
        with torch.no_grad():
            call = call.drawn()
            limits = list(numerics.call_limits(call))
            with testing.nan_filled_memory():
                found = implementation.plan(call, implementation.configs(call)[0])(call)
            results = (*numerics.as_tuple(found), *call.written())
            share = _share(results, limits)
            return {"share": share if math.isfinite(share) else None, "wrong": numerics.wrong(results, limits)}
    except Exception as error:  # one that does not run is as wrong as any, and the others are still tried
        return {"share": None, "wrong": f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"}


def _share(results: tuple[Tensor, ...], limits: list[numerics.Limit]) -> float:
    shares = [0.0]
    for result, (oracle, plain, budget) in zip(results, limits, strict=True):
        if result is not None and plain.is_floating_point() and oracle.numel() and result.shape == oracle.shape:
            error = numerics.largest_number(result.double() - oracle)
            shares.append(error / budget if budget else (float("inf") if error else 0.0))
    return float("nan") if any(s != s for s in shares) else max(shares)


def _calls(case: testing.Case, dtype: torch.dtype, device: torch.device) -> list[Any]:
    """The records of the case's operators."""
    args, given = testing.make_inputs(case, dtype=dtype, device=device)
    relu, residual = given.get("act", "relu") == "relu", given.get("residual")
    fields = testing.fields(case, args, given)
    if case.op != "batch_norm_act":
        return [records[case.op](*fields)]
    apply = ApplyCall(*fields)
    x, pre_add, two_bn = args[0], given.get("pre_add"), "residual_bn" in given
    bn2 = given.get("residual_bn", (None,) * 4)
    join = relu and residual is not None and not two_bn
    fields = (*args, 0.1, EPS, residual, *bn2, two_bn, pre_add, relu, join)
    training = TrainingCall(*fields)
    y, mask, total, mean, var, mean2, var2 = training.fake()
    z, kept = x if pre_add is None else total, (residual, *bn2[:2], mean2, var2) if two_bn else (None,) * 5
    fields = (y, z, *args[1:3], mean, var, EPS, *kept, mask if join else None, relu, None, True, residual is not None)
    backward = BackwardCall(*fields)
    ranks = RanksCall(mean.new_empty(2, 2 * len(mean) + 1), mean, var, 0.1)
    return [apply, training, backward, *([ranks] if case.id == "bn-relu" else [])]


def lacking(device: torch.device) -> dict[str, str]:
    """Why a backend is not checked."""
    found = {name: registry.unavailable(name, device) for name in registry.BACKENDS}
    return {name: reason for name, reason in found.items() if reason is not None}


def interpreted() -> tuple[list[Row], dict[str, str]]:
    """`rows` and `lacking` of Triton's interpreter on a CPU, from a process of its own: Triton decides when it loads.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    found = json.loads(process.run("-m", f"{__package__}.parity", TRITON_INTERPRET="1"))
    return found["rows"], found["lacking"]


if __name__ == "__main__":
    cpu = torch.device("cpu")
    json.dump({"rows": list(rows(cpu)), "lacking": lacking(cpu)}, sys.stdout)
