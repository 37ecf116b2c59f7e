"""`resnet-fused doctor` from end to end: the interpreter's part on a CPU, all of it on a GPU."""

import json
import subprocess

import pytest
import torch

import resnet_fused
from resnet_fused import cli, doctor
from resnet_fused.bench import host
from resnet_fused.dispatch import numerics, speed, store, trust
from resnet_fused.doctor import command, layers, parity, process, runs

ROW = {"operator": "conv_bn_act", "case": "conv-1x1", "dtype": "float16", "backend": "triton", "share": 0.5}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Networks eight channels wide, small images, few cases, an empty cache."""
    whole = resnet_fused.models.resnet50

    def narrow():
        model = host.narrowed(whole())
        model.conv1 = torch.nn.Conv2d(3, host.CHANNELS, 7, 2, 3, bias=False)
        return model

    monkeypatch.setattr(resnet_fused.models, "resnet50", narrow)
    monkeypatch.setattr(host, "ROUNDS", 2)
    for name, value in {"SIZE": 32, "BATCH": 2, "BATCHES": (2,)}.items():
        monkeypatch.setattr(command, name, value)
    monkeypatch.setattr(layers, "_GEMM", 64), monkeypatch.setattr(layers, "_COPY_BYTES", 4096)
    monkeypatch.setattr(parity, "CASES", ("conv-1x1-join", "bn-join"))
    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path)
    trust.forget(), speed.forget()
    yield
    trust.forget(), speed.forget()


def test_on_a_cpu_it_runs_the_interpreters_part(small, monkeypatch, tmp_path, capsys):
    rows = [ROW | {"wrong": None}]
    monkeypatch.setattr(parity, "interpreted", lambda: (rows, {"cuda": "there is no GPU"}))
    monkeypatch.setattr(host, "figures", lambda name: {"eval": (2.0, 1.0), "train": (2.0, 3.0)})
    assert cli.main(["doctor", "--device", "cpu", "--json", str(tmp_path / "found.json")]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "doctor: checking every operator, backend and dtype",
        "doctor: timing the host's part of ResNet-50 beside torchvision's",
    ]
    assert "eval 0.50x, train 1.50x" in out
    assert out.splitlines()[-1].startswith("all 1 checks passed, of triton; no GPU here: on one")
    assert "cuda is not checked: there is no GPU" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["parity"] == rows and found["environment"]["versions"]["resnet_fused"]


def test_a_failed_check_is_the_verdict_and_the_status(small, monkeypatch, capsys):
    monkeypatch.setattr(
        parity, "interpreted", lambda: ([ROW | {"wrong": "result 0 is off by 1"}, ROW | {"wrong": None}], {})
    )
    monkeypatch.setattr(host, "figures", lambda name: {})
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict == "1 of 2 checks FAILED, first conv_bn_act on triton in float16: result 0 is off by 1"


def test_the_checks_can_fail(small, monkeypatch):
    found = list(parity.rows(torch.device("cpu")))
    assert {row["backend"] for row in found} == {"triton", "onednn"}
    assert {row["operator"] for row in found} > {"conv_bn_act", "batch_norm_act_training", "batch_norm_act_backward"}
    assert all(row["wrong"] is None and 0 < row["share"] < 1 for row in found)
    limit = numerics.limit
    monkeypatch.setattr(numerics, "limit", lambda *args: limit(*args)._replace(budget=1e-12))
    assert all("is off by" in row["wrong"] and row["share"] > 1 for row in parity.rows(torch.device("cpu")))


def test_the_interpreter_has_a_process_of_its_own(monkeypatch):
    said = {"rows": [ROW], "lacking": {}}
    done = subprocess.CompletedProcess([], 0, json.dumps(said), "a\nb\n")
    given = {}
    monkeypatch.setattr(subprocess, "run", lambda command, env, **_: given.update(env) or done)
    assert parity.interpreted() == ([ROW], {}) and given["TRITON_INTERPRET"] == "1"
    done.returncode = 1
    with pytest.raises(RuntimeError, match="^b$"):
        parity.interpreted()


def test_a_file_of_the_current_folder_is_not_imported(monkeypatch, tmp_path):
    (tmp_path / "grp.py").write_text("raise ValueError('imported')")
    monkeypatch.chdir(tmp_path)
    assert process.run("-c", "import grp, resnet_fused; print(resnet_fused.__file__)").strip() == resnet_fused.__file__


def test_nothing_checked_is_no_success(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(parity, "interpreted", broken)
    monkeypatch.setattr(host, "figures", lambda name: {})
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "NOTHING was checked: the interpreter's part: no compiler"


def test_a_cold_start_is_two_processes():
    found = runs.cold_start(torch.device("cpu"), 32)
    assert found.keys() == {"cold_s", "cold_setup_s", "warm_s", "warm_setup_s"} and all(v > 0 for v in found.values())


def test_a_refused_kernels_check_runs_again_from_its_file(small, monkeypatch, tmp_path, capsys):
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3)
    bn = [torch.rand(8) + 0.5 for _ in range(4)]
    limit = numerics.limit
    with monkeypatch.context() as planted, resnet_fused.backend("triton"):
        planted.setattr(numerics, "limit", lambda *args: limit(*args)._replace(budget=1e-12))
        with (
            pytest.raises(resnet_fused.BackendUnavailable, match="--replay"),
            pytest.warns(UserWarning, match="off by"),
        ):
            resnet_fused.ops.conv_bn_act(x, weight, *bn, padding=1)
        (path,) = tmp_path.glob("refused-*.json")
        assert path.stat().st_size < 5000
        assert cli.main(["doctor", "--device", "cpu", "--replay", str(path)]) == 1
        assert "now   result 0 is off by" in capsys.readouterr().out
    assert cli.main(["doctor", "--device", "cpu", "--replay", str(path)]) == 0
    assert "then  result 0 is off by" in (out := capsys.readouterr().out) and out.endswith("now   right\n")
    for content in (
        "",
        "[]",
        path.read_text().replace("conv_bn_act", "conv"),
        path.read_text().replace("float32", "x"),
    ):
        path.write_text(content)
        assert cli.main(["doctor", "--device", "cpu", "--replay", str(path)]) == 2
        assert "is no refused kernel's file" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_it_runs_to_its_verdict(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runs, "cold_start", lambda device, size: {"cold_s": 1.0})  # of real processes
    monkeypatch.setattr(host, "figures", lambda name: {"eval": (2.0, 1.0)})
    assert cli.main(["doctor", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    inference, training = found["layers"].values()
    assert all(len(row["us"]) > 1 and row["floor_us"] > 0 for row in inference)
    assert training and all(len(row["us"]) > 1 for row in training)
    assert {row["backend"] for row in found["parity"]} >= {"triton"}
    assert len(found["end_to_end"]) == 2 and all(row["gain"] > 0 for row in found["end_to_end"])
    assert "batch 2 training" in found["verdict"] and doctor.main is command.main
