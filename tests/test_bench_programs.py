"""The programs in benchmarks/: tables of documents, gpu.sh, resnet.py, and pytest-benchmark."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_fused import bench

CPU = torch.device("cpu")


@pytest.fixture
def tables(monkeypatch):
    folder = Path(__file__).parent.parent / "benchmarks"
    if not folder.is_dir():
        pytest.skip("benchmarks/ comes with the sources only")
    monkeypatch.syspath_prepend(str(folder))
    return pytest.importorskip("tables")


def test_the_documents_tables_are_those_of_the_committed_results(tables, capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
    assert "<!-- generated: traffic " in (tables.ROOT / "README.md").read_text()


def test_a_table_that_disagrees_with_its_results_is_found_and_mended(tables, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "written", functools.partial(tables.written, root=tmp_path))
    times = {"torchvision-nhwc": 10.0, "resnet_fused": 8.0}
    results = [bench.Result(name, "nhwc", samples_ms=[ms] * 3) for name, ms in times.items()]
    results.append(bench.Result("openvino", "nhwc", status="refused", reason="error 1e-1"))
    for result in results:
        result.ratios = bench.paired_ratios(results[0].samples_ms, result.samples_ms)
    report = bench.Report("resnet50", 8, 224, "float32", "cpu", "torchvision-nhwc", bench.conditions(CPU), results)
    bench.write_json(tmp_path / "a.json", report.to_dict())
    document = tmp_path / "doc.md"
    document.write_text("before\n\n<!-- generated: inference a.json -->\nold\n<!-- end -->\n\nafter\n")
    assert tables.main(["--check", str(document)]) == 1 and "old" in document.read_text()
    assert tables.main([str(document)]) == 0 and tables.main(["--check", str(document)]) == 0
    text = document.read_text()
    assert text.index("| resnet_fused | 1000.0 | 1.25 |") < text.index("| torchvision-nhwc | 800.0 | 1.00 |")
    assert "openvino (error 1e-1)" in text and text.startswith("before") and text.endswith("after\n")
    document.write_text(text.replace("1000.0", "1001.0"))
    assert tables.main(["--check", str(document)]) == 1
    document.write_text("<!-- generated: inference absent.json -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="absent.json is not there"):
        tables.main([str(document)])


def test_a_table_of_several_files_is_of_one_machine(tables, tmp_path):
    paths = []
    for batch, took in ((1, "pytorch"), (16, "onnxruntime")):
        times = {"torchvision-nhwc": 10.0, "resnet_fused+deploy": 8.0}
        results = [bench.Result(name, "nhwc", samples_ms=[ms] * 3) for name, ms in times.items()]
        results[1].ran = {f"engine {took}": 1}
        for result in results:
            result.ratios = bench.paired_ratios(results[0].samples_ms, result.samples_ms)
        conditions = bench.conditions(CPU)
        report = bench.Report("resnet50", batch, 224, "float32", "cpu", "torchvision-nhwc", conditions, results)
        paths.append(tmp_path / f"{batch}.json")
        bench.write_json(paths[-1], report.to_dict())
    text = tables.peers(paths)
    assert "| variant | resnet50, 1 | resnet50, 16 |" in text and "medians of 3 to 3 interleaved rounds" in text
    assert "| resnet_fused+deploy | 125.0 (1.25) | 2000.0 (1.25) |" in text
    assert "| the engine that `resnet_fused+deploy` took | pytorch | onnxruntime |" in text
    bench.write_json(paths[0], json.loads(paths[0].read_text()) | {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="results of one machine, commit, dtype and baseline make a table"):
        tables.peers(paths)


FAKE = """#!/bin/bash
echo "$*" >> "$LOG"
[[ "$*" == *"$FAILS"* && -n "$FAILS" ]] && exit 1
exit 0
"""


@pytest.fixture
def gpu_script(tmp_path):
    """Runs benchmarks/gpu.sh with a Python that only writes down what it is asked; the status and the lines."""
    script = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"
    if not script.is_file():
        pytest.skip("benchmarks/ comes with the sources only")
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(FAKE)
    python.chmod(0o755)

    def run(part, fails=""):
        log.write_text("")
        env = dict(os.environ, PART=str(part), OUT=str(tmp_path / "out"), PYTHON=str(python), LOG=str(log), FAILS=fails)
        done = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, timeout=60)
        limits = [int(n) for n in re.findall(r"at most (\d+) s", done.stdout)]
        return done.returncode, log.read_text().splitlines()[1:], limits

    return run


def test_the_first_part_saves_the_device_first_and_goes_on_after_a_cut(gpu_script):
    status, lines, limits = gpu_script(1)
    words = ["device.py", "doctor", "suite parity", "suite ops", "--batches 1 32 256", "--suite training"]
    kept = [line for line in lines if "pip install" not in line]
    assert status == 0 and all(word in line for word, line in zip(words, kept, strict=True))
    assert sum(limits[:2]) <= 60 and sum(limits) < 540
    assert gpu_script(1)[1] == []  # all is kept
    assert gpu_script(4, fails="resnet.py")[0] == 1
    status, lines, _ = gpu_script(4)
    assert status == 0 and len(lines) == 1 and "--resume" in lines[0]


@pytest.mark.parametrize("part", [2, 3, 4, 5, 7])
def test_every_part_ends_within_nine_minutes(gpu_script, part):
    status, lines, limits = gpu_script(part)
    assert status == 0 and lines and sum(limits) < 540


def test_an_unknown_part_is_told(gpu_script):
    assert gpu_script(9)[0] == 2


def test_several_batches_go_on_where_they_were_cut_off(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "resnet.py"
    if not script.is_file():
        pytest.skip("benchmarks/ comes with the sources only")
    small = [
        "--models",
        "resnet18",
        "--image-size",
        "32",
        "--variants",
        "resnet_fused",
        "--rounds",
        "1",
        "--device",
        "cpu",
    ]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))  # the package that is tested here, installed or not
    for batches in (["1"], ["1", "2"]):
        command = [
            sys.executable,
            script,
            *small,
            "--batches",
            *batches,
            "--dtypes",
            "float32",
            "--out",
            tmp_path,
            "--resume",
        ]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    [path] = tmp_path.iterdir()
    reports = json.loads(path.read_text())
    assert [report["batch"] for report in reports] == [1, 2]
    assert done.stdout.count("resnet18 inference") == 1
    assert done.stdout.startswith("resnet18 inference, 2 x 3 x 32 x 32")


def test_two_runs_of_pytest_benchmark_are_compared(tmp_path):
    pytest.importorskip("pytest_benchmark")
    folder = Path(__file__).parent.parent / "benchmarks"
    if not folder.is_dir():
        pytest.skip("benchmarks/ comes with the sources only")
    options = ["-q", "-k", "conv-1x1-join-float32-eager", "--benchmark-only", "--benchmark-storage=store"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(folder.parent), *sys.path])}
    for more in ("--benchmark-save=one", "--benchmark-compare=0001"):
        command = [sys.executable, "-m", "pytest", str(folder), *options, more, "-pno:cacheprovider"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "(0001_one)" in done.stdout and "machine_info is different" not in done.stdout
