"""Runs of resnet-fused train on a few small images, and what is compared of them."""

import csv

import pytest
import torch
from PIL import Image

from resnet_fused import cli

TINY = ("--data", "synthetic:60x16", "--batch", "8", "--device", "cpu", "--log-every", "1", "--lr", "0.05")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the subprocesses; the networks are small
    yield
    torch.set_num_threads(threads)


@pytest.fixture(name="run")
def run_fixture(tmp_path, capsys):
    """Trains in the folder `name`; the folder."""

    def run(name, *argv):
        assert cli.main(["train", *TINY, "--out", str(tmp_path / name), *argv]) == 0, capsys.readouterr().err
        return tmp_path / name

    return run


@pytest.fixture(name="fails")
def fails_fixture(tmp_path, capsys):
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
