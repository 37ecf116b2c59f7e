"""The options of `resnet-fused train`."""

import argparse
import ast
import importlib
import os
from pathlib import Path

import torch

from .. import models
from ..dispatch import registry
from .recipes import DTYPES, RECIPES, Settings

_DIED = ("DataLoader worker", "Connection closed by peer", "Connection reset by peer", "NCCL")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resnet-fused train`."""
    parser.add_argument("--recipe", choices=RECIPES, default="cifar", help="default: %(default)s")
    parser.add_argument("--model", choices=models.list_models(), metavar="NAME", help="default: the recipe's")
    parser.add_argument(
        "--model-arg",
        type=_key_value,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument of the model",
    )
    parser.add_argument("--data", help="cifar10[:FOLDER], imagefolder:FOLDER or synthetic[:COUNTxSIZE]")
    parser.add_argument(
        "--holdout", type=int, default=0, metavar="N", help="evaluate on N held-out training images (paper: 5000)"
    )
    parser.add_argument("--out", type=Path, help="the run's folder; default: runs/RECIPE-MODEL")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the run's folder")
    parser.add_argument("--iterations", type=int, help="shorten the recipe in proportion")
    parser.add_argument("--batch", type=int, help="images an iteration, over all processes")
    parser.add_argument("--lr", type=float, help="the learning rate at the start")
    parser.add_argument("--plateau", action="store_true", help="divide the rate where the error stalls")
    parser.add_argument(
        "--warm-up", action=argparse.BooleanOptionalAction, help="a tenth of the rate until the error is below 80 %%"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 and fp16 are autocast; default: fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-every", type=int, metavar="N", help="iterations between evaluations")
    parser.add_argument("--save-every", type=int, metavar="N", help="iterations between checkpoints")
    parser.add_argument("--log-every", type=int, default=50, metavar="N", help="iterations a row; default: %(default)s")
    parser.add_argument("--device", help='"cpu" or "cuda"; default: a GPU where there is one')
    parser.add_argument("--backend", choices=("auto", *registry.BACKENDS), default=registry.get_backend())
    parser.add_argument("--sync-bn", action="store_true", help="batch statistics over all processes")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--recompute", choices=("activations", "blocks"), help="compute these again, not keep them")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="processes that read images; default: 4")


def main(args: argparse.Namespace) -> int:
    """Run `resnet-fused train`.

    Raises:
        ValueError, OSError, FloatingPointError, ImportError: of `loop.train`, and where a package is missing.
    """
    for package in ("torchvision", "tqdm", "matplotlib"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f'train needs {package}: pip install "resnet_fused[train]" ({error})') from None
    from .loop import train

    own = ("out", "resume", "device", "backend", "compile", "recompute", "workers", "model_arg", "run")
    chosen = {key: value for key, value in vars(args).items() if key not in own}
    settings = Settings(**chosen, model_kwargs=dict(args.model_arg))
    out = args.out or Path("runs", f"{settings.recipe}-{settings.model}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device takes cpu or, where PyTorch sees a GPU, cuda; got {device!r}")
    how = {key: getattr(args, key) for key in ("resume", "backend", "compile", "recompute", "workers")}
    try:
        result = train(settings, out, device=device, **how)
    except RuntimeError as error:
        if any(sign in str(error) for sign in _DIED):
            what = str(error).strip().splitlines()[-1].partition(". ")[0]
            raise ChildProcessError(f"a process of the run died ({what}); --resume goes on from {out}") from error
        raise
    if os.environ.get("RANK", "0") == "0":
        print(f"{settings.model}: test error {result.error:.2f} % after {settings.iterations} iterations, in {out}")
    return 0


def _key_value(text: str) -> tuple[str, object]:
    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
