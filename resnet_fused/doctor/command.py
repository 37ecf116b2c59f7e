"""`resnet-fused doctor`: its sections one after the other, each printed when it is there."""

import argparse
import collections
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .. import explain, info, models
from ..bench import host
from ..dispatch import registry
from ..tables import table
from . import layers, parity, replay, runs

SIZE, BATCH, BATCHES = 224, 32, (1, 32, 256)  # images; of the layers, and end to end
_WITHOUT_GPU = (
    "no GPU here: on one, doctor also times every kind of layer by every backend against eager and the device's own "
    "ceilings, a cold start, and ResNet-50 end to end"
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU where there is one")
    command.add_argument("--json", type=Path, metavar="FILE", help="write everything there too; default: nowhere")
    command.add_argument(
        "--replay",
        type=Path,
        metavar="FILE",
        help="run a refused kernel's check again, nothing else; default: all of doctor",
    )


def main(args: argparse.Namespace, device: torch.device) -> int:
    """0 where every check passed, else 1; with --replay, where that one did."""
    if args.replay is not None:
        return replay.run(args.replay, device)
    found: dict[str, Any] = {"environment": info.collect()}
    print(info.text(found["environment"]), end="\n\n")
    on_gpu = device.type == "cuda"
    print("numbers against float64: the largest error's share of its budget")
    _now("checking every operator, backend and dtype")
    if on_gpu:
        found["parity"], found["not_checked"] = list(parity.rows(device)), parity.lacking(device)
    else:
        try:
            found["parity"], found["not_checked"] = parity.interpreted()
        except RuntimeError as error:
            found["parity"], found["not_checked"] = [], {"the interpreter's part": str(error)}
    _print(_parity_table(found["parity"]))
    for name, reason in found["not_checked"].items():
        print(f"  {name} is not checked: {reason}")
    _now("timing the host's part of ResNet-50 beside torchvision's")
    found["host"] = _host()
    print(f"\nhost time of ResNet-50, of torchvision's: {_host_text(found['host'])}")
    if on_gpu:
        _on_gpu(found, device)
    found["verdict"] = verdict(found)
    print(f"\n{found['verdict']}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1, allow_nan=False))
    return 1 if not found["parity"] or any(row["wrong"] for row in found["parity"]) else 0


def _now(what: str) -> None:
    """What takes seconds, before it does."""
    print(f"doctor: {what}", file=sys.stderr, flush=True)


def _on_gpu(found: dict[str, Any], device: torch.device) -> None:
    _now("measuring the device's ceilings")
    found["ceilings"] = layers.ceilings(device)
    print(f"\nceilings: copy {found['ceilings']['copy_gb_s']:.0f} GB/s, ", end="")
    print(f"float16 products {found['ceilings']['gemm_tflop_s']:.0f} TFLOP/s")
    found["layers"] = {}
    for training in (False, True):
        mode = "training, forward and backward" if training else "inference"
        print(f"\nmicroseconds a layer, ResNet-50, batch {BATCH}, {mode}")
        _now(f"timing every kind of layer by every backend, {mode}")
        found["layers"][mode] = layers.rows(device, BATCH, SIZE, found["ceilings"], training)
        _print(_layer_table(found["layers"][mode]))
    _now("starting two processes, with empty caches and with full ones")
    found["cold_start"] = runs.cold_start(device, SIZE)
    print(f"\nfirst ResNet-50 forward pass: {_numbers(found['cold_start'])}")
    model = models.resnet50().to(device).eval()
    with torch.no_grad():
        served = explain(model, torch.randn(BATCH, 3, SIZE, SIZE, device=device))
    found["auto"] = [{"layer": row.layer, "ran": row.ran, "why": row.why} for row in served]
    chosen = collections.Counter(ran.partition(" (")[0] for row in served for ran in row.ran)
    print(f"\nwhat auto chose at batch {BATCH}: {', '.join(f'{ran} {n}x' for ran, n in chosen.most_common())}")
    found["end_to_end"] = []
    print("\nResNet-50 end to end, float16, eager and auto")
    _now("timing ResNet-50 end to end")
    for batch, training in itertools.product(BATCHES, (False, True)):
        found["end_to_end"].append(row := runs.end_to_end(device, batch, SIZE, training))
        print(f"  batch {batch:3} {'train' if training else 'eval ':5} {_numbers(row)}")


def _host() -> dict[str, Any]:
    """Microseconds of both, or what they lack."""
    try:
        return host.figures("resnet50")
    except (ImportError, RuntimeError) as error:
        return {"lacks": str(error)}


def _host_text(found: dict[str, Any]) -> str:
    if "lacks" in found:
        return f"not measured, {found['lacks']}"
    return ", ".join(f"{mode} {ours / theirs:.2f}x" for mode, (theirs, ours) in found.items())


def verdict(found: dict[str, Any]) -> str:
    """One line."""
    wrong = [row for row in found["parity"] if row["wrong"]]
    if wrong:
        first = wrong[0]
        what = f"{first['operator']} on {first['backend']} in {first['dtype']}: {first['wrong']}"
        return f"{len(wrong)} of {len(found['parity'])} checks FAILED, first {what}"
    if not found["parity"]:
        return f"NOTHING was checked: {'; '.join(f'{name}: {why}' for name, why in found['not_checked'].items())}"
    checked = ", ".join(dict.fromkeys(row["backend"] for row in found["parity"]))
    passed = f"all {len(found['parity'])} checks passed, of {checked}"
    if "end_to_end" not in found:
        return f"{passed}; {_WITHOUT_GPU}"
    gains = [
        f"{row['gain']:.2f}x eager at batch {row['batch']} {'training' if row['training'] else 'inference'}"
        for row in found["end_to_end"]
        if "gain" in row
    ]
    slower = any(row.get("gain", 1.0) < 0.98 for row in found["end_to_end"])
    return f"{passed}; {'SLOWER than eager somewhere: ' if slower else ''}{', '.join(gains)}"


def _numbers(row: dict[str, Any]) -> str:
    named = {k: v for k, v in row.items() if k not in ("batch", "training")}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in named.items())


def _parity_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A row an operator and dtype, a column a backend: the largest share, or what is wrong."""
    names = [name for name in registry.BACKENDS if any(row["backend"] == name for row in rows)]
    table = [["operator", "dtype", *names]]
    for operator, dtype in dict.fromkeys((row["operator"], row["dtype"]) for row in rows):
        cells = []
        for name in names:
            mine = [r for r in rows if (r["operator"], r["dtype"], r["backend"]) == (operator, dtype, name)]
            wrong = next((f"{r['case']}: {r['wrong']}" for r in mine if r["wrong"]), None)
            cells.append(wrong or (f"{max(r['share'] or 0.0 for r in mine):.2f}" if mine else "-"))
        table.append([operator, dtype, *cells])
    return table


def _layer_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    table = [["layer", "layers", *names, "floor", "floor / best"]]
    for row in rows:
        times = [f"{row['us'][n]:.1f}" if n in row["us"] else "-" for n in names]
        floor = row.get("floor_us")
        best = min(row["us"].values(), default=None)
        share = f"{floor / best:.0%}" if floor is not None and best else "-"
        table.append([row["layer"], str(row["layers"]), *times, "-" if floor is None else f"{floor:.1f}", share])
    return table


def _print(rows: list[list[str]]) -> None:
    print(table(rows[1:], rows[0], indent=2))
