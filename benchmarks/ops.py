"""Every case of `testing.CASES` under every backend that is there: microseconds, GB/s, ratio to eager.

`pytest benchmarks --benchmark-only` prints the table; `resnet-fused bench --suite ops` is the same without pytest.
A call is timed as a program makes it, launch included. A case whose result is wrong fails and is not timed.
"""

import functools
import time
from typing import Any

import pytest
import torch

from resnet_fused import BackendUnavailable, bench
from resnet_fused.bench import ops
from resnet_fused.bench.ceilings import SAMPLE_MS, Ceilings, measured
from resnet_fused.bench.ops import ROUNDS
from resnet_fused.bench.parity import backends
from resnet_fused.testing import CASES, Case, as_tuple, assert_within_budget, make_inputs, nan_filled_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtypes() -> list[str]:
    return ["float16", "bfloat16", "float32"] if DEVICE.type == "cuda" else ["float32", "bfloat16"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = [case for case in CASES if DEVICE.type == "cuda" or not case.large]
    dtypes = metafunc.config.getoption("--dtype") or _dtypes()
    params = [
        pytest.param(case, bench.DTYPES[dtype], backend, id=f"{case.id}-{dtype}-{backend}")
        for dtype in dtypes
        for case in cases
        for backend in backends(DEVICE)
    ]
    metafunc.parametrize(("case", "dtype", "backend"), params)


@functools.lru_cache(maxsize=1)  # the backends of a case come one after the other
def _inputs(case_id: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    case = next(case for case in CASES if case.id == case_id)
    return make_inputs(case, dtype=dtype, device=DEVICE)


@functools.cache
def _ceilings(dtype: torch.dtype) -> Ceilings:
    return measured(dtype, DEVICE)


def _timer() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.mark.benchmark(timer=_timer)
@torch.no_grad()
def test_op(benchmark: Any, record_property: Any, case: Case, dtype: torch.dtype, backend: str) -> None:
    args, kwargs = _inputs(case.id, dtype)

    calls = {name: functools.partial(ops.call, case, name, args, kwargs) for name in ("eager", backend)}
    try:
        with nan_filled_memory():
            results = as_tuple(calls[backend]())
    except BackendUnavailable as error:
        pytest.skip(str(error))
    assert_within_budget(case, results, args, kwargs)
    del results

    samples = bench.time_rounds(calls, ROUNDS, DEVICE, min_sample_ms=SAMPLE_MS)
    info = dict(case=case.id, op=case.op, shape=list(case.shape), dtype=str(dtype).removeprefix("torch."))
    info |= dict(backend=backend, bytes=case.bytes(dtype))
    info |= ops.figures(case, dtype, samples[backend], samples["eager"], _ceilings(dtype))
    us = info["microseconds"]
    benchmark.extra_info.update(info)
    record_property("op", info)
    benchmark.pedantic(calls[backend], rounds=ROUNDS, iterations=max(1, round(SAMPLE_MS * 1e3 / us)), warmup_rounds=1)
