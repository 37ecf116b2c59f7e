"""The options and the output of `resnet-fused eval`."""

import argparse
import json
import os
from dataclasses import asdict
from typing import Any

import torch

from .. import models
from ..dispatch import registry
from ..tables import table
from ..train.recipes import DTYPES
from .networks import Network
from .scores import Result, Samples, evaluate
from .views import CENTER, SCALES, SINGLE, TEN_CROPS, Views, multi_scale


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resnet-fused eval`."""
    add_common_arguments(parser)
    views = parser.add_mutually_exclusive_group()
    views.add_argument(
        "--crops", type=int, choices=(1, 10), default=1, help="the centre, or ten crops; default: %(default)s"
    )
    views.add_argument(
        "--scales",
        type=int,
        nargs="*",
        metavar="SIDE",
        help=f"fully convolutional at these short sides, alone: {' '.join(map(str, SCALES))}; default: --crops",
    )
    parser.add_argument("--per-class", action="store_true", help="the error of every class too; default: no")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 and fp16 are autocast; default: fp32")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which networks on which data, and where."""
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="NETWORK",
        help="a run of resnet-fused train, by its folder or checkpoint, or MODEL:WEIGHTS, such as resnet50:MSRA",
    )
    parser.add_argument(
        "--model", choices=models.list_models(), metavar="NAME", help="instead, with --weights; default: none"
    )
    parser.add_argument(
        "--weights", help="of --model: DEFAULT, IMAGENET1K_V1, MSRA, or a checkpoint's path; default: none"
    )
    parser.add_argument(
        "--data",
        help="cifar10[:FOLDER], imagefolder:FOLDER (of any of ImageNet's wnids, too) or synthetic[:COUNTxSIZE]; "
        "default: that of the first run",
    )
    parser.add_argument("--images", type=int, metavar="N", help="N images, evenly out of the test split; default: all")
    parser.add_argument("--batch", type=int, default=64, help="images at a time; default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU where there is one")
    parser.add_argument(
        "--backend",
        choices=("auto", *registry.BACKENDS),
        default=registry.get_backend(),
        help="that serves the fused operators; default: %(default)s",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that read images; default here: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print JSON; default: tables")


def main(args: argparse.Namespace, device: torch.device) -> int:
    """Run `resnet-fused eval`.

    Raises:
        ValueError, OSError, FloatingPointError, FetchError: of the data, the networks and `evaluate`.
    """
    views = CENTER if args.crops == 1 else TEN_CROPS
    if args.scales is not None:
        views = multi_scale(args.scales or SCALES)
    networks, samples = load(args, views)
    with registry.backend(args.backend):
        result = evaluate(
            networks, samples, batch=args.batch, device=device, dtype=DTYPES[args.dtype], workers=args.workers
        )
    conditions = {
        "networks": [network.name for network in networks],
        "data": args.data,
        "views": samples.views.name,
        "device": str(device),
        "backend": args.backend,
        "dtype": args.dtype,
    }
    if not args.per_class:
        result.per_class.clear()
    print(json.dumps(conditions | asdict(result), indent=2) if args.json else _text(conditions, result))
    return 0


def load(args: argparse.Namespace, views: Views = CENTER) -> tuple[list[Network], Samples]:
    """The networks that the options name, and the data's test split as they see it.

    Args:
        args: of `add_common_arguments`; data is filled in.
        views: of networks that were trained on ImageNet's crops; the others see whole images.

    Raises:
        ValueError, OSError, FetchError: options that don't fit each other, or something that can't be read.
    """
    for name, least in (("images", 1), ("batch", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if args.model is None and args.weights or args.model is not None and (args.checkpoints or not args.weights):
        raise ValueError("--model goes with --weights, and without other networks")
    if args.model is not None:
        networks = [Network.from_weights(args.model, args.weights)]
    elif args.checkpoints:
        networks = [Network.from_argument(text) for text in args.checkpoints]
    else:
        raise ValueError("name a run of resnet-fused train, or MODEL:WEIGHTS such as resnet50:MSRA")
    args.data = args.data or networks[0].data
    if args.data is None:
        raise ValueError(f"--data is needed: {networks[0].name} does not say on which data")
    return networks, Samples(args.data, _views(networks, args.data, views), limit=args.images)


def _views(networks: list[Network], data: str, views: Views) -> Views:
    whole = [network.name for network in networks if not network.crop]
    if not whole:
        own = {(network.resize, network.crop) for network in networks}
        return networks[0].views() if views is CENTER and len(own) == 1 else views
    if len(whole) < len(networks):
        raise ValueError(f"{whole[0]} sees whole images, the others crops: they make no ensemble")
    if views is not CENTER:
        raise ValueError(f"--crops and --scales are for networks that see crops; {whole[0]} sees whole images")
    if data.startswith("imagefolder:"):
        raise ValueError(f"an image folder is for networks that see crops; {whole[0]} sees whole images of one size")
    return SINGLE


def _text(conditions: dict[str, Any], result: Result) -> str:
    names, c = conditions["networks"], conditions
    lines = [
        names[0] if len(names) == 1 else f"ensemble of {', '.join(names)}",
        f"{c['data']}, {result.images} images, {c['views']}, {c['device']}, backend {c['backend']}, {c['dtype']}",
        "",
        f"top-1 error {result.top1_error:7.2f} %",
    ]
    lines.append(
        "top-5 error: left out, there are fewer than 5 classes"
        if result.top5_error is None
        else f"top-5 error {result.top5_error:7.2f} %"
    )
    if result.per_class:
        rows = [(r["class"], r["images"], f"{r['top1_error']:.2f} %") for r in result.per_class]
        lines += ["", table(rows, ("class", "images", "top-1 error"), right=(1, 2))]
    return "\n".join(lines)
