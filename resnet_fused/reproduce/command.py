"""The options and the output of `resnet-fused reproduce`."""

import argparse
import csv
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..analysis import plots
from ..bench.conditions import conditions
from ..bench.report import write_json
from ..dispatch import registry
from ..dispatch.store import atomic_write
from ..train.interrupt import Interrupted
from ..train.recipes import DTYPES
from . import architecture, figures, runs
from .experiments import EXPERIMENTS, Experiment
from .runs import Options, Run

Rows = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resnet-fused reproduce`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(f"{name:10}{experiment.title}" for name, experiment in EXPERIMENTS.items())
    parser.add_argument(
        "names", nargs="+", choices=EXPERIMENTS, metavar="NAME", help="a figure or table of those below"
    )
    parser.add_argument(
        "--depths", type=int, nargs="+", metavar="N", help="networks of these depths; default: the paper's"
    )
    parser.add_argument(
        "--fraction", type=float, default=1.0, metavar="F", help="of the papers' iterations; default: %(default)s"
    )
    parser.add_argument(
        "--data", help="cifar10[:FOLDER], imagefolder:FOLDER or synthetic[:COUNTxSIZE]; default: cifar10"
    )
    parser.add_argument("--batch", type=int, help="images an iteration; default: the paper's")
    parser.add_argument("--lr", type=float, help="the learning rate at the start; default: the paper's")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 and fp16 are autocast; default: fp32")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches; default: %(default)s")
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="look at trained networks on N test images (crops, scales, responses); default: all",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU where there is one")
    parser.add_argument(
        "--backend",
        choices=("auto", *registry.BACKENDS),
        default=registry.get_backend(),
        help="that serves the fused operators; default: %(default)s",
    )
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="processes that read images; default: 4")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("reproduced"),
        metavar="DIR",
        help="figures, tables and runs; default: %(default)s",
    )


def main(args: argparse.Namespace, device: torch.device) -> int:
    """Run `resnet-fused reproduce`: train what is not trained yet, then write each name's figure and table.

    Raises:
        ValueError, OSError, FloatingPointError: options that don't fit each other, or of the training.
    """
    if not 0 < args.fraction <= 1:
        raise ValueError(f"--fraction must be above 0 and at most 1, got {args.fraction}")
    if args.images is not None and args.images < 1:
        raise ValueError(f"--images must be at least 1, got {args.images}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("reproduce runs in one process; torchrun is for resnet-fused train")
    own = ("data", "fraction", "batch", "lr", "dtype", "seed", "backend", "workers", "images", "out")
    options = Options(device=device, **{key: getattr(args, key) for key in own})
    chosen = {name: (EXPERIMENTS[name], *EXPERIMENTS[name].networks(args.depths)) for name in args.names}
    for experiment, networks, _ in chosen.values():
        if experiment.recipe != "none":
            runs.settings(experiment, networks[0], options)  # what is wrong is said before the first run
    for name, (experiment, networks, skipped) in chosen.items():
        for line in skipped:
            print(f"{name}: {line}", file=sys.stderr)
        if experiment.recipe == "none":
            under: dict[str, Any] = {}
            rows = architecture.table(networks)
        else:
            try:
                found = [runs.run(experiment, network, options) for network in networks]
            except Interrupted as stop:
                signal_name = signal.Signals(stop.signum).name
                print(f"resnet-fused: {name} was stopped by {signal_name}; the same command goes on", file=sys.stderr)
                return 128 + stop.signum
            under, rows = _conditions(experiment, found, options), _rows(experiment, found, options)
            _draw(name, experiment, found, options)
        options.out.mkdir(parents=True, exist_ok=True)
        print(_write(options.out / name, experiment, under, rows), "\n")
    return 0


def _rows(experiment: Experiment, found: list[Run], options: Options) -> Rows:
    if experiment.look == "ensemble":
        paper = experiment.paper["ensemble"]
        names = ", ".join(run.network.label for run in found)
        return [{"network": f"ensemble of {names}"} | _errors(runs.errors(experiment, found, options), paper)]
    rows: Rows = []
    for run in found:
        paper = experiment.paper.get(run.network.label, {})
        row: dict[str, Any] = {"network": run.network.label, "parameters": run.parameters}
        if experiment.look == "curves":
            row |= {"training error": run.training_error, "test error": run.test_error, "paper": paper.get("top1")}
        elif experiment.look == "responses":
            stds = [std for _, std in runs.layer_responses(run, options)]
            row |= {"layers": len(stds), "mean std": sum(stds) / len(stds), "largest std": max(stds)}
        else:
            row |= _errors(runs.errors(experiment, [run], options), paper)
        rows.append(row)
    return rows


def _errors(found: dict[str, Any], paper: dict[str, float]) -> dict[str, Any]:
    return {
        "top-1": found["top1_error"],
        "top-1, paper": paper.get("top1"),
        "top-5": found["top5_error"],
        "top-5, paper": paper.get("top5"),
    }


def _draw(name: str, experiment: Experiment, found: list[Run], options: Options) -> None:
    for path in (options.out / f"{name}.png", options.out / f"{name}.svg"):
        if experiment.figure == "responses":
            plots.draw_responses(path, {run.network.label: runs.layer_responses(run, options) for run in found})
        elif experiment.figure:
            figures.draw(path, experiment, found)


def _conditions(experiment: Experiment, found: list[Run], options: Options) -> dict[str, Any]:
    asked = runs.settings(experiment, found[0].network, options)
    names = ("recipe", "data", "iterations", "batch", "lr", "dtype", "seed")
    used = {name: getattr(asked, name) for name in names} | {"fraction": options.fraction, "images": options.images}
    return used | {"backend": options.backend} | conditions(options.device)


def _write(path: Path, experiment: Experiment, under: dict[str, Any], rows: Rows) -> str:
    """The table as text, CSV and JSON, beside the figure."""
    text = _text(experiment, under, rows)
    with atomic_write(path.with_suffix(".csv")) as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_json(path.with_suffix(".json"), {"title": experiment.title, "conditions": under, "rows": rows})
    with atomic_write(path.with_suffix(".txt")) as file:
        file.write(f"{text}\n")
    return f"{text}\nin {path.parent}: {', '.join(sorted(p.name for p in path.parent.glob(f'{path.name}.*')))}"


def _text(experiment: Experiment, under: dict[str, Any], rows: Rows) -> str:
    lines = [experiment.title]
    if under:
        kind = (
            f"{under['data']}, {under['iterations']} iterations of {under['batch']} at {under['lr']}, {under['dtype']}"
        )
        lines.append(f"{kind}, seed {under['seed']}, {under['fraction']:.4g} of the paper's schedule")
        lines.append(f"{under['device']}, backend {under['backend']}, torch {under['torch']}")
    lines += [experiment.note] if experiment.note else []
    lines += ["", *_aligned([list(rows[0]), *([_cell(key, row[key]) for key in row] for row in rows)])]
    return "\n".join(lines)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "parameters":
        return f"{value / 1e6:.2f} M"
    if isinstance(value, float):
        return f"{value:.4g}" if "std" in key else f"{value:.2f} %"
    return str(value)


def _aligned(cells: Sequence[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
