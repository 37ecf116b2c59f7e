"""resnet-fused predict: real weights, real photographs, probabilities, and images that can't be read."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
import torchvision
from cli_runs import (  # noqa: F401
    checkpoint_fixture,
    empty_caches_fixture,
    fails_fixture,
    no_network_fixture,
    output_fixture,
    photo_fixture,
)
from PIL import Image
from skimage import data
from torchvision.transforms import functional as tvf

from resnet_fused.cli import main, predict
from resnet_fused.evaluation import Network
from resnet_fused.models import get_model, resnet18, resnet50
from resnet_fused.train import checkpoint as runs


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
    model = resnet18(weights=checkpoint).eval().to(memory_format=torch.channels_last)
    preset = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    x = preset.transforms()(Image.open(photo))[None].contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = model(x).double().softmax(1)[0].topk(3)
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


def test_weights_that_do_not_fit(fails, photo, checkpoint):
    line = fails("predict", photo, "--model", "resnet34", "--weights", checkpoint)
    assert (
        f"weights {checkpoint} don't fit ResNet: they are of resnet18, the model is resnet34 (missing: layer1.2" in line
    )


def test_without_torchvisions_weights_msra_is_announced(photo, no_network, capsys):
    assert main(["predict", photo]) == 2
    err = capsys.readouterr().err
    assert "torchvision's weights can't be downloaded (Name or service not known): taking MSRA" in err
    assert "npm client" in err
