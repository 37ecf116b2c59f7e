"""resnet-fused train: runs, resumption, processes, and what goes wrong."""

import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from train_runs import TINY, assert_same, fails_fixture, image_folder, one_thread, rows, run_fixture  # noqa: F401

from resnet_fused import get_model
from resnet_fused.train import Settings, checkpoint, data, load_model, logs
from resnet_fused.train.batches import make_source
from resnet_fused.train.distributed import World
from resnet_fused.train.schedule import make_optimizer

CPU = torch.device("cpu")


# data sets


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


@pytest.mark.parametrize(
    "split, lacks", [("val", "val/ lacks 'dog'"), ("train", "train/ lacks 'dog'")], ids=["missing", "extra"]
)
def test_classes_go_by_name_and_both_splits_have_the_same(fails, tmp_path, split, lacks):
    folder = image_folder(tmp_path / "images")
    shutil.rmtree(tmp_path / "images" / split / "dog")  # the other classes are numbered anew
    line = fails("--recipe", "imagenet", "--model", "resnet18", "--data", folder, "--iterations", "2")
    assert f"{folder} must have the same classes in train/ and val/: {lacks}" in line
    assert not (tmp_path / "run").exists()


def test_a_broken_evaluation_costs_no_training(run, fails, tmp_path, capsys):
    folder, image = image_folder(tmp_path / "images"), tmp_path / "images" / "val" / "dog" / "1.png"
    whole = image.read_bytes()
    options = ("--recipe", "imagenet", "--model", "resnet18", "--data", folder, "--workers", "1", "--iterations", "2")
    options = (*options, "--batch", "2", "--eval-every", "2", "--save-every", "9", "--plateau")
    run("whole", *options, "--resume")
    err = capsys.readouterr().err.splitlines()
    assert err[0] == f"{tmp_path / 'whole'} holds no run yet: a new one begins"
    assert err[1] == f"resnet18 on {folder}, cpu: iterations 1 to 2"
    image.write_bytes(b"no image")
    assert "1.png can't be read" in fails(*options)
    assert checkpoint.read(tmp_path / "run")["step"] == 2
    assert "1.png can't be read" in fails(*options, "--resume")
    image.write_bytes(whole)
    run("run", *options, "--resume")
    resumed, whole = (checkpoint.read(tmp_path / name) for name in ("run", "whole"))
    for content in (resumed, whole):
        del content["seconds"]
    assert_same(resumed, whole)
    for name in ("train", "eval"):
        assert rows(tmp_path / "run", name) == rows(tmp_path / "whole", name)


def test_broken_image(fails, tmp_path):
    folder = image_folder(tmp_path / "images", broken=True)
    line = fails("--recipe", "imagenet", "--model", "resnet18", "--data", folder, "--workers", "1", "--iterations", "2")
    assert f"image {tmp_path}/images/train/dog/1.png can't be read: " in line and len(line) < 300


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def test_dying_worker(fails, tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_fused.train.augment.scale_jitter", lambda: [die])
    folder = image_folder(tmp_path / "images")
    line = fails("--recipe", "imagenet", "--model", "resnet18", "--data", folder, "--workers", "1", "--iterations", "2")
    assert "a process of the run died (DataLoader worker" in line and "--resume" in line


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
    late = ("--save-every", "20", "--eval-every", "20")
    assert "there is no checkpoint yet" in fails("--iterations", "20", *late, "--lr", "1e30")


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
    monkeypatch.chdir(tmp_path)
    assert f"there is no {tmp_path}/nowhere/train" in fails("--recipe", "imagenet", "--data", "imagefolder:nowhere")
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
        (("--data", "imagefolder:x"), "recipe cifar takes no image folder; one goes with imagenet, modern, finetune"),
        (("--recipe", "imagenet", "--holdout", "5"), "holdout is for images that are seen whole, not for crops of"),
        (("--device", "mars"), 'device must be "cpu", "cuda" or "cuda:N", got \'mars\''),
        (("--model-arg", "colour=red"), "does not take model_kwargs={'colour': 'red'}"),
        (("--backend", "cuda"), "backend 'cuda' was asked for"),
    ],
)
def test_bad_arguments(fails, argv, message):
    assert message in fails("--iterations", "1", *argv)


def test_the_folder_of_a_run_is_no_weights_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_model(Path(tmp_path, "nowhere"))
