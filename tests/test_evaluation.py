"""resnet-fused eval: views, scores and errors."""

import json
import math
import re
import sys

import pytest
import torch
from cli_runs import fails_fixture, output_fixture  # noqa: F401
from evaluation_runs import CLASSES, NARROW, SMALL, saved_fixture  # noqa: F401
from PIL import Image
from skimage import data as photographs
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torchvision.transforms import functional as tvf
from torchvision.transforms import v2

from resnet_fused import models
from resnet_fused.evaluation import (
    CENTER,
    SINGLE,
    TEN_CROPS,
    Network,
    Samples,
    evaluate,
    fully_convolutional,
    multi_scale,
)
from resnet_fused.evaluation.networks import _imagenet
from resnet_fused.evaluation.scores import Scorer, _rank, group
from resnet_fused.train import load_model
from resnet_fused.train.augment import Normalise, center_crop

CPU = torch.device("cpu")


def noise(height, width, seed=0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return tvf.to_pil_image(torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator))


def probabilities(network: Network, image: Image.Image) -> Tensor:
    """[classes], of an image that is taken as it is."""
    x = (tvf.to_tensor(image) - network.mean) / network.std
    with torch.inference_mode():
        return network.model(x[None])[0].double().softmax(0)


def score(network: Network, views, *images: Image.Image) -> Tensor:
    with torch.inference_mode():
        return Scorer(network, views, CPU, torch.float32)(group([views.transform(image) for image in images]))


def test_the_stem_takes_bytes_where_that_is_the_networks_normalisation():
    mean, model = torch.full((3, 1, 1), 0.5), models.cifar_resnet20().eval()
    model.set_input_normalization(0.5, 0.25)
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    for shape, std, dtype in (
        ((3, 1, 1), 0.25, torch.uint8),
        ((3, 1, 1), 0.5, torch.float32),  # another network with the same model
        ((3, 32, 32), 0.25, torch.float32),
    ):
        network = Network("net", model, mean.expand(shape), torch.full(shape, std), None, "r")
        found, expected = score(network, SINGLE, noise(32, 32)), probabilities(network, noise(32, 32))
        torch.testing.assert_close(found[0], expected)
        assert seen == [dtype, torch.float32]
        seen.clear()
    assert model.input_mean.tolist() == [0.5] * 3 and model.input_std.tolist() == [0.25] * 3


# views


