"""The options and the output of `resnet-fused bench`."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..dispatch import registry
from ..models.weights import TORCHVISION_ENUMS
from . import ceilings, fit, host, ops, parity, traffic
from .collect import collect
from .conditions import conditions
from .engine import BASELINE, DTYPES, check, resolve_device, run, torchvision
from .report import write_json
from .variants import VARIANTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resnet-fused bench`."""
    parser.add_argument(
        "--model", help=f"with --fuse also timm/resnet50d; default: resnet50, for {host.SUITE} {', '.join(host.MODELS)}"
    )
    parser.add_argument(
        "--fuse",
        action="store_true",
        help="a model of torchvision or timm as it is, beside itself fused; default: ours beside torchvision's",
    )
    parser.add_argument(
        "--suite",
        default="inference",
        help="; ".join(f"{name}: {what}" for name, (what, _) in SUITES.items()) + "; default: %(default)s",
    )
    parser.add_argument("--batch", type=int, help="images a call; default: 8 on the CPU, 128 on a GPU")
    parser.add_argument(
        "--dtype",
        help=f"{', '.join(DTYPES)}; for parity and ops several, with commas; default: float32 on the CPU, float16 on "
        "a GPU, for parity and ops all that are served there",
    )
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
    parser.add_argument(
        "--bytes",
        action="store_true",
        help="with --suite inference: images are uint8, normalised inside the model, or in front of torchvision's; "
        "default: they are normalised already",
    )
    parser.add_argument(
        "--fit",
        type=fit.memory,
        metavar="MEMORY",
        help="with --suite training: the cheapest recompute and the largest batch that fit, as 24GiB; default: none",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="parity and ops: go on with the rows that the JSON file has; default: begin anew",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the samples and their conditions there too; default: nowhere"
    )


def main(args: argparse.Namespace) -> int:
    """Run `resnet-fused bench`: 0, or 1 where a variant was refused, failed, or is missing though it was asked for.

    Raises:
        ValueError, ImportError, OSError: of the suite, and where the JSON file can't be written.
        BackendUnavailable: none of the variants can run.
    """
    if args.suite not in SUITES:
        raise ValueError(f"--suite: unknown {args.suite!r}; there are: {', '.join(SUITES)}")
    if args.json and not (args.json.parent.is_dir() and os.access(args.json.parent, os.W_OK)):
        raise ValueError(f"--json {args.json}: can't write into the folder {args.json.parent}")
    if args.bytes and (args.suite != "inference" or args.fuse):
        raise ValueError(f"--bytes goes with --suite inference and without --fuse, got --suite {args.suite}")
    _, suite = SUITES[args.suite]
    if args.fuse and suite is not _models:
        raise ValueError(f"--fuse goes with --suite inference or training, got --suite {args.suite}")
    return suite(args)


def _host(args: argparse.Namespace) -> int:
    found, status = host.run([args.model] if args.model else host.MODELS, args.rounds or host.ROUNDS)
    return _written(args, found, status)


def _ledger(args: argparse.Namespace) -> int:
    model, dtype, batch = args.model or "resnet50", args.dtype or "float16", args.batch or traffic.BATCH
    check(model, dtype, batch, args.image_size)
    return _written(args, traffic.measure(args.suite, model, batch, dtype, args.image_size))


def _fit(args: argparse.Namespace) -> int:
    device = resolve_device(args.device)
    model, dtype = args.model or "resnet50", args.dtype or "bfloat16"
    check(model, dtype, args.batch or 1, args.image_size)
    found = fit.measure(model, args.fit, dtype, args.batch, args.image_size, device)
    return _written(args, found, 0 if found["fits"] else 1)


def _settings(args: argparse.Namespace) -> tuple[torch.device, dict[str, torch.dtype], dict[str, Any]]:
    """The device, the dtypes by name, and the head of the report."""
    device = resolve_device(args.device)
    low = ("float16", "bfloat16") if device.type == "cuda" else ("bfloat16",)
    names = args.dtype.split(",") if args.dtype else [*low, "float32"]
    for name in names:
        check(None, name, 1, args.image_size)
    head = {"task": args.suite, "device": device.type, "dtypes": names, "conditions": conditions(device)}
    return device, {name: DTYPES[name] for name in names}, head


def _parity(args: argparse.Namespace) -> int:
    device, dtypes, head = _settings(args)
    names = args.model.split(",") if args.model else list(TORCHVISION_ENUMS)
    for name in names:
        check(name, next(iter(dtypes)), 1, args.image_size)
    print("errors against float64: largest (mean)")
    rows = parity.rows(torchvision(), names, dtypes, device)
    report = collect(head | {"models": names}, rows, args.json, args.resume, parity.line)
    return _written(args, report, 0 if parity.ok(report) else 1)


def _ops(args: argparse.Namespace) -> int:
    device, dtypes, head = _settings(args)
    names = args.variants.split(",") if args.variants else parity.backends(device)
    known = (*registry.BACKENDS, ops.COMPILED)
    for name in names:
        if name not in known:
            raise ValueError(f"variants: unknown {name!r}; the suite ops has: {', '.join(known)}")
    _some_can_run({name: None if name == ops.COMPILED else registry.unavailable(name, device) for name in names})
    found = {name: ceilings.measured(dtype, device) for name, dtype in dtypes.items()}
    for name, c in found.items():
        print(f"{name}: copy {c.bytes_per_s / 1e9:.0f} GB/s, matrix product {c.flops_per_s / 1e12:.2f} TFLOP/s")
    report = head | {"variants": names}
    report["conditions"]["ceilings"] = {name: asdict(c) for name, c in found.items()}
    report = collect(report, ops.rows(names, dtypes, device, found), args.json, args.resume, ops.line)
    wrong = [b for row in report["rows"] for b in row["backends"].values() if b["status"] in ("refused", "failed")]
    return _written(args, report, 1 if wrong else 0)


def _some_can_run(reasons: dict[str, str | None]) -> None:
    """reasons: of every variant why it can't run, or None."""
    if all(reasons.values()):
        told = "; ".join(f"{variant}: {reason}" for variant, reason in reasons.items())
        raise registry.BackendUnavailable(f"none of the variants can run: {told}")


def _written(args: argparse.Namespace, found: Any, status: int = 0) -> int:
    if args.json:
        write_json(args.json, found)
    return status


def _models(args: argparse.Namespace) -> int:
    if args.fit is not None:
        if args.suite != "training":
            raise ValueError(f"--fit belongs to --suite training, got --suite {args.suite}")
        return _fit(args)
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
        of_bytes=args.bytes,
        track=progress,
    )
    _some_can_run({r.variant: r.reason if r.status == "unavailable" else None for r in report.results})
    print(report.table())
    return _written(args, report.to_dict(), 0 if report.ok else 1)


SUITES: dict[str, tuple[str, Callable[[argparse.Namespace], int]]] = {
    "inference": ("the forward pass", _models),
    "training": ("a train step", _models),
    "parity": ("errors against float64 of every operator and model", _parity),
    "ops": ("every operator by itself", _ops),
    "memory": ("bytes kept for backward and the peak, counted", _ledger),
    "traffic": ("bytes read and written, and launches, counted", _ledger),
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
