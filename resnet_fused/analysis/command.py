"""The options and the output of `resnet-fused analyze`."""

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import models
from ..dispatch import registry
from ..evaluation import Network, Samples, batches
from ..evaluation.command import add_common_arguments, load
from ..tables import table
from ..train.batches import Batch, make_source
from ..train.distributed import World
from ..train.recipes import Settings
from . import plots
from .measures import Values, gradient_norms, lesions, responses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resnet-fused analyze`."""
    parser.add_argument(
        "--responses", action="store_true", help="standard deviation of the layers' responses; default: no"
    )
    parser.add_argument(
        "--gradients", action="store_true", help="norm of the gradient by every layer's weight; default: no"
    )
    parser.add_argument("--lesions", action="store_true", help="the error without each residual block; default: no")
    add_common_arguments(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the networks that --gradients --model draws; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=Path("analysis"), help="folder of the plots; default: %(default)s")


def main(args: argparse.Namespace, device: torch.device) -> int:
    """Run `resnet-fused analyze`.

    Raises:
        ValueError, OSError, FetchError: options that don't fit each other, or something that can't be read or written.
    """
    chosen = [name for name in _MEASURES if getattr(args, name)]
    if not chosen:
        raise ValueError("choose a measure: --responses, --gradients, --lesions")
    if args.model and not args.weights and chosen != ["gradients"]:
        raise ValueError(
            "--responses and --lesions are of trained networks: name a checkpoint, or --model and --weights"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"device": str(device), "backend": args.backend}
    with registry.backend(args.backend):
        for name in chosen:
            measured = _MEASURES[name](args, device)
            path = args.out / f"{name}.png"
            getattr(plots, f"draw_{name}")(path, measured)
            result[name] = {"plot": str(path), "networks": [_rows(name, n, v) for n, v in measured.items()]}
    result = {"data": args.data, **result}
    print(json.dumps(result, indent=2, allow_nan=False) if args.json else _text(result))
    return 0


def _responses(args: argparse.Namespace, device: torch.device) -> dict[str, Values]:
    networks, samples = load(args)
    return {n.name: responses(n.model.to(device), _batches(args, n, samples, device)) for n in networks}


def _lesions(args: argparse.Namespace, device: torch.device) -> dict[str, tuple[float, Values]]:
    networks, samples = load(args)
    return {
        n.name: lesions(n.model.to(device), functools.partial(_batches, args, n, samples, device)) for n in networks
    }


def _batches(args: argparse.Namespace, network: Network, samples: Samples, device: torch.device) -> Iterable[Batch]:
    found = batches(network, samples, args.batch, device, args.workers)
    total = math.ceil(len(samples) / args.batch)
    return tqdm(found, desc=network.name, total=total, unit="batch", disable=None, leave=False)


def _gradients(args: argparse.Namespace, device: torch.device) -> dict[str, Values]:
    """On the first batch of the training that the network's recipe makes of the data."""

    def first(recipe: str, normalization: tuple[Tensor, Tensor] | None = None) -> tuple[tuple[str, ...], Batch]:
        settings = Settings(recipe, data=args.data, batch=args.batch, seed=args.seed)
        args.data = settings.data
        source = make_source(settings, World(), device, 0, normalization)
        return tuple(source.classes), next(source.train(0, 1))

    if args.model is None or args.weights:
        networks, _ = load(args)
        values = {}
        for n in networks:
            classes, (x, labels) = first(n.recipe, (n.mean, n.std))
            target = n.targets(classes).to(device)
            values[n.name] = gradient_norms(n.model.to(device), x, target[labels])
        return values
    if args.checkpoints:
        raise ValueError("--model goes without a checkpoint")
    classes, batch = first("cifar" if args.model.startswith("cifar_") else "imagenet")
    return {
        name: gradient_norms(_drawn(name, len(classes), args.seed).to(device), *batch) for name in _twins(args.model)
    }


def _drawn(name: str, num_classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.get_model(name, num_classes=num_classes)


def _twins(name: str) -> list[str]:
    """The residual network of that name and its plain twin, where both are there."""
    pair = [name.replace("plain", "resnet"), name.replace("resnet", "plain")]
    return pair if set(pair) <= set(models.list_models()) else [name]


Measure = Callable[[argparse.Namespace, torch.device], dict[str, Any]]
_MEASURES: dict[str, Measure] = {"responses": _responses, "gradients": _gradients, "lesions": _lesions}
_TITLES = {
    "responses": "standard deviation of the layers' responses, after BN and before the nonlinearity",
    "gradients": "norm of the loss's gradient by every layer's weight, in train mode",
    "lesions": "top-1 error in percent without each block",
}


def _rows(measure: str, name: str, measured: Any) -> dict[str, Any]:
    """One network's part of the JSON."""
    if measure == "lesions":
        whole, values = measured
        blocks = [{"block": block, "error": error, "change": error - whole} for block, error in values]
        return {"network": name, "error": whole, "blocks": blocks}
    key = {"responses": "std", "gradients": "norm"}[measure]
    return {"network": name, "layers": [{"layer": layer, key: value} for layer, value in measured]}


def _text(result: dict[str, Any]) -> str:
    lines = []
    for measure, title in _TITLES.items():
        if measure not in result:
            continue
        lines += [f"{title} (plot: {result[measure]['plot']})"]
        for network in result[measure]["networks"]:
            lines += ["", network["network"], _table(measure, network), ""]
    return "\n".join(lines).rstrip()


def _table(measure: str, network: dict[str, Any]) -> str:
    if measure == "lesions":
        blocks = [(row["block"], f"{row['error']:.2f}", f"{row['change']:+.2f}") for row in network["blocks"]]
        whole = ("(whole)", f"{network['error']:.2f}", "")
        return table([whole, *blocks], ("block", "error", "change"), right=(1, 2), indent=2)
    rows = [tuple(row.values()) for row in network["layers"]]
    if measure == "gradients":
        return table([(layer, f"{norm:.4g}") for layer, norm in rows], ("layer", "norm"), right=[1], indent=2)
    ranked = sorted(rows, key=lambda row: -row[1])
    pairs = zip(rows, ranked, strict=True)
    cells = [(layer, f"{std:.4f}", other, f"{most:.4f}") for (layer, std), (other, most) in pairs]
    return table(cells, ("layer", "std", "by magnitude", "std"), right=(1, 3), indent=2)
