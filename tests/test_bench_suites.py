"""The suites of operators: parity, ops, and the roofline of layers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_runs import run_command
from torch import nn

import resnet_fused
from resnet_fused import models
from resnet_fused.bench import collect, parity
from resnet_fused.bench.ceilings import Ceilings
from resnet_fused.models.resnet import BasicBlock
from resnet_fused.testing import CASES, OPS

CPU = torch.device("cpu")


def few_cases(monkeypatch):
    from resnet_fused.bench import ops

    few = [case for case in CASES if case.id in ("conv-1x1-join", "bn-two-bn-join", "bn-empty")]
    for module in (ops, parity):
        monkeypatch.setattr(module, "CASES", few)
    monkeypatch.setattr(ops, "ROUNDS", 2)


def test_parity_is_beside_pytorchs_own(monkeypatch, tmp_path, capsys):
    pytest.importorskip("torchvision")
    few_cases(monkeypatch)
    path = tmp_path / "parity.json"
    asked = ("--suite", "parity", "--dtype", "bfloat16,float32", "--model", "resnet18", "--device", "cpu")
    assert run_command(*asked, "--json", path) == 0
    report = json.loads(path.read_text())
    rows = {row["key"]: row for row in report["rows"]}
    assert len(rows) == 8 and report["conditions"]["torch"] == torch.__version__
    join = rows["conv-1x1-join bfloat16"]
    assert 1e-4 < join["pytorch"]["mean"] < join["pytorch"]["max"] < 0.1
    assert join["backends"]["eager"]["max"] == join["pytorch"]["max"]
    assert rows["resnet18 float32"]["backends"]["eager"]["max"] == rows["resnet18 float32"]["pytorch"]["max"] < 1e-4
    assert rows["bn-empty float32"]["pytorch"]["max"] is None and "bn-two-bn-join" in capsys.readouterr().out


def test_parity_shows_what_is_wrong(monkeypatch, tmp_path):
    few_cases(monkeypatch)
    right = OPS["conv_bn_act"]
    monkeypatch.setitem(OPS, "conv_bn_act", lambda *args, **kwargs: right(*args, **kwargs) + 0.5)
    monkeypatch.setattr(parity, "network", lambda *args: {"what": "model", "backends": {}})
    monkeypatch.setattr(parity, "line", str)
    path = tmp_path / "parity.json"
    small = ("--dtype", "float32", "--model", "resnet18", "--device", "cpu", "--json", path)
    assert run_command("--suite", "parity", *small) == 1
    [row] = [row for row in json.loads(path.read_text())["rows"] if row.get("name") == "conv-1x1-join"]
    eager = row["backends"]["eager"]
    assert eager["status"] == "refused" and eager["max"] == pytest.approx(0.5, 1e-4)


def test_ops_suite_has_floors_and_ratios(monkeypatch, tmp_path, capsys):
    few_cases(monkeypatch)
    monkeypatch.setattr("resnet_fused.bench.ceilings.measured", lambda dtype, device: Ceilings(1e9, 1e12))
    path = tmp_path / "ops.json"
    asked = ("--suite", "ops", "--dtype", "float32", "--variants", "eager,cuda", "--device", "cpu", "--json", path)
    assert run_command(*asked) == 0
    report = json.loads(path.read_text())
    [row] = [row for row in report["rows"] if row["case"] == "conv-1x1-join"]
    eager = row["backends"]["eager"]
    assert row["backends"]["cuda"]["status"] == "unavailable" and eager["ratio_to_eager"] == 1
    assert eager["share_of_floor"] == pytest.approx(row["bytes"] / 1e9 * 1e6 / eager["microseconds"])
    assert report["conditions"]["ceilings"]["float32"]["bytes_per_s"] == 1e9 and "of floor" in capsys.readouterr().out
    with pytest.raises(ValueError, match="variants: unknown 'tensorrt'; the suite ops has: .*compile"):
        run_command("--suite", "ops", "--variants", "tensorrt")


def test_rows_go_on_where_a_run_was_cut_off(tmp_path):
    path, made = tmp_path / "rows.json", []

    def make(key):
        if key == "broken":
            raise KeyboardInterrupt
        return made.append(key) or {"value": key}

    def run(keys, resume, head, commit="a", release="1.0"):
        rows = [(key, lambda key=key: make(key)) for key in keys]
        head = head | {"conditions": {"commit": commit, "resnet_fused": release, "load": len(made)}}
        return collect.collect(head, rows, path, resume, lambda row: row["key"])

    with pytest.raises(KeyboardInterrupt):
        run(["a", "b", "broken"], True, {"task": "ops"})
    assert [row["key"] for row in json.loads(path.read_text())["rows"]] == ["a", "b"]
    report = run(["a", "b", "c"], True, {"task": "ops"})
    assert made == ["a", "b", "c"] and [row["value"] for row in report["rows"]] == made
    with pytest.raises(ValueError, match="--resume"):
        run(["a"], True, {"task": "parity"})
    assert len(run(["a"], True, {"task": "ops"}, commit="b")["rows"]) == 1 and made[-1] == "a"
    assert len(run(["a"], False, {"task": "parity"})["rows"]) == 1
    # without a checkout the release tells the sources
    made.clear()
    for release in ("1.0", "1.0", "1.1"):
        run(["a"], True, {"task": "parity"}, None, release)
    assert made == ["a", "a"]


def test_ops_times_right_operators_and_no_wrong_one(tmp_path):
    pytest.importorskip("pytest_benchmark")
    folder = Path(__file__).parent.parent / "benchmarks"
    if not folder.is_dir():
        pytest.skip("benchmarks/ comes with the sources only")
    path = tmp_path / "ops.json"
    program = f"""
