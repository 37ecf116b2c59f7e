"""resnet-fused reproduce: every figure and table of the papers, at a tiny fraction on patterns for images."""

import csv
import dataclasses
import json
import re
import signal

import pytest
import torch
from PIL import Image

from resnet_fused import cli, models
from resnet_fused.reproduce import EXPERIMENTS, runs
from resnet_fused.train.interrupt import Interrupted

SMALL = (
    "--data",
    "synthetic:40x8",
    "--device",
    "cpu",
    "--batch",
    "4",
    "--lr",
    "1e-3",
    "--images",
    "2",
    "--workers",
    "0",
)
ONCE = ("--fraction", "1e-6")  # one iteration
NARROW = {"widths": (16, 16, 16, 16)}  # 8: oneDNN breaks the heap in the backward of a strided 1x1 convolution
SHALLOW = {  # without those of a thousand layers
    "fig6": ["20", "56", "110"],
    "table6": ["20", "56", "110"],
    "v2-fig1": ["110"],
    "v2-table3": ["110", "164"],
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    """The networks for ImageNet with few channels."""

    def narrow(families):
        return tuple(dataclasses.replace(family, kwargs=family.kwargs | NARROW) for family in families)

    for name, experiment in EXPERIMENTS.items():
        if experiment.recipe == "imagenet":
            panels = tuple((title, narrow(families), depths) for title, families, depths in experiment.panels)
            changed = dataclasses.replace(experiment, families=narrow(experiment.families), panels=panels)
            monkeypatch.setitem(EXPERIMENTS, name, changed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of all figures: networks in common are trained once."""
    return tmp_path_factory.mktemp("reproduced")


@pytest.fixture
def reproduce(capsys, folder):
    def reproduce(*argv):
        assert cli.main(["reproduce", *SMALL, "-o", str(folder), *argv]) == 0, capsys.readouterr().err
        return capsys.readouterr()

    return reproduce


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_draws(reproduce, folder, name):
    depths = ["--depths", *SHALLOW[name]] if name in SHALLOW else []
    text = reproduce(name, *ONCE, *depths).out
    rows = list(csv.DictReader((folder / f"{name}.csv").open()))
    kept = json.loads((folder / f"{name}.json").read_text())
    experiment = EXPERIMENTS[name]
    assert experiment.title in text and (folder / f"{name}.txt").read_text().rstrip() in text
    assert [{key: "" if v is None else str(v) for key, v in row.items()} for row in kept["rows"]] == rows
    if name != "table1":
        assert kept["conditions"]["iterations"] == 1 and "1 iterations of 4" in text
        networks, _ = experiment.networks([int(d) for d in SHALLOW.get(name, [])] or None)
        labels = [network.label for network in networks]
        assert rows[0]["network"] == "ensemble of " + ", ".join(labels) if name == "table5" else True
        assert name == "table5" or [row["network"] for row in rows] == labels
        assert all(label in text for label in labels)
    if experiment.figure:
        with Image.open(folder / f"{name}.png") as plot:
            assert plot.width >= 900
        assert "</svg>" in (folder / f"{name}.svg").read_text()
    else:
        assert not (folder / f"{name}.png").exists()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_networks_are_there(name):
    experiment = EXPERIMENTS[name]
    names = {family.model.format(depth) for family in experiment.families for depth in family.depths}
    assert names <= set(models.list_models())
    labels = {family.label.format(depth) for family in experiment.families for depth in family.depths}
    assert set(experiment.paper) <= labels | {"ensemble"}


def test_table_1_is_the_papers(reproduce, folder):
    reproduce("table1")
    rows = {row["layer name"]: row for row in csv.DictReader((folder / "table1.csv").open())}
    assert [row["output size"] for row in rows.values()] == ["112x112", "56x56", "28x28", "14x14", "7x7", "1x1", ""]
    assert rows["conv1"]["ResNet-34"] == "7x7 64, stride 2"
    assert rows["conv4_x"]["ResNet-18"] == "[3x3 256, 3x3 256] x 2"
    assert rows["conv4_x"]["ResNet-152"] == "[1x1 256, 3x3 256, 1x1 1024] x 36"
    flops = [float(rows["10^9 FLOPs"][f"ResNet-{d}"].split()[0]) for d in (18, 34, 50, 101, 152)]
    assert flops == pytest.approx([1.8, 3.6, 3.8, 7.6, 11.3], rel=0.02)


def test_errors_are_the_runs(reproduce, folder):
    """What stands in the table is in the runs' logs, beside the paper's number."""
    text = reproduce("fig6", "--depths", "20", "--fraction", "4e-5").out
    row = next(row for row in csv.DictReader((folder / "fig6.csv").open()) if row["network"] == "ResNet-20")
    run = folder / "runs" / "cifar_resnet20-3-fp32-seed0"
    assert float(row["test error"]) == float(list(csv.DictReader((run / "eval.csv").open()))[-1]["error"])
    assert float(row["training error"]) == float(list(csv.DictReader((run / "train.csv").open()))[-1]["error"])
    assert row["paper"] == "8.75" and row["parameters"] == "269722" and "0.27 M" in text


def test_finished_runs_are_not_repeated(reproduce, folder, monkeypatch):
    """Nor is what was found on them; a run that was stopped goes on."""
    reproduce("fig7", *ONCE, "--depths", "20")
    checkpoints = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/checkpoint.pt")}
    with monkeypatch.context() as patch:
        patch.setattr(runs, "responses", lambda *args: pytest.fail("they are there"))
        reproduce("fig7", *ONCE, "--depths", "20")
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == checkpoints
    asked = []
    monkeypatch.setattr(runs, "train", lambda *args, **kwargs: asked.append(kwargs["resume"]))
    reproduce("fig1", *ONCE, "--depths", "20")
    assert asked == [True]


def test_a_stopped_run_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def stop(*args, **kwargs):
        raise Interrupted(signal.SIGINT, "SIGINT after iteration 1, which is saved")

    monkeypatch.setattr(runs, "train", stop)
    assert cli.main(["reproduce", "fig1", *SMALL, "-o", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "resnet-fused: fig1 was stopped by SIGINT; the same command goes on\n"


def test_a_depth_without_its_twin_is_skipped(reproduce, folder):
    found = reproduce("fig4", *ONCE, "--depths", "18", "50")
    assert "fig4: depth 50 is skipped: there is no plain-50 to compare with" in found.err
    assert [row["network"] for row in csv.DictReader((folder / "fig4.csv").open())] == ["plain-18", "ResNet-18"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["table2", "--depths", "50"], "--depths leave nothing of table 2: .* there is no plain-50 to compare with"),
        (["fig1", "--depths", "21"], "--depths must be out of 20, 32, 44, 56, 110 for figure 1: .*, got 21"),
        (["fig1", "--fraction", "0"], "--fraction must be above 0 and at most 1, got 0.0"),
        (["fig7", "--images", "0"], "--images must be at least 1, got 0"),
        (["fig1", "fig4"], "figure 4: .*: needs --data imagefolder:FOLDER, with train/CLASS/\\* and val/CLASS/\\*"),
        (["fig1", "--data", "imagefolder:x"], "recipe cifar takes no image folder"),
    ],
)
def test_errors(argv, message, capsys, tmp_path):
    assert cli.main(["reproduce", "--device", "cpu", "-o", str(tmp_path / "out"), *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.search(message, lines[0]), lines
    assert not list(tmp_path.iterdir())
