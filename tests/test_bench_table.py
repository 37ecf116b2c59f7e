"""resnet-fused bench: how it times, and what its table and its file say of that."""

import json
import re

import pytest
import torch
from bench_runs import by_name

from resnet_fused import bench
from resnet_fused.bench import timing

CPU = torch.device("cpu")


def test_rounds_are_interleaved_and_rotated(monkeypatch):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    monkeypatch.setattr(timing, "_sample_ms", lambda call, repeats, device: call() or 200.0 / len(order))
    samples = bench.time_rounds(calls, 4, CPU, min_sample_ms=100)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"  # the first to find the repeats
    assert samples["a"] == [200 / 4, 200 / 9, 200 / 11, 200 / 13]


def test_short_calls_are_repeated(monkeypatch):
    repeats = []
    monkeypatch.setattr(timing, "_sample_ms", lambda call, n, device: repeats.append(n) or call())
    assert bench.time_rounds({"short": lambda: 0.3, "long": lambda: 150.0}, 1, CPU, min_sample_ms=100)["short"] == [0.3]
    assert repeats[2:] == [334, 1]
    assert bench.time_rounds({}, 3, CPU) == {}


def test_time_limit_leaves_three_rounds():
    samples = bench.time_rounds({"a": lambda: None}, 10, CPU, min_sample_ms=0.01, seconds=0)
    assert len(samples["a"]) == 3


def test_ratios_are_taken_pair_by_pair():
    baseline = [10.0, 40.0, 10.0]  # the second round fell into a slow phase
    assert bench.paired_ratios(baseline, [5.0, 20.0, 4.0]) == [2.0, 2.0, 2.5]
    assert bench.paired_ratios([], [5.0]) == bench.paired_ratios(baseline, []) == []
    with pytest.raises(ValueError):
        bench.paired_ratios(baseline, [5.0])


def test_table_shows_medians_and_quartiles():
    conditions = bench.conditions(CPU)
    a = bench.Result("torchvision-nchw", "nchw", error=1e-6, limit=2e-6, samples_ms=[10.0, 40.0, 10.0, 12.0, 14.0])
    b = bench.Result(
        "resnet_fused", "nhwc", error=1e-6, limit=2e-6, samples_ms=[5.0, 20.0, 4.0, 6.0, 7.0], peak_mib=512.2
    )
    for result in (a, b):
        result.ratios = bench.paired_ratios(a.samples_ms, result.samples_ms)
    report = bench.Report("resnet50", 8, 224, "float32", "cpu", "torchvision-nchw", conditions, [a, b])
    row = next(line for line in report.table().splitlines() if line.startswith("resnet_fused"))
    assert row.split()[1:] == ["1333", "6.000", "5.00-7.00", "2.00", "2.00-2.00", "512", "ok"]
    text = " ".join(report.table().split())
    assert "(limit 2.0e-06): torchvision-nchw 1.0e-06, resnet_fused 1.0e-06" in text


def noisy(load=0.0, **samples):
    """A report with these times and nothing measured."""
    conditions = bench.conditions(CPU) | {"load": load, "cpus": 2, "device": "CPU of a name that is long " * 3}
    names = {"ours": "resnet_fused+activations", "theirs": "torchvision-nhwc", "compiled": "torchvision-compile+graph"}
    results = [
        bench.Result(names[n], "nhwc", error=1e-6, limit=2e-6, samples_ms=ms, peak_mib=40960.0)
        for n, ms in samples.items()
    ]
    for result in results:
        result.ratios = bench.paired_ratios(samples["theirs"], result.samples_ms)
    return bench.Report("resnext101_64x4d", 128, 224, "bfloat16", "cuda", names["theirs"], conditions, results)


