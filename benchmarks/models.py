"""Three whole models, beside torchvision's, for pytest-benchmark: one forward pass, its numbers checked first."""

import functools
import time

import pytest
import torch
import torchvision

from resnet_fused import bench
from resnet_fused.bench.cases import Inference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = ("resnet18", "resnet50", "resnext50_32x4d")
VARIANTS = ("torchvision-nhwc", "resnet_fused", "resnet_fused+deploy")
BATCH, SIZE = (32, 224) if DEVICE.type == "cuda" else (1, 224)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    dtypes = metafunc.config.getoption("--dtype") or (["float16"] if DEVICE.type == "cuda" else ["float32"])
    metafunc.parametrize("variant", VARIANTS)  # the innermost: a model is built once
    metafunc.parametrize(("model", "dtype"), [(model, dtype) for model in MODELS for dtype in dtypes])


@functools.lru_cache(maxsize=1)
def _case(model: str, dtype: str) -> Inference:
    return Inference(torchvision, model, BATCH, SIZE, bench.DTYPES[dtype], DEVICE)


def _timer() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.mark.benchmark(timer=_timer)
def test_model(benchmark, model: str, dtype: str, variant: str) -> None:
    case = _case(model, dtype)
    result, call = case.prepare(variant)
    assert result.status == "measured", result.reason
    benchmark.extra_info.update(model=model, dtype=dtype, variant=variant, batch=BATCH, error=result.error)
    with case.grad_mode():
        benchmark.pedantic(call, rounds=10, iterations=10 if DEVICE.type == "cuda" else 1, warmup_rounds=1)
