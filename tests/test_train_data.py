"""What a training run is made of: recipes, augmentation, the order of the images, CIFAR-10's files."""

import os
import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from resnet_fused import fetch
from resnet_fused.train import Settings, data, loop
from resnet_fused.train.augment import Lighting, Normalise, crop_flip, scale_jitter
from resnet_fused.train.batches import make_source
from resnet_fused.train.distributed import World
from resnet_fused.train.schedule import Schedule

CPU = torch.device("cpu")


# recipes


@pytest.mark.parametrize(
    "options, iterations, milestones",
    [
        ({}, 64_000, [32_000, 48_000]),
        ({"iterations": 2500}, 2500, [1250, 1875]),
        ({"iterations": 7}, 7, [4, 5]),
        ({"recipe": "imagenet", "data": "imagefolder:x"}, 600_000, [150_000, 300_000]),
        ({"recipe": "imagenet", "data": "imagefolder:x", "schedule": "plateau"}, 600_000, []),
        ({"recipe": "tutorial"}, 3907, []),
    ],
)
def test_schedules_are_shortened_in_proportion(options, iterations, milestones):
    settings = Settings(**options)
    settings.complete(50_000)
    assert (settings.iterations, settings.milestones()) == (iterations, milestones)


def make_schedule(milestones=(), patience=None, warm_up=False):
    return Schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1), list(milestones), patience, warm_up)


def test_learning_rate_falls_at_the_milestones():
    schedule, seen = make_schedule((4, 6)), []
    for done in range(1, 9):
        seen.append(schedule._optimizer.param_groups[0]["lr"])
        schedule.iterated(done)
    assert seen == [0.1] * 4 + [0.01] * 2 + [0.001] * 2


def test_warm_up_lasts_until_the_training_error_is_below_80_percent():
    schedule = make_schedule((2,), warm_up=True)
    schedule.trained(80.0)
    assert schedule.lr == 0.01
    other = make_schedule((2,))
    other.load_state_dict(schedule.state_dict())
    assert other._optimizer.param_groups[0]["lr"] == 0.01
    schedule.trained(79.9)
    schedule.trained(95.0)
    assert schedule.lr == 0.1
    schedule.iterated(2)
    assert schedule.lr == 0.01


def test_plateau():
    schedule = make_schedule(patience=2)
    for error in (50, 40, 45, 41):
        schedule.evaluated(error)
    assert schedule.lr == 0.1
    schedule.evaluated(40)
    assert schedule.lr == 0.01
    for error in (30, 20, 31, 31):
        schedule.evaluated(error)
    assert schedule.lr == 0.01


@pytest.mark.parametrize(
    "model, warms_up", [("cifar_resnet20", False), ("cifar_resnet110", True), ("cifar_plain110", True)]
)
def test_deep_networks_warm_up(model, warms_up, tmp_path):
    options = dict(world=World(), device=CPU, workers=0, compile=False, recompute=None)
    run = loop._Run(Settings(model=model, data="synthetic:40x8", batch=8), tmp_path, **options)
    assert run.schedule.lr == (0.01 if warms_up else 0.1)


# augmentation and order


def test_crops_and_flips_are_each_images_own():
    x = torch.rand(6, 3, 7, 5)
    offsets = torch.tensor([[0, 0], [4, 4], [8, 8], [1, 7], [8, 0], [4, 4]])
    flips = torch.tensor([False, False, True, True, False, True])
    y = crop_flip(x, offsets, flips)
    assert y.is_contiguous(memory_format=torch.channels_last)
    padded = nn.functional.pad(x, (4, 4, 4, 4))
    for i, ((row, column), flip) in enumerate(zip(offsets.tolist(), flips.tolist(), strict=True)):
        expected = padded[i, :, row : row + 7, column : column + 5]
        assert torch.equal(y[i], expected.flip(-1) if flip else expected)
    assert torch.equal(y[1], x[1])


def test_lighting_shifts_whole_channels():
    torch.manual_seed(0)
    x = torch.rand(3, 9, 9)
    shifts = torch.stack([Lighting()(x) - x for _ in range(400)])
    assert shifts.std((-1, -2)).max() < 1e-6 and shifts.mean().abs() < 0.01
    vectors, values = torch.tensor(Lighting.eigenvectors), torch.tensor(Lighting.eigenvalues)
    expected = (vectors * (0.1 * values) ** 2) @ vectors.T  # covariance
    torch.testing.assert_close(shifts.mean((-1, -2)).T.cov(), expected, rtol=0.2, atol=2e-5)


