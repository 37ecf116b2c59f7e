"""Whole models measured: parity before speed, and which arguments are refused."""

import importlib.util
import json
import math
import statistics
import sys
import types

import pytest
import torch
from bench_runs import by_name, run_command

import resnet_fused
from resnet_fused import bench, models
from resnet_fused.bench import cases, engine, host, timing
from resnet_fused.cli import main
from resnet_fused.deploy import engines
from resnet_fused.models.resnet import BasicBlock

SMALL = dict(model="resnet18", batch=2, image_size=64, device="cpu", rounds=2)
CPU = torch.device("cpu")


@pytest.fixture
def plant(monkeypatch):
    """Puts `wrong` between a resnet_fused model and its logits."""
    pytest.importorskip("torchvision")

    def plant(wrong):
        def get_model(name, **kwargs):
            model = models.get_model(name, **kwargs)
            model.fc.register_forward_hook(lambda module, args, logits: wrong(logits))
            return model

        monkeypatch.setattr(cases, "models", types.SimpleNamespace(get_model=get_model, list_models=models.list_models))

    return plant


@pytest.fixture
def timed(monkeypatch):
    """The variants that were handed over for timing."""
    names = []

    def time_rounds(calls, rounds, device, **kwargs):
        names.extend(calls)
        return {name: [1.0] * rounds for name in calls}

    monkeypatch.setattr(engine, "time_rounds", time_rounds)
    monkeypatch.setattr(engine, "latency", lambda call, device: [1.0, 1.0])
    return names


def test_command_writes_table_and_json(tmp_path, capsys):
    pytest.importorskip("torchvision")
    path = tmp_path / "report.json"
    variants = "torchvision-nchw,torchvision-nhwc,resnet_fused,resnet_fused-cuda"
    small = ("--model", "resnet18", "--batch", 2, "--image-size", 64, "--device", "cpu", "--rounds", 2)
    assert run_command(*small, "--variants", variants, "--json", path) == 1  # one that was asked for is missing

    table = capsys.readouterr().out
    for word in (
        "resnet18 inference",
        "img/s",
        "ratio",
        " bits",
        " absent",
        "against torchvision-nhwc",
        *variants.split(","),
    ):
        assert word in " ".join(table.split())
    assert "MiB" not in table and max(map(len, table.splitlines())) <= 80
    assert list(tmp_path.iterdir()) == [path], "a partial file was left behind"
    report = json.loads(path.read_text())
    assert (report["task"], report["model"], report["batch"], report["image_size"]) == ("inference", "resnet18", 2, 64)
    assert (report["dtype"], report["device"], report["baseline"]) == ("float32", "cpu", "torchvision-nhwc")
    conditions = report["conditions"]
    assert conditions["torch"] == torch.__version__
    assert conditions["threads"] == torch.get_num_threads()
    assert conditions["resnet_fused"] == resnet_fused.__version__
    assert conditions["device"].startswith("CPU ")
    assert {
        "date",
        "command",
        "cpu",
        "cpus",
        "load",
        "python",
        "platform",
        "torchvision",
        "triton",
        "cuda",
    } <= conditions.keys()

    nchw, nhwc, ours, cuda = report["results"]
    assert ours["bit_identical"] and ours["error"] == nhwc["error"] <= ours["limit"]
    assert ours["ran"]["eager"] == 20
    assert cuda["status"] == "unavailable" and "cuda" in cuda["reason"] and not cuda["samples_ms"]
    for result in (nchw, nhwc, ours):
        assert result["status"] == "measured"
        assert len(result["samples_ms"]) == len(result["ratios"]) == 2
        assert result["ratios"] == [b / s for b, s in zip(nhwc["samples_ms"], result["samples_ms"], strict=True)]
        assert result["img_per_s"] == pytest.approx(2e3 / result["ms_quartiles"][1])


