"""Every case of `testing.CASES` under every backend that is there: microseconds, GB/s, ratio to eager.

`pytest benchmarks --benchmark-only` prints the table; `python benchmarks/ops.py --out DIR` writes one file a dtype.
A call is timed as a program makes it, launch included. A case whose result is wrong fails and is not timed.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fused import BackendUnavailable, bench
from resnet_fused.dispatch import registry
from resnet_fused.testing import CASES, OPS, Case, as_tuple, assert_within_budget, make_inputs, nan_filled_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 10
SAMPLE_MS = 5.0


def _dtypes() -> list[str]:
    return ["float16", "bfloat16", "float32"] if DEVICE.type == "cuda" else ["float32", "bfloat16"]


def _backends() -> list[str]:
    there = [name for name in registry.BACKENDS if registry.unavailable(name, DEVICE) is None]
    return [name for name in there if DEVICE.type == "cuda" or name != "triton"]  # not its interpreter


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = [case for case in CASES if DEVICE.type == "cuda" or not case.large]
    dtypes = metafunc.config.getoption("--dtype") or _dtypes()
    params = [
        pytest.param(case, bench.DTYPES[dtype], backend, id=f"{case.id}-{dtype}-{backend}")
        for dtype in dtypes
        for case in cases
        for backend in _backends()
    ]
    metafunc.parametrize(("case", "dtype", "backend"), params)


@functools.lru_cache(maxsize=1)  # the backends of a case come one after the other
def _inputs(case_id: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    case = next(case for case in CASES if case.id == case_id)
    return make_inputs(case, dtype=dtype, device=DEVICE)


def _timer() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.mark.benchmark(timer=_timer)
@torch.no_grad()
def test_op(benchmark: Any, record_property: Any, case: Case, dtype: torch.dtype, backend: str) -> None:
    args, kwargs = _inputs(case.id, dtype)

    def call(name: str) -> object:
        with registry.backend(name):
            return OPS[case.op](*args, **kwargs)

    try:
        with nan_filled_memory():
            results = as_tuple(call(backend))
    except BackendUnavailable as error:
        pytest.skip(str(error))
    assert_within_budget(case, results, args, kwargs)
    del results

    calls = {name: functools.partial(call, name) for name in ("eager", backend)}
    samples = bench.time_rounds(calls, ROUNDS, DEVICE, min_sample_ms=SAMPLE_MS)
    us = statistics.median(samples[backend]) * 1e3
    info = dict(
        case=case.id,
        op=case.op,
        shape=list(case.shape),
        dtype=str(dtype).removeprefix("torch."),
        backend=backend,
        microseconds=us,
        bytes=case.bytes(dtype),
        gb_per_s=case.bytes(dtype) / us / 1e3,
        tflop_per_s=case.flops() / us / 1e6,
        ratio_to_eager=statistics.median(bench.paired_ratios(samples["eager"], samples[backend])),
    )
    benchmark.extra_info.update(info)
    record_property("op", info)
    benchmark.pedantic(call, (backend,), rounds=ROUNDS, iterations=max(1, round(SAMPLE_MS * 1e3 / us)), warmup_rounds=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--dtypes", nargs="+", choices=bench.DTYPES, default=_dtypes())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    status = 0
    for dtype in args.dtypes:
        path = args.out / bench.result_name("ops", dtype, "nhwc", DEVICE)
        status |= pytest.main([__file__, "-q", "--benchmark-only", "--dtype", dtype, f"--benchmark-json={path}"])
    return status


if __name__ == "__main__":
    sys.exit(main())
