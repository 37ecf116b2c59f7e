"""Checkpoint files: what is read of them, what they are told to be, and what is refused in one line."""

import argparse
from pathlib import Path

import numpy
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from resnet_fused import models
from resnet_fused.models import BasicBlock, ResNet, get_model, load_weights, resnet18, resnet50
from resnet_fused.models.weights import describe, load_state_dict, resolve
from resnet_fused.train import checkpoint


def small(seed=0, **kwargs):
    torch.manual_seed(seed)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3, **kwargs)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def meta(name, **kwargs):
    with torch.device("meta"):
        return get_model(name, **kwargs).state_dict()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".pth.tar", ".PTH", ".weights", ".safetensors"])
@pytest.mark.parametrize("kind", [str, Path])
def test_checkpoint_files(tmp_path, suffix, kind):
    source, target = small(0), small(1)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path)
    load_weights(target, kind(path))
    assert same(source.state_dict(), target.state_dict())
    assert target.layer1[0].conv1.weight.is_contiguous()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
        lambda state: {f"module.{k}": v for k, v in state.items()},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {
            "model_ema": {"n_averaged": torch.tensor(3)} | {f"module.module.{k}": v for k, v in state.items()}
        },
        lambda state: {
            "state_dict": {f"model._orig_mod.{k}": v for k, v in state.items()},
            "pytorch-lightning_version": "2",
        },
        lambda state: {"state_dict_ema": state, "best": numpy.float64(0.7), "args": argparse.Namespace(out=Path("x"))},
    ],
    ids=["state_dict", "torchvision", "data-parallel", "both", "averaged", "lightning", "timm"],
)
def test_wrappers_are_taken_off(tmp_path, wrap):
    source, target = small(0), small(1)
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pth")
    load_weights(target, tmp_path / "weights.pth")
    assert same(source.state_dict(), target.state_dict())


def test_of_several_state_dicts_one_is_asked_for_by_name(tmp_path):
    plain, average, path = small(0), small(1), tmp_path / "last.pth.tar"
    torch.save({"state_dict": plain.state_dict(), "state_dict_ema": average.state_dict(), "epoch": 3}, path)
    model = small(2)
    with pytest.raises(ValueError, match=f"hold state_dict and state_dict_ema: name one, as '{path}::state_dict_ema'$"):
        load_weights(model, path)
    load_weights(model, f"{path}::state_dict_ema")
    assert same(average.state_dict(), model.state_dict())
    load_weights(model, f"{path}::state_dict")
    assert same(plain.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="hold no 'ema'; there are: state_dict, state_dict_ema"):
        load_weights(model, f"{path}::ema")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_weights(model, f"{tmp_path}/nothing::ema")


def test_an_averaged_model_that_torch_saved(tmp_path):
    source, target = small(0), small(1)
    torch.save(AveragedModel(source).state_dict(), tmp_path / "weights.pth")
    load_weights(target, tmp_path / "weights.pth")
    assert same(source.state_dict(), target.state_dict())


def test_constructor_takes_a_path(tmp_path):
    source = resnet18()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    assert same(source.state_dict(), resnet18(weights=tmp_path / "weights.pth").state_dict())


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="weights='nowhere.pth'.*no such file"):
        resolve("resnet18", "nowhere.pth")


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"these are no weights", b"", b"<html>"])
def test_unreadable_file(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} can't be read: it is damaged, or no checkpoint"):
        load_weights(small(), path)


def test_a_truncated_file(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{path} can't be read"):
        load_weights(small(), path)


@pytest.mark.parametrize("name, what", [("m.onnx", "an ONNX model"), ("m.aoti.pt2", "a program of torch.export")])
def test_an_exported_model_is_said_to_be_one(tmp_path, name, what):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match=f"{name} are {what}.*; accepted are the tensors of a .pth, .pt, .safetensors"):
        resnet18(weights=tmp_path / name)