@pytest.mark.parametrize(
    "wrong",
    [lambda y: y * 1.001, lambda y: y.roll(1, 0), lambda y: y * math.nan, lambda y: y + torch.finfo(y.dtype).eps],
    ids=["scaled", "images swapped", "NaN", "last bits"],
)
def test_wrong_variant_is_refused_and_not_timed(plant, timed, wrong):
    plant(wrong)
    report = bench.run(variants=["torchvision-nchw", "resnet_fused"], **SMALL)
    result = by_name(report)["resnet_fused"]
    assert (result.status, result.samples_ms, result.ratios) == ("refused", [], [])
    assert timed == ["torchvision-nchw"]
    assert not report.ok
    assert "resnet_fused refused: " in report.table()
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("factor", [1.001, math.nan, math.inf])
def test_variant_that_need_not_have_the_same_bits_is_refused_for_its_error(monkeypatch, timed, factor):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: lambda x: model(x) * factor)
    report = bench.run(variants=["torchvision-compile", "torchvision-nhwc"], **SMALL)
    assert by_name(report)["torchvision-compile"].status == "refused"
    assert timed == ["torchvision-nhwc"] and not report.ok
    json.dumps(report.to_dict(), allow_nan=False)


def test_refused_variant_gives_exit_status_1(plant, timed, capsys):
    plant(lambda logits: logits + 1)
    small = ("--model", "resnet18", "--batch", 1, "--image-size", 64, "--device", "cpu")
    assert run_command(*small, "--variants", "resnet_fused") == 1
    assert "refused" in capsys.readouterr().out


