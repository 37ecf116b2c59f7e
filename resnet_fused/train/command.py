"""The options of `resnet-fused train`."""

import argparse
import ast
import os
import sys
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..dispatch import registry
from . import checkpoint
from .recipes import DTYPES, OPTIMIZERS, RECIPES, SCHEDULES, Settings

_DIED = ("DataLoader worker", "Connection closed by peer", "Connection reset by peer", "NCCL")
_RECIPES = {
    "cifar": "the first paper's for CIFAR-10: SGD, steps, crops and flips",
    "imagenet": "the first paper's for ImageNet: SGD, steps, scales from 256 to 480",
    "tutorial": "what introductions train: ResNet-34 with its 7x7 stem on CIFAR-10, Adam, no augmentation",
    "modern": 'after A3 of "ResNet strikes back": AdamW, cosine, RandAugment, mixup or CutMix, EMA',
    "finetune": "a short cosine at a small rate, from the weights of --init",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resnet-fused train`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    rows = [f"  {name:10}{_RECIPES[name]}" for name in RECIPES]
    rows += ["", "defaults of the recipes:", f"  {'':20}" + "".join(f"{name:>15}" for name in RECIPES)]
    for name in ("model", "batch", "optimizer", "lr", "schedule", "weight_decay", "decay_norm", "pixel_mean"):
        rows.append(f"  {_flag(name):20}" + "".join(f"{_word(getattr(r, name)):>15}" for r in RECIPES.values()))
    lengths = [f"{r.epochs} epochs" if r.epochs else str(r.iterations) for r in RECIPES.values()]
    rows.append(f"  {'--iterations':20}" + "".join(f"{length:>15}" for length in lengths))
    rows.append(f"  {'--warm-up-iterations':20}" + "".join(f"{r.warm_up_share:>15.0%}" for r in RECIPES.values()))
    for name in ("label_smoothing", "mixup", "cutmix", "rand_augment", "ema"):
        rows.append(f"  {_flag(name):20}" + "".join(f"{getattr(r, name):>15}" for r in RECIPES.values()))
    parser.epilog = "\n".join(["recipes:", *rows])

    own = parser.add_argument_group("what is trained")
    _setting(own, "recipe", "see below", choices=RECIPES)
    _setting(own, "model", "a network of `resnet-fused info --models`", choices=models.list_models(), metavar="NAME")
    own.add_argument(
        "--model-arg",
        type=_key_value,
        action="append",
        default=argparse.SUPPRESS,
        metavar="KEY=VALUE",
        help="an argument of the model, such as stride_in_1x1=True; may be repeated; default: none",
    )
    _setting(
        own,
        "init",
        "weights to start from: torchvision's IMAGENET1K_V2, MSRA, a run's folder, or a .pth or .safetensors file; "
        "a classifier of other classes is drawn anew; default: drawn",
        metavar="WEIGHTS",
    )
    _setting(
        own,
        "freeze",
        "keep the weights and BN statistics of the stem and of the stages up to this: stem, layer1, ..., or backbone: "
        "train the classifier alone; default: nothing",
        metavar="PART",
    )
    _setting(
        own,
        "data",
        "cifar10[:FOLDER] (fetched where missing), imagefolder:FOLDER or synthetic[:COUNTxSIZE]",
        metavar="DATA",
    )
    _setting(
        own,
        "holdout",
        "evaluate on N held-out training images, on the test split at the end alone (the paper's 45k/5k split: 5000)",
        type=int,
        metavar="N",
    )
    _setting(own, "pixel_mean", "subtract the training images' mean image, as the papers, not the mean colour")
    _setting(own, "dtype", "bf16 and fp16 are autocast", choices=DTYPES)
    _setting(own, "seed", "of weights, order and augmentation", type=int)
    _setting(own, "sync_bn", "batch statistics over all processes")

    how = parser.add_argument_group("how: in place of the recipe's values")
    _setting(how, "iterations", "batches in all; the recipe's schedule in proportion", type=int, metavar="N")
    _setting(how, "batch", "images an iteration, over all processes", type=int, metavar="N")
    _setting(how, "optimizer", "sgd has momentum 0.9", choices=OPTIMIZERS)
    _setting(how, "lr", "the highest learning rate", type=float)
    _setting(
        how,
        "schedule",
        "of the learning rate: divided by 10 in steps or where the error stalls, half a cosine, or constant",
        choices=SCHEDULES,
    )
    how.add_argument(
        "--plateau",
        dest="schedule",
        action="store_const",
        const="plateau",
        default=argparse.SUPPRESS,
        help="--schedule plateau, as the paper's text has it; default: the recipe's schedule",
    )
    _setting(
        how,
        "warm_up",
        "a tenth of the rate until the error is below 80 %%; default: for cifar's networks of 110 layers on",
    )
    _setting(how, "warm_up_iterations", "first rise to the rate in a line", type=int, metavar="N")
    _setting(how, "weight_decay", "of AdamW decoupled, else L2", type=float, metavar="X")
    _setting(how, "decay_norm", "weight decay of BN's parameters and of biases, too")
    _setting(how, "label_smoothing", "share of the target spread over all classes", type=float, metavar="X")
    _setting(how, "mixup", "of its Beta distribution; 0: none", type=float, metavar="ALPHA")
    _setting(how, "cutmix", "likewise; with both, one is drawn for every batch", type=float, metavar="ALPHA")
    _setting(how, "rand_augment", "magnitude from 1 to 10; 0: none", type=int, metavar="M")
    _setting(how, "ema", "decay of the weights' moving average, which is evaluated; 0: none", type=float, metavar="X")

    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/RECIPE-MODEL")
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in the folder, with its settings; --iterations may be raised; "
        "default: a folder that holds a run is refused",
    )
    _setting(run, "eval_every", "iterations between evaluations; default: 10 to 120 in a run", type=int, metavar="N")
    _setting(run, "save_every", "iterations between checkpoints; default: 20 in a run, or 1000", type=int, metavar="N")
    _setting(run, "log_every", "iterations a row of train.csv", type=int, metavar="N")
    run.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    run.add_argument(
        "--backend",
        choices=("auto", *registry.BACKENDS),
        default=registry.get_backend(),
        help="that serves the fused operators; default: %(default)s",
    )
    run.add_argument("--compile", action="store_true", help="torch.compile the model; default: no")
    run.add_argument(
        "--recompute",
        choices=("activations", "blocks"),
        help="compute these again in the backward pass, not keep them; default: keep all",
    )
    run.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that read images; default here: %(default)s",
    )


def main(args: argparse.Namespace, device: torch.device) -> int:
    """Run `resnet-fused train`: 0, or 128 and the signal that ended it.

    Raises:
        ValueError, OSError, FloatingPointError, FetchError: of `loop.train`.
    """
    from .interrupt import Interrupted
    from .loop import train

    settings, out = _settings(args)
    how = {key: getattr(args, key) for key in ("resume", "backend", "compile", "recompute", "workers")}
    first = os.environ.get("RANK", "0") == "0"
    if first and args.resume and not (out / checkpoint.NAME).exists():
        print(f"{out} holds no run yet: a new one begins", file=sys.stderr)
    try:
        result = train(settings, out, device=device, **how)
    except Interrupted as stop:
        if first:
            print(f"resnet-fused: {stop}", file=sys.stderr)
        return 128 + stop.signum
    except RuntimeError as error:
        if any(sign in str(error) for sign in _DIED):
            what = str(error).strip().splitlines()[-1].partition(". ")[0]
            raise ChildProcessError(f"a process of the run died ({what}); --resume goes on from {out}") from error
        raise
    if first:
        print(f"{settings.model}: test error {result.error:.2f} % after {settings.iterations} iterations, in {out}")
    return 0


def _settings(args: argparse.Namespace) -> tuple[Settings, Path]:
    """What is given, beside the settings of the run that is resumed, and the run's folder."""
    from .initial import run_of  # needs torchvision

    given = {key: value for key, value in vars(args).items() if key in Settings.__dataclass_fields__}
    if model_arg := getattr(args, "model_arg", None):
        given["model_kwargs"] = dict(model_arg)
    if args.workers < 0:
        raise ValueError(f"workers must be at least 0, got {args.workers}")
    if "model" not in given and (run := run_of(given.get("init"))):
        given["model"] = run["model"]
    recipe = given.get("recipe", Settings.recipe)
    out = args.out or Path("runs", f"{recipe}-{given.get('model', RECIPES[recipe].model)}")
    before: dict[str, Any] = {}
    if args.resume and (out / checkpoint.NAME).exists():
        before = checkpoint.read(out)["config"]
        if strange := [key for key in before if key not in Settings.__dataclass_fields__]:
            raise ValueError(f"{out} was trained by another version, whose settings have {', '.join(strange)}")
    if not before and recipe == "finetune" and "init" not in given:
        raise ValueError("recipe finetune needs init, for instance --init IMAGENET1K_V2")
    return Settings(**(before | given)), out


def _setting(parser: argparse._ArgumentGroup, name: str, text: str, **options: Any) -> None:
    """The option of a field of `Settings`; only what is given on the command line is in the namespace."""
    default = Settings.__dataclass_fields__[name].default
    if "default:" not in text:
        text += f"; default: {'that of the recipe' if default is None else _word(default)}"
    if not options:
        options["action"] = argparse.BooleanOptionalAction
    parser.add_argument(_flag(name), default=argparse.SUPPRESS, help=text, **options)


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _key_value(text: str) -> tuple[str, object]:
    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