def test_ratios_agree_with_the_times_that_are_shown():
    report = noisy(theirs=[10.0, 30.0, 11.0, 30.0, 12.0], ours=[13.0, 14.0, 30.0, 13.0, 40.0])
    rows = {line.split()[0]: line.split() for line in report.table().splitlines() if line.startswith(("torch", "res"))}
    ours, theirs = rows["resnet_fused+activations"], rows["torchvision-nhwc"]
    assert float(ours[4]) == pytest.approx(float(theirs[2]) / float(ours[2]), abs=0.005)
    assert float(ours[4]) == pytest.approx(float(ours[1]) / float(theirs[1]), abs=0.005)
    assert ours[4] == "0.86" and ours[5] == "0.37-2.14"  # the median of the paired ratios is 0.77
    assert json.loads(json.dumps(report.to_dict()))["results"][1]["ratio"] == 12 / 14


def test_noise_is_a_warning():
    near, far = [11.9, 12.0, 12.1, 12.2], [5.0, 5.1, 5.2, 5.3]
    quiet = noisy(theirs=[12.0, 12.1, 12.2, 12.3], compiled=far)
    assert quiet.warnings() == [] and "warning" not in quiet.table()
    report = noisy(load=0.6, theirs=[12.0, 12.1, 12.2, 12.3], ours=near, compiled=far)
    overlap, load = report.warnings()
    assert "torchvision-nhwc's times overlap those of resnet_fused+activations," in overlap
    assert "the load was 0.6 on 2 CPUs at the start" in load
    assert report.table().count("warning: ") == 2 and report.to_dict()["warnings"] == [overlap, load]


def test_one_round_is_a_warning():
    report = noisy(theirs=[12.0], compiled=[5.0])
    assert report.warnings() == ["1 round: no fewer than 3 tell a difference from noise"]


def test_a_spread_over_five_percent_is_said():
    report = noisy(theirs=[10.0, 10.1, 10.2], ours=[5.0, 6.0, 7.0])
    [warning] = report.warnings()
    assert warning.startswith("noisy") and "resnet_fused+activations 17%" in warning and "nhwc" not in warning
    assert [entry["spread"] > 0.05 for entry in report.to_dict()["results"]] == [False, True]


def test_the_fastest_of_the_package_leads_the_table():
    conditions = bench.conditions(CPU)
    times = {"torchvision-nhwc": 10.0, "onnxruntime": 6.0, "resnet_fused": 9.0, "resnet_fused+deploy": 5.0}
    results = [bench.Result(name, "nhwc", error=0.0, limit=1.0, samples_ms=[ms] * 10) for name, ms in times.items()]
    for result in results:
        result.ratios = bench.paired_ratios(results[0].samples_ms, result.samples_ms)
    report = bench.Report("resnet50", 8, 224, "float32", "cpu", "torchvision-nhwc", conditions, results)
    lead = "this package's fastest: resnet_fused+deploy, 1600 img/s, 1.20x the speed of onnxruntime, the fastest of "
    assert report.lead() == lead + "the others"
    by_name(report)["resnet_fused+deploy"].ran = {"engine openvino": 1}
    assert "fastest: resnet_fused+deploy (engine openvino), 1600 img/s" in report.lead()
    rows = [line.split()[0] for line in report.table().splitlines() if line.endswith(" ok")]
    assert rows == ["resnet_fused+deploy", "torchvision-nhwc", "onnxruntime", "resnet_fused"]
    assert "rounds:" not in report.table()
    for result in results:
        result.samples_ms = result.samples_ms[:4]
    assert "rounds: 4 of 10, as more would take over 40 s" in " ".join(report.table().split())


def test_conditions_say_what_runs():
    found = bench.conditions(CPU)
    assert found["gpu"] == {} and "openvino" in found
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", found["commit"])


def test_the_table_fits_80_columns():
    times = [1234.5, 1300.0, 1345.6]
    report = noisy(load=3.0, theirs=times, ours=times, compiled=[t / 9.99 for t in times])
    report.results[0].reason = "a long reason " * 20
    lines = report.table().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.endswith(" ok") for line in lines) == 3  # no row is broken


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    bench.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        bench.write_json(path, {"a": 2, "b": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_result_name():
    name = bench.result_name("inference", "float16", "nhwc", CPU)
    assert name.startswith(f"inference-float16-nhwc-torch{torch.__version__.split('+')[0]}-cuda")
    assert name.endswith(".json") and not set(name) & set(" /+")