def test_variants_of_which_none_can_run_are_an_error_and_no_table(capsys):
    pytest.importorskip("torchvision")
    small = ("bench", "--model", "resnet18", "--batch", "1", "--image-size", "32", "--device", "cpu")
    assert main([*small, "--variants", "resnet_fused-cuda,resnet_fused+graph"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "error: none of the variants can run: resnet_fused-cuda: " in err.splitlines()[-1]
    assert "; resnet_fused+graph: CUDA graphs need a CUDA device" in err
    assert main(["bench", "--suite", "ops", "--device", "cpu", "--variants", "cuda,cudnn"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "error: none of the variants can run: cuda: " in err and "; cudnn: " in err


def test_failing_variant_leaves_the_others(plant, timed):
    def fail(logits):
        raise RuntimeError("the kernel broke\nsecond line")

    plant(fail)
    report = bench.run(variants=["resnet_fused", "torchvision-nhwc"], baseline="resnet_fused", **SMALL)
    result = by_name(report)["resnet_fused"]
    assert (result.status, result.reason) == ("failed", "the kernel broke")
    assert timed == ["torchvision-nhwc"]
    assert by_name(report)["torchvision-nhwc"].ratios == []  # the baseline was not timed
    assert not report.ok and "-" in report.table()


def test_compile_that_cannot_run_is_unavailable(monkeypatch, timed):
    pytest.importorskip("torchvision")

    def no_compiler(model, **kwargs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    report = bench.run(variants=["torchvision-nhwc", "torchvision-compile"], **SMALL)
    assert "torchvision-compile unavailable: no C++ compiler" in report.table()
    assert timed == ["torchvision-nhwc"] and not report.ok and report.asked


@pytest.mark.parametrize("shared", [SMALL, SMALL | dict(image_size=33, suite="training")], ids=["eval", "train"])
def test_resnet_fused_is_measured_compiled_too(monkeypatch, timed, shared):
    pytest.importorskip("torchvision")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: compiled.append(type(model)) or model)
    report = bench.run(variants=["torchvision-nhwc", "resnet_fused+compile"], **shared)
    assert report.ok and timed == ["torchvision-nhwc", "resnet_fused+compile"] and compiled == [models.ResNet]


def test_bfloat16_is_held_to_torchvisions_own_error(timed):
    pytest.importorskip("torchvision")
    report = bench.run(variants=["torchvision-nchw", "torchvision-nhwc", "resnet_fused"], dtype="bfloat16", **SMALL)
    results = by_name(report)
    assert report.ok and results["resnet_fused"].bit_identical
    assert 2 * results["torchvision-nhwc"].error < results["resnet_fused"].limit < 3 * results["torchvision-nhwc"].error


def test_images_of_bytes(timed, monkeypatch):
    variants = ["torchvision-nchw", "torchvision-nhwc", "resnet_fused", "resnet_fused-onednn"]
    report = bench.run(variants=variants, of_bytes=True, **SMALL)
    assert report.ok and timed == variants and by_name(report)["resnet_fused"].bit_identical
    assert "2 x 3 x 64 x 64 bytes, float32" in report.table()
    normalise = models.ResNet.set_input_normalization
    monkeypatch.setattr(models.ResNet, "set_input_normalization", lambda self, mean, std: normalise(self, std, std))
    assert by_name(bench.run(variants=variants, of_bytes=True, **SMALL))["resnet_fused"].status == "refused"
    for wrong, given in (({"fuse": True}, "'inference', fuse True"), ({"suite": "training"}, "'training', fuse False")):
        with pytest.raises(ValueError, match=f"inference and without fuse, got suite {given}"):
            bench.run(of_bytes=True, **SMALL, **wrong)
    with pytest.raises(ValueError, match="--bytes goes with --suite inference and without --fuse, got --suite ops"):
        run_command("--bytes", "--suite", "ops")


TRAINING = SMALL | dict(image_size=33, suite="training")


def test_train_step_has_torchvisions_bits_and_is_timed(tmp_path, capsys):
    pytest.importorskip("torchvision")
    path = tmp_path / "report.json"
    small = ("--suite", "training", "--model", "resnet18", "--batch", 2, "--image-size", 33, "--device", "cpu")
    variants = "torchvision-nchw,torchvision-nhwc,resnet_fused,resnet_fused-onednn"
    assert run_command(*small, "--rounds", 2, "--variants", variants, "--json", path) == 1  # oneDNN does not train
    table = capsys.readouterr().out
    assert "resnet18 training" in table and "ms: of a train step" in table
    report = json.loads(path.read_text())
    assert report["task"] == "training"
    nchw, nhwc, ours, onednn = report["results"]
    assert ours["bit_identical"] and 0 < ours["error"] == nhwc["error"] < ours["limit"] and ours["ran"]["eager"] == 20
    assert all(result["status"] == "measured" and len(result["samples_ms"]) == 2 for result in (nchw, nhwc, ours))
    assert onednn["status"] == "unavailable" and not onednn["samples_ms"]


def test_train_step_under_autocast(timed):
    pytest.importorskip("torchvision")
    report = bench.run(variants=["torchvision-nhwc", "resnet_fused"], dtype="bfloat16", **TRAINING)
    assert report.ok and by_name(report)["resnet_fused"].bit_identical
    assert by_name(report)["resnet_fused"].error > 1e-3, "autocast was off"


def test_variants_of_one_suite_or_one_device_say_so(timed):
    names = ["torchvision-nhwc", "resnet_fused+graph", "resnet_fused+blocks"]
    results = by_name(bench.run(**SMALL, variants=names))
    assert [r.status for r in results.values()] == ["measured", "unavailable", "unavailable"]
    assert "need a CUDA device" in results["resnet_fused+graph"].reason
    results = by_name(bench.run(variants=names, **TRAINING))
    assert [r.status for r in results.values()] == ["measured", "unavailable", "measured"]
    assert timed == ["torchvision-nhwc", "torchvision-nhwc", "resnet_fused+blocks"]


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.001


@pytest.mark.parametrize(
    "wrong",
    [WrongGradient.apply, lambda y: y + torch.arange(y.shape[1]) * 1e-3, lambda y: y * math.nan],
    ids=["gradient", "loss", "NaN"],
)
@pytest.mark.parametrize("library", ["resnet_fused", "torchvision-compile"])
def test_wrong_train_step_is_refused_and_not_timed(plant, timed, monkeypatch, library, wrong):
    if library == "resnet_fused":
        plant(wrong)
    else:  # need not have the same bits
        monkeypatch.setattr(
            torch,
            "compile",
            lambda model, **kwargs: (
                model.fc.register_forward_hook(lambda module, args, logits: wrong(logits)) and model
            ),
        )
    report = bench.run(variants=["torchvision-nhwc", library], **TRAINING)
    result = by_name(report)[library]
    assert result.status == "refused" and not result.error <= result.limit
    assert timed == ["torchvision-nhwc"] and not report.ok
    json.dumps(report.to_dict(), allow_nan=False)


def test_latency_of_short_calls_is_timed_call_by_call():
    median, p99 = timing.latency(lambda: sum(range(2000)), CPU)
    assert 0 < median <= p99
    report = bench.run(**SMALL | dict(model="resnet18", image_size=32, batch=1), variants=["resnet_fused"])
    [result] = report.results
    expected = statistics.median(result.samples_ms) <= timing.SHORT_MS
    assert (len(result.latency_ms) == 2) is expected


def test_deployed_and_peers_are_variants_of_inference_on_the_cpu(timed):
    names = ["torchvision-nhwc", "resnet_fused+deploy", "onnxruntime", "openvino"]
    for dtype, asked in (("float32", names), ("bfloat16", names[:3])):
        results = by_name(bench.run(**SMALL | dict(image_size=32), variants=asked, dtype=dtype))
        for name, result in results.items():
            absent = name == "openvino" and not importlib.util.find_spec(name)
            if absent or (name, dtype) == ("onnxruntime", "bfloat16"):
                assert result.status == "unavailable" and result.reason
            else:
                assert result.status == "measured" and result.error <= result.limit, (name, dtype, result.reason)
    results = by_name(bench.run(**TRAINING, variants=names[:2]))
    assert results["resnet_fused+deploy"].status == "unavailable"


def test_a_wrong_peer_is_shown_and_not_timed(timed, monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "onnxruntime", lambda net, x: lambda x: net(x) * 1.01)
    report = bench.run(**SMALL, variants=["torchvision-nhwc", "onnxruntime"])
    assert by_name(report)["onnxruntime"].status == "refused" and timed == ["torchvision-nhwc"] and not report.ok


def test_unknown_suites_are_told_with_all_that_there_are():
    with pytest.raises(ValueError, match="--suite: unknown 'speed'; there are: inference, training, .*host"):
        run_command("--suite", "speed")


def test_host_measures_the_model_that_is_named(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(host, "run", lambda names, rounds: asked.append((list(names), rounds)) or ({"task": "host"}, 0))
    assert run_command("--suite", "host", "--model", "resnet34", "--json", tmp_path / "a.json") == 0
    assert run_command("--suite", "host") == 0
    assert asked == [(["resnet34"], host.ROUNDS), (list(host.MODELS), host.ROUNDS)]
    assert json.loads((tmp_path / "a.json").read_text()) == {"task": "host"}
    monkeypatch.undo()
    with pytest.raises(ValueError, match="host has no 'resnet51'"):
        run_command("--suite", "host", "--model", "resnet51")
    with pytest.raises(ValueError, match="--fuse goes with --suite inference or training, got --suite host"):
        run_command("--suite", "host", "--fuse")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(model="resnet51"), ["model", "resnet51", "resnet50"]),
        (dict(model="timm/resnet50d"), ["model", "timm/resnet50d", "--fuse"]),
        (dict(variants=["resnet_fused", "tensorrt"]), ["variants", "tensorrt", "torchvision-nhwc"]),
        (dict(baseline="resnet_fused-cuda"), ["baseline", "resnet_fused-cuda", "torchvision-nchw"]),
        (dict(suite="eval"), ["suite", "eval", "training"]),
        (dict(dtype="float64"), ["dtype", "float64", "bfloat16"]),
        (dict(batch=0), ["batch", "0"]),
        (dict(rounds=0), ["rounds", "0"]),
        (dict(image_size=16), ["image_size", "16"]),
        (dict(device="tpu"), ["device", "tpu", "cuda"]),
        (dict(device="cuda:99"), ["cuda:99"]),
        (dict(variants=[]), ["variants"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as error:
        bench.run(**(dict(device="cpu") | arguments))
    assert all(word in str(error.value) for word in words)


def test_unwritable_json_is_told_before_measuring(tmp_path):
    with pytest.raises(ValueError, match="--json"):
        run_command("--json", tmp_path / "absent" / "report.json")


def test_missing_torchvision_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"torchvision.*pip install"):
        bench.run(device="cpu")


def test_default_variants_are_those_that_are_there():
    variants = bench.default_variants(CPU)
    assert variants[:3] == ("torchvision-nchw", "torchvision-nhwc", "torchvision-compile")
    assert variants[3:6] == ("torchvision-freezing", "resnet_fused", "resnet_fused+compile")
    assert "resnet_fused+deploy" in variants and set(variants) <= set(bench.VARIANTS)
    assert bench.default_variants(CPU, "training") == (*variants[:3], *variants[4:6])
    assert not {"resnet_fused-eager", "resnet_fused-cuda", "resnet_fused-triton"} & set(variants)


@pytest.mark.parametrize("model", ["timm/resnet18d", "mobilenet_v3_small"])
@pytest.mark.parametrize("suite", ["inference", "training"])
def test_other_peoples_models_beside_themselves_fused(model, suite, capsys):
    small = ("--batch", 2, "--image-size", 64, "--device", "cpu", "--rounds", 2, "--suite", suite)
    names = "original-nchw,original-nhwc,fused,fused-onednn"
    assert run_command("--model", model, "--fuse", *small, "--variants", names) == (suite == "training")  # no oneDNN
    rows = {
        line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith(("orig", "fused"))
    }
    assert rows["fused"].startswith("fused ran") or "original-nhwc's bits" in rows["fused"]
    assert set(rows) >= set(names.split(","))


def test_other_peoples_models_are_checked_by_name():
    with pytest.raises(ValueError, match="model: unknown 'timm/resnet51'"):
        bench.run("timm/resnet51", fuse=True, device="cpu")
    with pytest.raises(ValueError, match="model: unknown 'fcn_resnet50'"):
        bench.run("fcn_resnet50", fuse=True, device="cpu")
    with pytest.raises(ValueError, match="variants: unknown 'resnet_fused'"):
        bench.run("resnet18", fuse=True, device="cpu", variants=["resnet_fused"])


@pytest.mark.parametrize("make", [host.forward, host.train_step], ids=["inference", "training"])
def test_eager_models_are_no_slower_than_torchvisions_on_the_cpu(make, one_thread):
    """A gate: the ratio of the least CPU times of one run, interleaved, never an absolute time."""
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    pair = {"theirs": theirs, "ours": models.ResNet(BasicBlock, [1, 1, 1, 1])}
    pair = {name: model.to(memory_format=torch.channels_last) for name, model in pair.items()}
    x = torch.randn(2, 3, 112, 112).contiguous(memory_format=torch.channels_last)
    calls = {name: make(model, x) for name, model in pair.items()}
    least, ratio = dict.fromkeys(calls, math.inf), math.inf
    for _ in range(8):  # until a quiet moment was met by both
        found = host.least(calls, 5, CPU)
        least = {name: min(least[name], us) for name, us in found.items()}
        ratio = least["ours"] / least["theirs"]
        if ratio <= 1.15:
            return
    pytest.fail(f"{ratio:.2f} times torchvision's CPU time")