class Pointwise(nn.Module):
    """Reads every 32nd pixel: what it says of a crop does not depend on what lies around."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1, stride=32)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(torch.relu(self.conv1(x))), 1))


def test_fully_convolutional_is_the_mean_over_all_crops():
    torch.manual_seed(0)
    model, x = Pointwise(), torch.randn(2, 3, 224 + 32, 224 + 64)
    crops = [x[:, :, i : i + 224, j : j + 224] for i in (0, 32) for j in (0, 32, 64)]
    expected = sum(model(crop) for crop in crops) / 6
    torch.testing.assert_close(fully_convolutional(model)(x), expected)
    assert not torch.allclose(model(x), expected, atol=1e-3)  # global pooling is something else


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
def test_fully_convolutional_is_the_network_at_the_size_of_a_crop(name):
    torch.manual_seed(0)
    model, x = models.get_model(name, **NARROW).eval(), torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        before = model(x)
        torch.testing.assert_close(fully_convolutional(model)(x), before)
        assert fully_convolutional(model)(torch.randn(2, 3, 256, 320)).shape == (2, 10)
        assert torch.equal(model(x), before)


def test_one_scale_of_a_square_image_is_the_mean_of_the_image_and_its_mirror(saved):
    network, image = Network.from_checkpoint(saved("resnet18", recipe="imagenet", **NARROW)), noise(224, 224)
    expected = (probabilities(network, image) + probabilities(network, tvf.hflip(image))) / 2
    torch.testing.assert_close(score(network, multi_scale([224]), image)[0], expected, atol=1e-6, rtol=1e-5)


def test_scales_are_averaged_and_images_of_other_shapes_stay_apart(saved):
    network = Network.from_checkpoint(saved("resnet18", recipe="imagenet", **NARROW))
    images = [noise(240, 300), noise(230, 230, 1), noise(230, 230, 2), noise(240, 300, 3)]
    both = score(network, multi_scale([224, 256]), *images)
    apart = [torch.cat([score(network, multi_scale([s]), image) for image in images]) for s in (224, 256)]
    torch.testing.assert_close(both, (apart[0] + apart[1]) / 2, atol=1e-6, rtol=1e-5)


def test_ten_crops_are_the_mean_over_corners_centre_and_mirrors(saved):
    network, image = Network.from_checkpoint(saved("resnet18", recipe="imagenet", **NARROW)), noise(256, 300)
    expected = torch.zeros(10, dtype=torch.float64)
    for x in (image, tvf.hflip(image)):
        for left, top in ((0, 0), (76, 0), (0, 32), (76, 32), (38, 16)):
            expected += probabilities(network, x.crop((left, top, left + 224, top + 224)))
    torch.testing.assert_close(score(network, TEN_CROPS, image)[0], expected / 10, atol=1e-6, rtol=1e-5)


def test_center_crop_is_what_training_evaluates_on():
    image = noise(300, 280)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (CENTER.transform(image)[0][0] / 255 - mean) / std
    torch.testing.assert_close(x, v2.Compose([*center_crop(), Normalise(mean, std)])(image))


# scores


def hand_count(scores: Tensor, labels: list[int]) -> tuple[float, float]:
    """Top-1 and top-5 error in percent."""
    ranks = [sorted(range(len(s)), key=lambda i, s=s: -s[i]).index(y) for s, y in zip(scores, labels, strict=True)]
    return tuple(100 * sum(rank >= k for rank in ranks) / len(ranks) for k in (1, 5))


def test_errors_and_ensembles_by_hand(saved):
    networks = [Network.from_checkpoint(saved("cifar_resnet20", seed)) for seed in (0, 1)]
    samples = Samples("synthetic:200x16", SINGLE)
    images, labels = samples._data.images, samples._data.labels.tolist()
    with torch.inference_mode():
        scores = [n.model((images / 255 - n.mean) / n.std).softmax(1) for n in networks]
    for chosen, expected in ((networks[:1], scores[0]), (networks, scores[0] + scores[1])):
        result = evaluate(chosen, samples, batch=16)
        assert (result.top1_error, result.top5_error) == pytest.approx(hand_count(expected, labels))
        assert result.images == 50 and sum(row["images"] for row in result.per_class) == 50
        wrong = sum(row["images"] * row["top1_error"] for row in result.per_class)
        assert wrong / 50 == pytest.approx(result.top1_error)
    for row, name in zip(result.per_class, CLASSES, strict=True):
        mine = [i for i, y in enumerate(labels) if CLASSES[y] == name]
        assert row["class"] == name
        assert row["top1_error"] == pytest.approx(hand_count(expected[mine], [labels[i] for i in mine])[0])


def test_limited_samples_are_spread_over_the_split():
    whole, part = Samples("synthetic:200x16", SINGLE), Samples("synthetic:200x16", SINGLE, limit=10)
    assert len(part) == 10
    assert torch.equal(part[9][0][0], whole[45][0][0]) and part[9][1] == whole[45][1]


def test_classes_are_matched_by_name_where_the_names_are_known():
    network = Network("n", nn.Module(), torch.zeros(3, 1, 1), torch.ones(3, 1, 1), ("a", "b", "c", "b"), "imagenet")
    network.model.fc = nn.Linear(1, 4)
    assert network.targets(("c", "a")).tolist() == [2, 0]
    assert network.targets(("w", "x", "y", "z")).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="n has 4 classes, the data have 2, of which 'b' is none of them"):
        network.targets(("a", "b"))  # two outputs have that name
    with pytest.raises(ValueError, match="of which 'd' is none of them"):
        network.targets(("a", "c", "d", "e"))  # as many, but others


def test_of_equal_scores_the_first_counts_as_higher():
    scores = torch.tensor([[2.0, 3.0, 3.0, 1.0, 3.0]]).expand(5, 5)
    ranks = _rank(scores, torch.arange(5))
    assert ranks.tolist() == [3, 0, 1, 4, 2] and scores[0].argmax() == ranks.argmin()


# resnet-fused eval


def test_eval_agrees_with_the_training_that_made_the_checkpoint(output, tmp_path):
    argv = ("--iterations", 4, "--batch", 20, "--lr", "0.02", "--out", tmp_path / "run")
    output("train", *SMALL, *argv)
    result = json.loads(output("eval", tmp_path / "run", "--device", "cpu", "--json"))  # on its own data
    assert result["top1_error"] == pytest.approx(load_model(tmp_path / "run")[1]["evaluation"][1])
    assert result.pop("top5_error") <= result.pop("top1_error")
    assert result == {
        "networks": [str(tmp_path / "run")],
        "data": "synthetic:60x16",
        "views": "the whole image",
        "device": "cpu",
        "backend": "auto",
        "dtype": "fp32",
        "images": 15,
        "per_class": [],
    }


def test_eval_as_text(saved, output):
    path, other = saved("cifar_resnet20"), saved("cifar_resnet20", 1)
    text = output("eval", path, other, *SMALL, "--per-class", "--images", 10)
    assert f"ensemble of {path}, {other}\nsynthetic:60x16, 10 images, the whole image, cpu" in text
    assert "top-1 error " in text and "top-5 error " in text and re.search(r"pattern 9 +1 +\d", text)
    few = saved("resnet18", classes=("a", "b"), recipe="imagenet", widths=(8, 8, 8, 8))
    with pytest.raises(AssertionError, match="has 2 classes, the data have 10, of which 'pattern 0' is none of them"):
        output("eval", few, *SMALL)


def test_photographs_under_the_papers_own_weights(msra, output, tmp_path):
    for split in ("train", "val"):
        for name, image in (("Egyptian cat", photographs.chelsea()), ("espresso", photographs.coffee())):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.fromarray(image).save(folder / "photo.png")
    argv = ("eval", "--model", "resnet50", "--weights", "MSRA", "--data", f"imagefolder:{tmp_path}", "--workers", 0)
    result = json.loads(output(*argv, "--json", "--scales", 224, 256, "--per-class"))
    assert (result["images"], result["top1_error"], result["top5_error"]) == (2, 0, 0)
    assert result["views"] == "fully convolutional, short sides 224, 256"
    assert [row["class"] for row in result["per_class"]] == ["Egyptian cat", "espresso"]
    (tmp_path / "val" / "espresso").rename(tmp_path / "val" / "a dish")
    with pytest.raises(AssertionError, match="has 1000 classes, the data have 2, of which 'a dish' is none of them"):
        output(*argv)


@pytest.fixture
def imagenette(tmp_path):
    """Noise in the folders of some of ImageNet's wnids; which outputs stand for them."""
    outputs = {"n03394916": 566, "n01440764": 0, "n02102040": 217}  # French horn, tench, English springer
    for wnid in outputs:
        (folder := tmp_path / "val" / wnid).mkdir(parents=True)
        noise(230, 250).save(folder / "noise.png")
    return f"imagefolder:{tmp_path}", [outputs[wnid] for wnid in sorted(outputs)]