def test_code_in_a_checkpoint_does_not_run(tmp_path, capsys):
    torch.save({"a": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="can't be read: it holds an object"):
        load_weights(small(), tmp_path / "weights.pth")
    assert "executed" not in capsys.readouterr().out


def test_a_file_that_is_no_state_dict(tmp_path):
    torch.save([torch.ones(3)], tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="hold a list, expected a state_dict"):
        load_weights(small(), tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "save, what",
    [
        (lambda path: torch.save(torchvision.models.resnet18(), path), r"it holds an object \(torchvision"),
        (lambda path: torch.save({"model": small()}, path), r"it holds an object \("),
        (
            lambda path: torch.jit.trace(torchvision.models.resnet18(), torch.ones(2, 3, 32, 32)).save(path),
            "TorchScript",
        ),
    ],
    ids=["model", "model-in-a-dict", "torchscript"],
)
@pytest.mark.filterwarnings("ignore:.*TorchScript|.*torch.jit")
def test_an_object_is_refused_in_one_line_that_says_what_to_save(tmp_path, save, what):
    save(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"can't be read: .*{what}.*state_dict\\(\\)") as raised:
        load_weights(small(), tmp_path / "weights.pth")
    line = str(raised.value)
    assert "weights_only" not in line and "\n" not in line and len(line.removeprefix(str(tmp_path))) < 250


def test_a_file_without_tensors(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="hold no tensors by name: save model.state_dict"):
        load_weights(small(), tmp_path / "weights.pth")


# which model they are of


def test_what_the_tensors_do_not_tell_is_noted_beside_them(tmp_path):
    paths = {}
    for key, kwargs in {"v1": {"stride_in_1x1": True, "stem": "caffe"}, "v1.5": {}, "A": {"shortcut": "A"}}.items():
        paths[key] = tmp_path / f"{key}.pth"
        torch.save({"model": get_model("resnet50", num_classes=5, **kwargs).state_dict()}, paths[key])
    model = resnet50(weights=paths["v1"])
    assert (model.stride_in_1x1, model.stem, model.fc.out_features) == (True, "caffe", 5)
    assert not resnet50(weights=paths["v1.5"]).stride_in_1x1
    with pytest.raises(ValueError, match="stem='caffe', this one has 'imagenet'"):
        load_weights(resnet50(num_classes=5), paths["v1"])
    with pytest.raises(ValueError, match="takes stride_in_1x1=True, got stride_in_1x1=False"):
        resnet50(weights=paths["v1"], stride_in_1x1=False)
    with pytest.raises(ValueError, match="shortcut='A', this one has None"):
        load_weights(resnet50(num_classes=5, shortcut=None), paths["A"])
    torch.save(get_model("resnet18", shortcut="A").state_dict(), paths["A"])  # a plain network's keys and shapes
    with pytest.raises(ValueError, match="of a model with shortcut='A', plain18 has None"):
        get_model("plain18", weights=paths["A"])


def test_files_of_others_are_torchvisions_v1_5(tmp_path):
    source = torchvision.models.resnet18(num_classes=7)
    torch.save(source.state_dict(), tmp_path / "weights.bin")
    model = resnet18(weights=tmp_path / "weights.bin")
    assert model.fc.out_features == 7 and not model.stride_in_1x1
    assert same(source.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_timms_plain_resnets_are_these(tmp_path, name):
    torch.manual_seed(0)
    source, x = timm.create_model(name, num_classes=4).eval(), torch.randn(1, 3, 64, 64)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(get_model(name, weights=tmp_path / "model.safetensors").eval()(x), source(x))


@pytest.mark.parametrize("name", [n for n in models.list_models() if "1001" not in n and "1202" not in n])
def test_every_model_is_described(name):
    assert describe(meta(name)) == name.replace("plain", "resnet").replace("preact_resnet200", "") or name.endswith(
        "200"
    )


@pytest.mark.parametrize(
    "given, model, message",
    [
        (
            "resnet34",
            "resnet18",
            r"they are of resnet34, the model is resnet18 \(unexpected: layer1.2.conv1.weight and",
        ),
        ("resnet50", "resnet18", "they are of resnet50, the model is resnet18"),
        ("wide_resnet50_2", "resnet50", "they are of wide_resnet50_2, the model is resnet50"),
        ("cifar_resnet20", "resnet18", "they are of cifar_resnet20, the model is resnet18"),
        ("resnet18", "cifar_resnet20", "they are of resnet18, the model is cifar_resnet20"),
        ("preact_resnet18", "resnet18", "they are of preact_resnet18, the model is resnet18"),
    ],
)
def test_weights_of_another_model_are_named(given, model, message):
    with pytest.raises(ValueError, match=f"weights x.pth don't fit ResNet: {message}"):
        load_state_dict(get_model(model), meta(given), "x.pth")


@pytest.mark.parametrize(
    "state, message",
    [
        (meta("resnet18", stem="cifar"), "of resnet18 with CIFAR's 3x3 stem .*, the model is resnet18"),
        (
            meta("resnet18", num_classes=10),
            r"they have 10 classes, the model 1000; build it with num_classes=10 \(shape",
        ),
        ({"stem.conv.weight": torch.ones(1)}, "their keys are not torchvision's, but stem.conv.weight"),
    ],
)
def test_what_is_wrong_with_weights_of_the_same_family(state, message):
    with pytest.raises(ValueError, match=f"weights x.pth don't fit ResNet: .*{message}"):
        load_state_dict(resnet18(), state, "x.pth")


@pytest.mark.parametrize(
    "name, what",
    [
        ("resnet50d", "a deep stem and pooling in the shortcuts"),
        ("seresnet50", "squeeze-and-excitation"),
        ("ecaresnet50d", "channel attention"),
    ],
)
def test_timms_other_resnets_are_refused(name, what):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    with pytest.raises(ValueError, match=f"they have .*{what}, as timm's; .*resnet_fused.fuse"):
        load_state_dict(resnet50(), state, "x.pth")


def test_weights_of_group_norm():
    state = {k: v for k, v in meta("resnet18").items() if "running" not in k and "num_batches" not in k}
    with pytest.raises(ValueError, match="no BN statistics, as of GroupNorm; build the model with that norm_layer"):
        load_state_dict(resnet18(), state, "x.pth")


def test_a_caffe_model_on_raw_images_is_refused(msra):
    state = resolve("resnet50", "MSRA").state_dict(False)
    load_state_dict(model := resnet50(stem="caffe", stride_in_1x1=True), state, "converted")
    assert same(state, {k: v for k, v in model.state_dict().items() if k in state})
    raw = state | {"conv1.weight": state["conv1.weight"] / 58}  # its filters as published, on 0..255
    with pytest.raises(ValueError, match="weights x.pth take a Caffe model's images, in 0..255 .*weights='MSRA'"):
        load_state_dict(model, raw, "x.pth")


# runs of train


@pytest.fixture
def run(tmp_path):
    model = get_model("cifar_resnet20", num_classes=3)
    content = {
        "model": "cifar_resnet20",
        "model_kwargs": {"num_classes": 3},
        "state_dict": model.state_dict(),
        "step": 1,
    }
    checkpoint.save(tmp_path, content | {"trained_state_dict": small().state_dict(), "optimizer": {"state": {}}})
    return tmp_path, model.state_dict()


def test_a_runs_folder_and_its_checkpoint_are_weights(run):
    folder, state = run
    for weights in (folder, str(folder), folder / checkpoint.NAME):
        assert same(get_model("cifar_resnet20", weights=weights).state_dict(), state)
        load_weights(model := get_model("cifar_resnet20", num_classes=3), weights)
        assert same(model.state_dict(), state)
    with pytest.raises(ValueError, match="are a run of cifar_resnet20, not of resnet18"):
        resnet18(weights=folder)
    with pytest.raises(ValueError, match="they are of cifar_resnet20, the model is resnet18"):
        load_weights(resnet18(num_classes=3), folder)
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="that folder holds no checkpoint.pt of resnet-fused train"):
        resnet18(weights=folder / "empty")
