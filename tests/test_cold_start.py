"""The first run on a device with nothing remembered: right numbers, and one warning where something is wrong."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from batch_norm_train import check_case
from conftest import VIRTUAL

from resnet_fused.dispatch import registry, store, trust
from resnet_fused.testing import CASES, check

pytestmark = pytest.mark.virtual_gpu
CONV, JOIN = (next(c for c in CASES if c.id == id) for id in ("conv-3x3-join", "bn-join"))

PROCESS = """
import sys, virtual_gpu
virtual_gpu.install(int(sys.argv[1]))
import torch
from batch_norm_train import check_case
from resnet_fused.testing import CASES, check
for case in CASES:
    if case.id in ("conv-3x3-join", "conv-1x1-join"):
        check(case, dtype=torch.float16, device="cuda")
    if case.id == "bn-join":
        check_case(case, torch.float16, "auto", "cuda")
"""


@pytest.fixture(autouse=True)
def _cold(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path)
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"
    trust.forget()
    yield
    trust.forget()


def run():
    """What is told while a convolution and a training step run within the budget."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(2):
            check(CONV, dtype=torch.float16, device="cuda")
            check_case(JOIN, torch.float16, "auto", "cuda")
    return [str(w.message) for w in told]


def test_with_nothing_wrong_nothing_is_told(tmp_path):
    assert run() == []
    (path,) = tmp_path.glob("verdicts-*.json")
    assert set(json.loads(path.read_text())["entries"].values()) == {""}


def test_a_cache_that_can_not_be_written(monkeypatch):
    monkeypatch.setattr(store, "cache_dir", lambda: Path("/proc/self/no-such-folder"))
    (message,) = run()
    assert "can't be written" in message


@pytest.mark.parametrize(
    "backend, case", [("triton", CONV), ("cuda", CONV), ("cudnn", CONV), ("triton", JOIN), ("cuda", JOIN)],
    ids=lambda value: getattr(value, "id", value),
)  # fmt: skip
def test_a_kernel_planted_wrong(backend, case, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "enabled", backend == "cudnn")
    if reason := registry.unavailable(backend, torch.device("cuda", 0)):
        pytest.skip(reason)
    implementation = registry.implementation(backend, case.op)
    plan = implementation.plan

    def wrong(call, config):
        run = plan(call, config)

        def off(call):
            results = run(call)
            first = results if isinstance(results, torch.Tensor) else results[0]
            return first + 0.1 if first is results else (first + 0.1, *results[1:])

        return off

    monkeypatch.setattr(implementation, "plan", wrong)
    order = {name: (backend, *names) if backend in names else names for name, names in registry._ORDER.items()}
    monkeypatch.setattr(registry, "_ORDER", order)
    told = run()
    assert all(f"/{backend}/" in message and "is disabled on this device" in message for message in told)
    assert len(told) == len(set(told)) == (1 if case is CONV else 2)  # forward and backward are a class each


def test_two_processes_at_once(tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path]), "RESNET_FUSED_HOME": str(tmp_path)}
    command = [sys.executable, "-W", "default::UserWarning:resnet_fused", "-c", PROCESS, VIRTUAL or ""]
    processes = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        told = process.communicate(timeout=500)[1]
        assert process.returncode == 0 and "resnet_fused:" not in told, told
    (path,) = tmp_path.glob("verdicts-*.json")
    assert set(json.loads(path.read_text())["entries"].values()) == {""}
