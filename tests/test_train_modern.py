"""resnet-fused train on weights that are there, by the recipes beside the papers', and ended by signals."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from train_runs import TINY, assert_same, fails_fixture, image_folder, one_thread, rows, run_fixture  # noqa: F401

from resnet_fused import cli, get_model
from resnet_fused.train import RECIPES, Settings, checkpoint, data, load_model, logs, loop
from resnet_fused.train.augment import Mix
from resnet_fused.train.average import Average
from resnet_fused.train.batches import IMAGENET, make_source
from resnet_fused.train.distributed import World
from resnet_fused.train.evaluate import evaluate
from resnet_fused.train.initial import freeze
from resnet_fused.train.schedule import Schedule, make_optimizer

CPU = torch.device("cpu")
MODERN = ("--recipe", "modern", "--model", "cifar_resnet20", "--workers", "0")
FINETUNE = ("--recipe", "finetune", "--workers", "0")


def assert_same_run(one, other):
    for name in ("train", "eval"):
        assert rows(one, name) == rows(other, name)
    contents = [checkpoint.read(folder) for folder in (one, other)]
    for content in contents:
        del content["seconds"]
    assert_same(*contents)


# weights to start from


@pytest.fixture
def weights(tmp_path):
    """A file of a network with 7 classes, and its tensors."""
    torch.manual_seed(5)
    state = {k: v.contiguous() for k, v in get_model("cifar_resnet20", num_classes=7).state_dict().items()}
    save_file(state, tmp_path / "seven.safetensors")
    return str(tmp_path / "seven.safetensors"), state


def test_another_number_of_classes_gets_another_classifier(run, weights, capsys):
    path, state = weights
    out = run("run", *FINETUNE, "--model", "cifar_resnet20", "--init", path, "--iterations", "2", "--lr", "1e-6")
    assert f"{path} has 7 classes, the model 10: the classifier is drawn anew" in capsys.readouterr().err
    model, meta = load_model(out)
    assert model.fc.out_features == 10 and meta["config"]["init"] == path
    for name, value in model.named_parameters():
        if not name.startswith("fc."):
            torch.testing.assert_close(value, state[name], rtol=0, atol=1e-3)
    os.remove(path)  # what the run needs of it is in its checkpoint
    run("run", "--resume", "--iterations", "3", "--lr", "1e-6")


def test_a_fine_tuned_run_is_evaluated_on_crops(run, weights, tmp_path, capsys):
    options = ("--init", weights[0], "--model", "cifar_resnet20", "--data", image_folder(tmp_path / "images"))
    out = run("run", *FINETUNE, *options, "--iterations", "1", "--batch", "2")
    capsys.readouterr()
    assert cli.main(["eval", str(out), "--device", "cpu", "--workers", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "crop of 224" in found["views"]
    assert found["top1_error"] == pytest.approx(checkpoint.read(out)["evaluation"][1])


def test_from_a_run_its_model_normalisation_and_classes(run, tmp_path, capsys):
    first = run("first", "--iterations", "1", "--model-arg", "shortcut=B")
    capsys.readouterr()
    model, meta = load_model(run("same", *FINETUNE, "--init", str(first), "--iterations", "1", "--lr", "1e-9"))
    assert "drawn anew" not in capsys.readouterr().err
    assert (meta["model"], meta["model_kwargs"]) == ("cifar_resnet20", {"num_classes": 10, "shortcut": "B"})
    source = checkpoint.read(first)
    torch.testing.assert_close(model.fc.weight, source["state_dict"]["fc.weight"])
    assert torch.equal(meta["mean"], source["mean"]) and meta["mean"].shape == (3, 16, 16)
    folder = image_folder(tmp_path / "images")
    options = ("--data", folder, "--batch", "2", "--iterations", "1")
    other = checkpoint.read(run("other", *FINETUNE, "--init", str(first / "checkpoint.pt"), *options))
    assert f"{first}/checkpoint.pt has 10 classes, the model 2" in capsys.readouterr().err
    torch.testing.assert_close(other["mean"], source["mean"].mean((1, 2), keepdim=True))
    assert (other["classes"], other["resize"], other["crop"]) == (["cat", "dog"], 256, 224)
    renamed = checkpoint.read(first)
    renamed["classes"] = [*"abcdefghij"]
    checkpoint.save(first, {k: v for k, v in renamed.items() if k != "format"})
    run("renamed", *FINETUNE, "--init", str(first), "--iterations", "1")
    assert 'has the classes "a", "b", "c" ..., the data "pattern 0"' in capsys.readouterr().err


def test_published_weights_bring_their_normalisation_and_arguments(run, tmp_path, monkeypatch):
    torch.manual_seed(3)
    state = get_model("resnet50", num_classes=1000).state_dict()
    monkeypatch.setattr("resnet_fused.models.weights._msra", lambda progress: state)
    options = ("--init", "MSRA", "--freeze", "backbone", "--iterations", "1", "--data", "synthetic:60x32")
    model, meta = load_model(run("run", *FINETUNE, *options))
    assert meta["model_kwargs"] == {"num_classes": 10, "stem": "caffe", "stride_in_1x1": True}
    assert torch.equal(meta["mean"], IMAGENET[0]) and torch.equal(meta["std"], IMAGENET[1])
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]) == (not name.startswith("fc.")), name


@pytest.mark.parametrize(
    "last, trained",
    [
        ("stem", {"layer1", "layer2", "layer3", "fc"}),
        ("layer2", {"layer3", "fc"}),
        ("backbone", {"fc"}),
        (None, {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}),
    ],
)
def test_frozen_parts_neither_learn_nor_count(last, trained):
    torch.manual_seed(0)
    model = get_model("cifar_resnet20").train()
    for module in freeze(model, last):
        module.eval()
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == trained
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = make_optimizer(Settings(lr=0.1), model)
    x, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    for _ in range(2):
        evaluate(model, [(x, labels)])  # puts every module's mode back
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (name.partition(".")[0] in trained), name


def test_frozen_runs_resume(run, weights):
    options = (*FINETUNE, "--model", "cifar_resnet20", "--init", weights[0], "--freeze", "layer2", "--iterations", "4")
    whole = run("whole", *options)
    out = run("run", *options[:-1], "2")
    run("run", "--resume", "--iterations", "4")
    assert checkpoint.read(out)["step"] == 4
    state = checkpoint.read(whole)["state_dict"]
    assert all(torch.equal(state[k], v) for k, v in weights[1].items() if re.match("conv1|bn1|layer[12]", k))


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--init", "nowhere.pth"), "nowhere.pth': there is no such file"),
        (("--freeze", "stem"), "freeze='stem' keeps the weights of init, which names none"),
        (("--init", "{weights}", "--freeze", "layer4"), "freeze must be one of stem, layer1, layer2, layer3, backbone"),
        (
            ("--init", "{weights}", "--model", "cifar_resnet32"),
            "they are of cifar_resnet20, the model is cifar_resnet32",
        ),
        (("--init", "{run}", "--model", "cifar_resnet32"), "is a run of cifar_resnet20, model is cifar_resnet32"),
        (("--init", "{run}", "--model-arg", "shortcut=B"), "with shortcut='A', model_kwargs have 'B'"),
        (("--recipe", "finetune", "--data", "synthetic"), "recipe finetune needs init, for instance"),
        (
            ("--recipe", "modern", "--schedule", "step"),
            "modern has no steps; it takes plateau, cosine, constant",
        ),
        (("--ema", "1"), "ema must be 0 or more and less than 1, got 1.0"),
        (("--rand-augment", "11"), "rand_augment must be from 0 to 10, got 11"),
        (("--weight-decay", "-1"), "weight_decay must be 0 or more, got -1.0"),
        (("--workers", "-1"), "workers must be at least 0, got -1"),
    ],
)
def test_bad_arguments(run, fails, weights, tmp_path, capsys, argv, message):
    if "{run}" in argv:
        run("first", "--iterations", "1", "--model-arg", "shortcut=A")
        capsys.readouterr()
    argv = [a.format(weights=weights[0], run=tmp_path / "first") for a in argv]
    assert message in fails("--iterations", "1", *argv)
    assert not (tmp_path / "run").exists()


# recipes


def test_the_average_is_what_is_kept_and_evaluated(run):
    out = run("run", *MODERN, "--iterations", "6")
    content = checkpoint.read(out)
    assert content["averaged"] == 6
    own, mean = content["trained_state_dict"], content["state_dict"]
    assert not torch.equal(own["conv1.weight"], mean["conv1.weight"])
    model, meta = load_model(out)
    assert torch.equal(model.conv1.weight, mean["conv1.weight"])
    test = data.load("synthetic:60x16", "test")
    found = evaluate(model, [(data.normalise(test.images, meta["mean"], meta["std"]), test.labels)])
    assert found.loss == pytest.approx(meta["evaluation"][0], rel=1e-5)


def test_average_by_hand():
    model, decay = nn.BatchNorm1d(2), 0.25
    average, expected = Average(model, decay), None
    for i in range(5):
        with torch.no_grad():
            model.weight.fill_(i)
            model.running_mean.fill_(10 * i)
        average.update(model)
        # n updates came before; the first one copies
        expected = 0.0 if i == 0 else expected + (1 - min(decay, (1 + i) / (10 + i))) * (i - expected)
        torch.testing.assert_close(average.model.weight.detach(), torch.full((2,), expected))
        torch.testing.assert_close(average.model.running_mean, torch.full((2,), 10 * expected))
    assert average.count == 5 and isinstance(average._averaged, AveragedModel)


def test_bn_and_biases_go_without_decay():
    model = get_model("cifar_resnet20")
    for name, optimizer in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)):
        settings = Settings("modern", "cifar_resnet20", data="synthetic", optimizer=name)
        found = make_optimizer(settings, model)
        assert type(found) is optimizer
        decayed, rest = (group["params"] for group in found.param_groups)
        assert [group["weight_decay"] for group in found.param_groups] == [0.05, 0]
        vectors = {id(p) for n, p in model.named_parameters() if "bn" in n or n.endswith("bias")}
        assert {id(p) for p in rest} == vectors and len(decayed) + len(rest) == len(list(model.parameters()))
    assert len(make_optimizer(Settings(), model).param_groups) == 1


def test_cosine_after_a_linear_warm_up():
    settings = Settings("modern", data="synthetic", lr=1.0, iterations=100)
    settings.complete(1000)
    assert settings.warm_up_iterations == 5
    schedule, seen = Schedule.of(settings, torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0), False), []
    for done in range(1, 101):
        seen.append(schedule.lr)
        schedule.iterated(done)
    assert seen[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert seen[5 + 19] == pytest.approx(0.9045085)  # a fifth of the way down: (1 + cos 36 degrees) / 2
    assert seen == sorted(seen[:6]) + sorted(seen[6:], reverse=True) and 0 < seen[-1] < 1e-3 and schedule.lr == 0


@pytest.mark.parametrize("mixup, cutmix", [(0.5, 0), (0, 1.0), (0.5, 1.0), (0, 0)])
def test_mixtures_keep_pixels_and_targets_together(mixup, cutmix):
    mix, labels = Mix(mixup, cutmix, 6), torch.tensor([0, 3, 5, 1])
    x = labels.float()[:, None, None, None].expand(4, 3, 16, 16)
    values = torch.arange(6).float()
    seen = set()
    for seed in range(12):
        mixed, target = mix(x, labels, seed)
        if not (mixup or cutmix):
            assert mixed is x and target is labels
            continue
        again = mix(x, labels, seed)
        assert torch.equal(mixed, again[0]) and torch.equal(target, again[1])
        torch.testing.assert_close(target.sum(1), torch.ones(4))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), target @ values)
        seen.add("mixup" if len(mixed[0, 0].unique()) == 1 and target[0].max() < 1 else "cutmix")
    assert seen == ({"mixup"} if mixup else set()) | ({"cutmix"} if cutmix else set())


def test_loss_of_smooth_and_mixed_targets(tmp_path):
    options = dict(world=World(), device=CPU, workers=0, compile=False, recompute=None)
    settings = Settings(model="cifar_resnet20", data="synthetic:40x8", batch=8, iterations=1, mixup=1.0, dtype="fp32")
    settings.label_smoothing = 0.2
    run = loop._Run(settings, tmp_path, **options)
    x, labels = next(run.source.train(0, 1))
    mixed, soft = run.mix(x, labels, loop.seed_of(0, "mix", 0, 0))
    with torch.no_grad():
        log = run.model(mixed).log_softmax(1)
    expected = -((0.8 * soft + 0.02) * log).sum(1).mean()
    run._iterate(x, labels)
    torch.testing.assert_close(run.window[0][0], expected)
    wrong = 100 * (log.argmax(1) != soft.argmax(1)).float().mean()
    torch.testing.assert_close(run.window[0][1], wrong)


def test_strong_augmentation_changes_images_and_workers_do_not_change_it():
    settings = Settings("modern", "cifar_resnet20", data="synthetic:60x16", batch=8)
    alone = list(make_source(settings, World(), CPU, workers=0).train(0, 3))
    shared = list(make_source(settings, World(), CPU, workers=2).train(1, 3))
    for (x, y), (other, labels) in zip(alone[1:], shared, strict=True):
        assert torch.equal(x, other) and torch.equal(y, labels)
    settings.rand_augment = 0
    plain = make_source(settings, World(), CPU, workers=0)
    for (x, y), (other, labels) in zip(alone, plain.train(0, 3), strict=True):
        assert not torch.equal(x, other) and torch.equal(y, labels)
    images = data.load("synthetic:60x16").images / 255
    torch.testing.assert_close(plain.mean.flatten(), images.mean((0, 2, 3)))
    torch.testing.assert_close(plain.std.flatten(), images.transpose(0, 1).flatten(1).std(1), rtol=1e-3, atol=0)


def test_holdout_goes_with_strong_augmentation(run):
    out = run("run", *MODERN, "--iterations", "2", "--eval-every", "1", "--holdout", "10")
    assert [row["split"] for row in rows(out, "eval")] == ["val", "test"]


def test_mean_image_of_a_folder(tmp_path):
    settings = Settings("imagenet", data=image_folder(tmp_path), batch=2, pixel_mean=True)
    source = make_source(settings, World(), CPU, workers=0)
    assert source.mean.shape == (3, 224, 224) and torch.equal(source.std, torch.ones(3, 1, 1))
    assert source.mean.std() > 0.01  # noise of six images stays
    settings.pixel_mean = False
    colours = make_source(settings, World(), CPU, workers=0)
    images = [torch.cat([x for x, _ in s.evaluation("test")]) * s.std + s.mean for s in (source, colours)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)


def test_tutorial_is_resnet34_with_its_large_stem(run):
    out = run("run", "--recipe", "tutorial", "--iterations", "1")
    model, meta = load_model(out)
    assert meta["model"] == "resnet34" and model.conv1.kernel_size == (7, 7)
    assert RECIPES["tutorial"].optimizer == "adam" and meta["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


def test_imagenet_as_the_text_has_it(run, tmp_path):
    options = ("--recipe", "imagenet", "--data", image_folder(tmp_path / "images"), "--batch", "2")
    text = ("--model-arg", "stride_in_1x1=True", "--plateau", "--pixel-mean", "--iterations", "1", "--workers", "0")
    meta = checkpoint.read(run("run", *options, *text))
    assert meta["config"]["schedule"] == "plateau" and meta["mean"].shape == (3, 224, 224)
    assert meta["model_kwargs"] == {"num_classes": 2, "stride_in_1x1": True}


# data


def test_cifar10_is_fetched_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_HOME", str(tmp_path / "home"))
    fetched = []

    def fetch(name):
        fetched.append(name)
        content = {f"{s}_images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8) for s in ("train", "test")}
        torch.save(content | {f"{s}_labels": torch.arange(2) for s in ("train", "test")}, tmp_path / "cifar10.pt")
        return tmp_path

    monkeypatch.setattr(data, "fetch", fetch)
    assert data.load("cifar10").labels.tolist() == [0, 1] and fetched == ["cifar10"]


def test_paths_in_a_run_are_absolute(run, tmp_path, monkeypatch, weights):
    image_folder(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    options = ("--data", "imagefolder:images", "--init", "seven.safetensors", "--model", "cifar_resnet20")
    out = run("run", *FINETUNE, *options, "--iterations", "1", "--batch", "2")
    config = checkpoint.read(out)["config"]
    assert (config["data"], config["init"]) == (f"imagefolder:{tmp_path}/images", f"{tmp_path}/seven.safetensors")


# going on


@pytest.mark.parametrize("options", [MODERN, ("--mixup", "0.2", "--warm-up")], ids=["modern", "cifar"])
def test_interrupted_and_resumed_it_is_the_uninterrupted_run_to_the_bit(run, tmp_path, options):
    options = (*options, "--iterations", "80", "--eval-every", "60", "--save-every", "60", "--log-every", "7")
    out = tmp_path / "it's"
    command = [sys.executable, "-m", "resnet_fused", "train", *TINY, *options, "--out", str(out)]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    wait(process, out, 1)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=60)
    assert process.returncode == 130 and printed == ""
    step = checkpoint.read(out)["step"]
    assert 7 <= step < 80
    line = err.splitlines()[-1]
    found = re.fullmatch(
        r"resnet-fused: SIGINT after iteration (\d+), which is saved; to go on: resnet-fused (.*)", line
    )
    assert found and int(found[1]) == step
    assert cli.main([*shlex.split(found[2]), "--device", "cpu", "--workers", "0"]) == 0
    assert_same_run(out, run("whole", *options))


def wait(process, out, count):
    limit = time.monotonic() + 120
    while not (out / "train.csv").exists() or len(logs.read(out / "train.csv")) < count:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)


def test_processes_stop_together(tmp_path):
    out = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["resnet_fused", "train", *TINY, "--iterations", "100000", "--out", str(out), "--log-every", "3"]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    wait(process, out, 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count("resnet-fused: SIGTERM after iteration") == 1
    assert checkpoint.read(out)["step"] % 3 == 0


def test_under_torchrun_one_process_says_what_is_wrong(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for wrong, message in (("--lr=0", "lr must be a positive number"), ("--lr=x", "argument --lr: invalid float")):
        arguments = ["resnet_fused", "train", *TINY, "--out", str(tmp_path / "run"), wrong]
        done = subprocess.run(
            [*command, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode != 0 and done.stderr.count(message) == 1, done.stderr


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_evaluation(tmp_path, monkeypatch, capsys, signum, code):
    evaluation = loop.make_source

    def interrupted(*args):
        source = evaluation(*args)
        batches = source.evaluation

        def of(split):
            os.kill(os.getpid(), signum)
            yield from batches(split)

        source.evaluation = of
        return source

    monkeypatch.setattr(loop, "make_source", interrupted)
    before = signal.getsignal(signum)
    out = tmp_path / "run"
    assert cli.main(["train", *TINY, "--out", str(out), "--iterations", "2"]) == code
    assert signal.getsignal(signum) is before
    assert f"{signum.name} after iteration 1, which is saved" in capsys.readouterr().err
    assert checkpoint.read(out)["step"] == 1
    monkeypatch.undo()
    assert cli.main(["train", "--resume", "--out", str(out), "--device", "cpu"]) == 0


def test_more_iterations(run, fails, capsys):
    run("run", "--iterations", "4")
    capsys.readouterr()
    assert "iterations is 3, and 4 in the run" in fails("--resume", "--iterations", "3")
    out = run("run", "--resume", "--iterations", "8")  # eval_every and save_every were derived from 4
    assert [row["step"] for row in rows(out)] == [*"12345678"]
    assert [row["lr"] for row in rows(out)] == ["0.05", "0.05", "0.005", "0.0005", "0.005", "0.005", "0.0005", "0.0005"]
    assert checkpoint.read(out)["config"]["iterations"] == 8
    capsys.readouterr()
    assert "eval_every is 3, and 1 in the run" in fails("--resume", "--eval-every", "3")


def test_every_option_has_a_help_text_with_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    options = text[text.index("what is trained:") : text.index("recipes:\n")]
    entries = re.split(r"\n  (?=--)", options)[1:]
    assert len(entries) > 30
    for entry in entries:
        assert re.search("default( here)?:", " ".join(entry.split())), entry