def test_a_subset_of_imagenet_by_wnids_is_matched_with_the_thousand_outputs(imagenette):
    data, outputs = imagenette
    model = models.resnet18(widths=(8, 8, 8, 8))
    nn.init.zeros_(model.fc.weight), nn.init.zeros_(model.fc.bias)
    with torch.no_grad():
        model.fc.bias[outputs[1]] = 1  # always that class, whatever the image
    network = Network("n", model.eval(), torch.zeros(3, 1, 1), torch.ones(3, 1, 1), _imagenet(1000), "imagenet")
    assert network.targets(Samples(data, CENTER).classes).tolist() == outputs
    result = evaluate([network], Samples(data, CENTER), workers=0)
    assert [row["top1_error"] for row in result.per_class] == [100, 0, 100]
    with pytest.raises(ValueError, match="of which 'n99999999' is none of them"):
        network.targets(("n01440764", "n99999999"))
    few = network._replace(model=models.resnet18(**NARROW), classes=None)
    with pytest.raises(ValueError, match="of which 'n01440764' is none of them"):
        few.targets(("n01440764", "n02102040"))


def test_wnids_are_in_torchvisions_order():
    names = _imagenet(1000)
    order = dict(zip(ImageNetInfo("imagenet-1k").label_names(), names, strict=True))
    assert order["n01440764"] == "tench" and order["n02123045"] == "tabby" and order["n03394916"] == "French horn"
    assert sorted(order) == list(order)


