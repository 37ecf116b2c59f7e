"""resnet-fused's commands in this process, and what they are given."""

import urllib.error

import pytest
import torch
from PIL import Image

from resnet_fused.cli import main
from resnet_fused.models import resnet18


@pytest.fixture(name="fails")
def fails_fixture(capsys):
    """Runs a command that has to fail with status 2 and one line on standard error, and returns the line."""

    def run(*argv):
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        assert status == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n"), (status, out, err)
        assert err.startswith("resnet-fused") and ": error: " in err
        return err

    return run


@pytest.fixture(name="output")
def output_fixture(capsys):
    """Runs a command that has to succeed, and returns what it printed."""

    def run(*argv):
        status = main([str(argument) for argument in argv])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    return run


@pytest.fixture(name="photo", scope="module")
def photo_fixture(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "photo.jpg"
    Image.effect_noise((300, 200), 50).convert("RGB").save(path)
    return str(path)


@pytest.fixture(name="checkpoint", scope="module")
def checkpoint_fixture(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), path)
    return str(path)


@pytest.fixture(name="empty_caches")
def empty_caches_fixture(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("RESNET_FUSED_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture(name="no_network")
def no_network_fixture(empty_caches, monkeypatch):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    monkeypatch.setenv("PATH", "")
    return empty_caches