import sys, pytest
from resnet_fused.testing import OPS
right = OPS["conv_bn_act"]
OPS["conv_bn_act"] = lambda *args, **kwargs: right(*args, **kwargs) + 1
cases = "bn-two-bn-join-float32-eager or conv-1x1-join-float32-eager"
options = ["-k", cases, "--benchmark-only", "--benchmark-json={path}", "-pno:cacheprovider"]
sys.exit(pytest.main([{str(folder)!r}, *options]))
"""
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    env = dict(alone, CUDA_VISIBLE_DEVICES="", PYTHONPATH=os.pathsep.join([str(folder.parent), *sys.path]))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout and "conv-1x1-join: result 0 is off by" in done.stdout
    assert re.search(r"bn-two-bn-join +float32 +eager +[\d.]+ +[\d.]+ +0.00 +1.00", done.stdout)
    [benchmark] = json.loads(path.read_text())["benchmarks"]
    info = benchmark["extra_info"]
    assert (info["case"], info["ratio_to_eager"]) == ("bn-two-bn-join", 1)
    assert info["bytes"] == 3 * 2 * 64 * 14 * 14 * 4
    assert info["gb_per_s"] == pytest.approx(info["bytes"] / info["microseconds"] / 1e3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same program runs on the GPU with make gpu")
def test_roofline_has_every_layer_and_counts_each_byte(monkeypatch, capsys):
    folder = Path(__file__).parent.parent / "benchmarks"
    if not folder.is_dir():
        pytest.skip("benchmarks/ comes with the sources only")
    monkeypatch.syspath_prepend(str(folder))
    roofline = pytest.importorskip("roofline")
    monkeypatch.setattr(roofline, "milliseconds", lambda call, device: call() is None or 1.0)
    monkeypatch.setattr(roofline.ceilings, "measured", lambda dtype, device: Ceilings(1e9, 1e9))
    monkeypatch.setattr(roofline, "backends", lambda device: ["cudnn", "triton"])
    monkeypatch.setattr(
        roofline.bench, "time_rounds", lambda calls, *a, **k: {n: [f() is None or 2.0] for n, f in calls.items()}
    )
    model = models.ResNet(BasicBlock, [2, 1, 1, 1])
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 10)
    x = torch.randn(1, 3, 32, 32)
    with resnet_fused.backend("triton"):
        found = roofline.measure("inference", model, x)["calls"]
        assert sum(row["layers"] for row in found) == 8
        stem = found[0]
        moved = 4 * (3 * 32 * 32 + 64 * 3 * 49 + 4 * 64 + 64 * 8 * 8)  # nothing of the 16 x 16 map
        assert stem["best"] == "triton" and stem["gb_per_s"] == pytest.approx(moved / 1e6)
        assert stem["tflop_per_s"] == pytest.approx(2 * 64 * 16 * 16 * 3 * 49 / 1e9)
        training = roofline.measure("training", model, x.expand(2, -1, -1, -1))
    layers = {row["op"]: 0 for row in training["calls"]}
    for row in training["calls"]:
        layers[row["op"]] += row["layers"]
    assert list(layers.values()) == [8, 7, 7, 7]  # a shortcut joins in the block's end
    joins = [(row["residual"], row["residual_bn"]) for row in training["against_pytorch"]]
    assert (True, True) in joins and (True, False) in joins and (False, False) in joins
    assert "all layers:" in capsys.readouterr().out