def test_a_subset_of_imagenet_without_timm(imagenette, monkeypatch, fails, msra):
    for name in [m for m in sys.modules if m.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in fails("eval", "resnet50:MSRA", "--data", imagenette[0], "--workers", 0)


def test_published_weights_as_an_ensemble(msra, imagenette, output, tmp_path):
    torch.manual_seed(0)
    torch.save(models.resnet18().state_dict(), tmp_path / "r.pth")
    argv = ("eval", "resnet50:MSRA", f"resnet18:{tmp_path / 'r.pth'}", "--data", imagenette[0], "--workers", 0)
    result = json.loads(output(*argv, "--json", "--device", "cpu"))
    assert result["networks"] == ["resnet50, weights MSRA", f"resnet18, weights {tmp_path / 'r.pth'}"]
    assert result["images"] == 3 and result["views"] == "center crop of 224, short side 256"


def test_workers_give_what_the_process_itself_gives(imagenette, saved):
    network = Network.from_checkpoint(saved("resnet18", recipe="imagenet", widths=(8, 8, 8, 8)))
    network = network._replace(classes=("n01440764", "n02102040", "n03394916", *"abcdefg"))
    for views in (CENTER, multi_scale([224, 256])):
        samples = Samples(imagenette[0], views)
        assert evaluate([network], samples, workers=0) == evaluate([network], samples, workers=2, batch=2)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "name a run of resnet-fused train, or MODEL:WEIGHTS such as resnet50:MSRA"),
        (["nowhere"], "checkpoint nowhere: there is no such file"),
        (["{cifar}", "--data", "mnist"], "data must be cifar10"),
        (["{cifar}", "--data", "synthetic:40x32"], "takes images of 16 x 16, these are 32 x 32"),
        (["{cifar}", "--crops", "10"], "--crops and --scales are for networks that see crops"),
        (["{cifar}", "--crops", "5"], "invalid choice"),
        (["{cifar}", "--data", "imagefolder:x"], "an image folder is for networks that see crops"),
        (["{imagenet}", "--scales", "200"], "scales must be short sides from 224 on, got [200]"),
        (["{imagenet}", "--data", "imagefolder:nowhere"], "there is no nowhere/val"),
        (["{cifar}", "{imagenet}"], "they make no ensemble"),
        (["{cifar}", "--batch", "0"], "--batch must be at least 1, got 0"),
        (
            ["{cifar}", "--model", "resnet18", "--weights", "x.pth"],
            "--model goes with --weights, and without other networks",
        ),
        (
            ["--model", "resnet18", "--data", "synthetic:40x32"],
            "--model goes with --weights, and without other networks",
        ),
        (["--model", "resnet18", "--weights", "x.pth", "--data", "synthetic:40x32"], "there is no such file"),
        (
            ["--model", "cifar_resnet20", "--weights", "x", "--data", "synthetic:40x32"],
            "none are published for cifar_resnet20",
        ),
        (["resnet50:IMAGENET1K_V9"], "ResNet50_Weights has IMAGENET1K_V1, IMAGENET1K_V2"),
        (["resnet18:x.pth"], "there is no such file"),
        (["cifar_resnet20:{cifar}", "--data", "mnist"], "data must be cifar10"),
        (["resnet50:{cifar}"], "are a run of cifar_resnet20, not of resnet50"),
        (["{cifar}", "--device", "mars"], 'device must be "cpu", "cuda" or "cuda:N", got \'mars\''),
    ],
)
def test_bad_arguments_of_eval(saved, fails, argv, message):
    paths = {}
    if any("{" in arg for arg in argv):
        paths = {
            "cifar": saved("cifar_resnet20"),
            "imagenet": saved("resnet18", recipe="imagenet", widths=(8, 8, 8, 8)),
        }
    assert message in fails("eval", *(arg.format(**paths) for arg in argv))


def test_a_folder_of_few_classes_and_an_image_that_cannot_be_read(saved, output, fails, tmp_path):
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    noise(230, 250).save(folder / "noise.png")
    argv = ("eval", saved("resnet18", recipe="imagenet", classes=("a",), widths=(8, 8, 8, 8)))
    argv += ("--data", f"imagefolder:{tmp_path}", "--device", "cpu")
    text = output(*argv, "--crops", 10, "--workers", 0)
    assert "1 images, 10 crops of 224, short side 256, cpu, backend auto, fp32" in text
    assert "top-1 error    0.00 %" in text and "top-5 error: left out, there are fewer than 5 classes" in text
    (folder / "broken.png").write_bytes(b"no image")
    assert f"error: image {folder / 'broken.png'} can't be read: " in fails(*argv, "--workers", 1)


def test_scores_that_are_not_finite(saved):
    network = Network.from_checkpoint(saved("cifar_resnet20"))
    network.model.fc.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="are not finite"):
        evaluate([network], Samples("synthetic:60x16", SINGLE))


def test_a_forced_backend_serves_the_evaluation(saved, output):
    path = saved("cifar_resnet20")
    results = [json.loads(output("eval", path, *SMALL, "--json", "--backend", b)) for b in ("eager", "onednn")]
    assert [r.pop("backend") for r in results] == ["eager", "onednn"] and results[0] == results[1]
