"""The options and the output of `resnet-fused bench`."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import host
from .engine import BASELINE, DTYPES, run
from .report import write_json
from .variants import VARIANTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resnet-fused bench`."""
    parser.add_argument(
        "--model", help=f"with --fuse also timm/resnet50d; default: resnet50, for {host.SUITE} {', '.join(host.MODELS)}"
    )
    parser.add_argument(
        "--fuse", action="store_true", help="the model of torchvision or timm as it is, beside itself fused"
    )
    parser.add_argument(
        "--suite",
        default="inference",
        help="; ".join(f"{name}: {what}" for name, (what, _) in SUITES.items()) + "; default: %(default)s",
    )
    parser.add_argument("--batch", type=int, help="images a call; default: 8 on the CPU, 128 on a GPU")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)}; default: float32 on the CPU, float16 on a GPU")
    parser.add_argument("--device", help='"cpu", "cuda" or "cuda:N"; default: a GPU where there is one')
    parser.add_argument(
        "--variants",
        help=f"comma-separated, out of: {', '.join(VARIANTS)}; with --fuse original and fused stand for "
        "torchvision and resnet_fused; default: all that are there",
    )
    parser.add_argument("--baseline", help=f"the variant that ratios are taken against; default: {BASELINE}")
    parser.add_argument(
        "--rounds", type=int, help="every round times each variant; default: 10, or fewer where they take long"
    )
    parser.add_argument("--image-size", type=int, default=224, help="height and width; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the samples and their conditions there too")


def main(args: argparse.Namespace) -> int:
    """Run `resnet-fused bench`: 0, or 1 where a variant was refused, failed, or is missing though it was asked for.

    Raises:
        ValueError, ImportError, OSError: of the suite, and where the JSON file can't be written.
    """
    if args.suite not in SUITES:
        raise ValueError(f"--suite: unknown {args.suite!r}; there are: {', '.join(SUITES)}")
    if args.json and not (args.json.parent.is_dir() and os.access(args.json.parent, os.W_OK)):
        raise ValueError(f"--json {args.json}: can't write into the folder {args.json.parent}")
    _, suite = SUITES[args.suite]
    return suite(args)


def _host(args: argparse.Namespace) -> int:
    found, status = host.run([args.model] if args.model else host.MODELS, args.rounds or host.ROUNDS)
    if args.json:
        write_json(args.json, found)
    return status


def _models(args: argparse.Namespace) -> int:
    report = run(
        args.model or "resnet50",
        args.batch,
        args.dtype,
        args.device,
        args.variants.split(",") if args.variants is not None else None,
        suite=args.suite,
        fuse=args.fuse,
        baseline=args.baseline,
        rounds=args.rounds,
        image_size=args.image_size,
        track=progress,
    )
    print(report.table())
    if args.json:
        write_json(args.json, report.to_dict())
    return 0 if report.ok else 1


SUITES: dict[str, tuple[str, Callable[[argparse.Namespace], int]]] = {
    "inference": ("the forward pass", _models),
    "training": ("a train step", _models),
    host.SUITE: ("what launching costs the CPU", _host),
}


def progress(items: Sequence[Any], label: str) -> Iterator[Any]:
    """The items, with a bar on standard error, or a line for each where tqdm or a terminal is missing."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        for i, item in enumerate(items, 1):
            print(f"{label} {item} ({i}/{len(items)})", file=sys.stderr, flush=True)
            yield item
        return
    with tqdm(total=len(items), file=sys.stderr, leave=False) as bar:
        for item in items:
            bar.set_description(f"{label} {item}")
            yield item
            bar.update()