def test_imagenet_crops_come_from_many_scales():
    torch.manual_seed(0)
    image = torch.arange(300).to(torch.uint8).repeat(3, 400, 1)
    image[:, :, 256:] = 255
    transform = v2.Compose([*scale_jitter(), Normalise(torch.zeros(3, 1, 1), torch.ones(3, 1, 1) / 4, lighting=True)])
    crops = [transform(image) for _ in range(8)]
    assert all(crop.shape == (3, 224, 224) and crop.dtype == torch.float32 for crop in crops)
    slopes = [(crop[0, 0, 100] - crop[0, 0, 50]).abs().item() for crop in crops]
    assert max(slopes) > 1.3 * min(slopes)  # the ramp is stretched by 256 / 300 to 480 / 300


ALONE = World()


def source(batch=8, world=ALONE, **options):
    return make_source(Settings(data="synthetic:60x8", batch=batch, **options), world, CPU, workers=0)


def test_an_epoch_shows_every_image_once_and_runs_into_the_next():
    labels = torch.cat([y for _, y in source(recipe="tutorial").train(0, 15)])
    images = torch.cat([x for x, _ in source(recipe="tutorial").train(0, 15)]).flatten(1)
    train = data.load("synthetic:60x8")
    every = ((train.images / 255 - 0.5) / 0.5).flatten(1)
    for epoch in (slice(0, 60), slice(60, 120)):
        order = (images[epoch, None] - every).abs().sum(-1).argmin(1)
        assert sorted(order.tolist()) == list(range(60)) and torch.equal(labels[epoch], train.labels[order])
    assert not torch.equal(images[:60], images[60:])


@pytest.mark.parametrize("batch", [8, 100])
def test_batches_depend_on_the_iteration_alone(batch):
    whole = list(source(batch).train(0, 9))
    for x, y in zip(source(batch).train(7, 9), whole[7:], strict=True):
        assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])
    halves = [list(source(batch, World(rank, 2)).train(0, 9)) for rank in range(2)]
    for parts, (x, y) in zip(zip(*halves, strict=True), whole, strict=True):
        assert torch.equal(torch.cat([p[0] for p in parts]), x)
        assert torch.equal(torch.cat([p[1] for p in parts]), y)
    assert not torch.equal(whole[0][0], next(source(batch, seed=1).train(0, 1))[0])


def test_cifar_images_have_their_pixels_mean_subtracted():
    found = source()
    assert found.mean.shape == (3, 8, 8)
    x = torch.cat([x for x, _ in source().evaluation("test")])
    test = data.load("synthetic:60x8", "test")
    torch.testing.assert_close(x, test.images / 255 - found.mean)
    train = data.load("synthetic:60x8").images / 255
    torch.testing.assert_close(found.mean, train.mean(0))


def test_held_out_images_are_not_trained_on():
    train = data.load("synthetic:60x8")
    rest, held = data.hold_out(train, 20)
    assert len(rest.labels) == 40 and len(held.labels) == 20
    both = torch.cat([rest.images, held.images]).flatten(1).long()
    assert len(both.unique(dim=0)) == 60
    assert source(holdout=20).count == 40
    with pytest.raises(ValueError, match="holdout must lie between 1 and 59 images, got 60"):
        data.hold_out(train, 60)


# CIFAR-10


def test_cifar10_from_its_package(tmp_path, monkeypatch):
    folder = tmp_path / "cifar10-1.1.1"
    folder.mkdir()
    images = {}
    for name in (*(f"data_batch_{i}" for i in (5, 4, 3, 2, 1)), "test_batch"):
        images[name] = np.random.default_rng(len(images)).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
        Image.fromarray(images[name].reshape(2, 1024, 3)).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(str([*range(10)]))
    (folder / "test_lables.json").write_text("[7, 8]")
    fetch._convert_cifar10(folder)
    assert os.listdir(folder) == ["cifar10.pt"]
    monkeypatch.setenv("RESNET_FUSED_HOME", str(tmp_path))
    train, test = data.load("cifar10"), data.load("cifar10", "test")
    expected = np.concatenate([images[f"data_batch_{i}"] for i in range(1, 6)])
    assert np.array_equal(train.images.permute(0, 2, 3, 1).numpy(), expected)
    assert np.array_equal(test.images.permute(0, 2, 3, 1).numpy(), images["test_batch"])
    assert train.labels.tolist() == [*range(10)] and test.labels.tolist() == [7, 8]
    assert train.classes[3] == "cat"


def test_cifar10_in_torchvisions_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": pixels[i], "labels": [i, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [*"abcdefghij"]}))
    with pytest.raises(FileNotFoundError, match="no whole cifar-10-batches-py lies in"):
        data.load(f"cifar10:{tmp_path}")
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    train, test = data.load(f"cifar10:{tmp_path}"), data.load(f"cifar10:{tmp_path}", "test")
    assert np.array_equal(train.images.flatten(1).numpy(), pixels[:5].reshape(10, 3072))
    assert np.array_equal(test.images.flatten(1).numpy(), pixels[5])
    assert train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9] and test.classes == tuple("abcdefghij")


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="batch 8 does not divide among 3 processes"):
        source(world=World(0, 3))
