"""Every fused operator that a model calls, by layer shape: microseconds, share of its floor, the fastest backend.

The floor is the greater of two times: all operands and results once at the bandwidth of a device copy, and the
multiply-adds at the speed of a large matrix product, both measured in the same run. A call is timed as a program makes
it, launch included. With --device only the floors are computed, of a device that need not be there.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import BackendUnavailable, bench, ops
from resnet_fused.bench import ceilings, floors
from resnet_fused.bench.ceilings import ROUNDS, SAMPLE_MS, milliseconds
from resnet_fused.dispatch import registry
from resnet_fused.models import get_model
from resnet_fused.ops.stem import flops as stem_flops
from resnet_fused.testing import as_tuple


@dataclass
class Call:
    """One registered operator on one set of shapes."""

    op: str
    args: tuple
    layers: int = 1

    @property
    def shape(self) -> str:
        shapes = ["x".join(map(str, a.shape)) for a in self.args if isinstance(a, Tensor) and a.dim() == 4]
        return " ".join(shapes[:2])

    def run(self) -> tuple[Tensor, ...]:
        return as_tuple(getattr(torch.ops.resnet_fused, self.op)(*self.args))

    def bytes(self, results: tuple[Tensor, ...]) -> int:
        return sum(t.numel() * t.itemsize for t in (*self.args, *results) if isinstance(t, Tensor))

    def flops(self, results: tuple[Tensor, ...]) -> int:
        """Two for each multiply-add of the convolution; nothing else counts."""
        if self.op == "stem":
            return stem_flops(self.args[0].shape, self.args[1].shape)
        return 2 * results[0].numel() * self.args[1][0].numel() if self.op == "conv_bn_act" else 0


class Watching(TorchDispatchMode):
    """With someone looking on, training runs in its registered steps."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def calls_of(run: Callable[[], object]) -> list[Call]:
    """The fused operators that `run` calls, one for each set of shapes, in order."""
    found: dict[tuple, Call] = {}

    def listen(op: str, choice: registry.Choice, args: tuple) -> None:
        key = (op, *((a.shape, a.dtype) if isinstance(a, Tensor) else str(a) for a in args))
        if key in found:
            found[key].layers += 1
        else:
            found[key] = Call(op, type(args)(*(a.detach() if isinstance(a, Tensor) else a for a in args)))

    before, registry.listener = registry.listener, listen
    try:
        with Watching():
            run()
    finally:
        registry.listener = before
    return list(found.values())


def backends(device: torch.device) -> list[str]:
    return [b for b in registry.BACKENDS if b != "eager" and registry.unavailable(b, device) is None]


@torch.no_grad()
def rows(calls: list[Call], bandwidth: float, peak: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each call, with every backend that serves it."""
    for call in calls:
        times, refused, split = {}, {}, {}
        conv = call.op == "conv_bn_act"
        for name in [*backends(device), *(["eager"] if conv else [])]:
            try:
                with registry.backend(name):
                    results = call.run()
                    times[name] = milliseconds(call.run, device)
                    if conv and (why := registry.splits(name, call.args)) is not None:
                        split[name] = why
            except BackendUnavailable as error:
                refused[name] = str(error)
        moved, flops = call.bytes(results), call.flops(results)
        fused = times.keys() - split.keys() - {"eager"}  # what `auto` takes: more than one kernel only for want of one
        best = min(fused or times.keys() - {"eager"}, key=times.__getitem__)
        floor = max(moved / bandwidth, flops / peak)
        yield {
            "op": call.op,
            "shape": call.shape,
            "layers": call.layers,
            "best": best,
            "microseconds": {name: ms * 1e3 for name, ms in times.items()},
            "floor_microseconds": floor * 1e6,
            "share_of_floor": floor * 1e3 / times[best],
            "gb_per_s": moved / times[best] / 1e6,
            "share_of_copy": moved / times[best] * 1e3 / bandwidth,
            "tflop_per_s": flops / times[best] / 1e9,
            "refused": refused,
            "in_several_kernels": split,
        }


def against_pytorch(calls: list[Call], device: torch.device) -> Iterator[dict[str, Any]]:
    """Batch norm, add and ReLU in train mode, forward and backward, beside PyTorch's own three operators."""
    for call in calls:
        if call.op != "batch_norm_act_apply":
            continue
        x, weight, bias, *_, residual = call.args[:7]
        joined = call.args[9] is not None
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual) if t is not None]
        dy = torch.randn_like(x)

        def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, joined: bool = joined):
            y = F.batch_norm(x, None, None, weight, bias, True)
            if residual is not None:
                y = y + (F.batch_norm(residual, None, None, weight, bias, True) if joined else residual)
            return F.relu(y)

        def fused(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, joined: bool = joined):
            shortcut = (weight, bias, None, None) if joined else None
            return ops.batch_norm_act(x, weight, bias, None, None, residual=residual, residual_bn=shortcut)

        def backward(y: Tensor, leaves: list[Tensor] = leaves, dy: Tensor = dy) -> object:
            return torch.autograd.grad(y, leaves, dy, retain_graph=True)

        graphs = {"plain": plain(*leaves), "fused": fused(*leaves)}
        timed = {
            "forward": {"plain": lambda f=plain, a=leaves: f(*a), "fused": lambda f=fused, a=leaves: f(*a)},
            "backward": {name: lambda y=y, b=backward: b(y) for name, y in graphs.items()},
        }
        row = {"shape": call.shape, "layers": call.layers, "residual": residual is not None, "residual_bn": joined}
        for phase, pair in timed.items():
            for f in pair.values():
                f()
            samples = bench.time_rounds(pair, ROUNDS, device, min_sample_ms=SAMPLE_MS)
            row[f"{phase}_microseconds"] = {name: statistics.median(s) * 1e3 for name, s in samples.items()}
            row[f"{phase}_ratio"] = statistics.median(bench.paired_ratios(samples["plain"], samples["fused"]))
        yield row


def measure(suite: str, model: torch.nn.Module, x: Tensor) -> dict[str, Any]:
    """All figures of one suite, printed as they come.

    Args:
        suite: "inference" or "training".
        model: on the device of x, for inference in its dtype, for training in float32; its mode is set.
        x: [N, 3, H, W].
    """
    device, train = x.device, suite == "training"
    found = ceilings.measured(x.dtype, device)
    bandwidth, peak = found.bytes_per_s, found.flops_per_s
    print(f"copy {bandwidth / 1e9:.0f} GB/s, matrix product {peak / 1e12:.2f} TFLOP/s", flush=True)
    model.train(train)

    def step() -> None:
        with torch.set_grad_enabled(train), torch.autocast(device.type, x.dtype, x.dtype != torch.float32 and train):
            y = model(x)
        if train:
            y.sum().backward()

    calls = calls_of(step)
    found = []
    titles = f"{'best':>8}{'us':>10}{'floor us':>10}{'share':>7}{'GB/s':>8}{'copy':>6}"
    print(f"\n{'operator':30}{'shape':36}{'layers':>7}{titles}")
    for row in rows(calls, bandwidth, peak, device):
        us = row["microseconds"][row["best"]]
        print(
            f"{row['op']:30}{row['shape']:36}{row['layers']:7}{row['best']:>8}{us:10.1f}{row['floor_microseconds']:10.1f}"
            f"{row['share_of_floor']:7.0%}{row['gb_per_s']:8.0f}{row['share_of_copy']:6.0%}",
            flush=True,
        )
        found.append(row)
    best = math.fsum(row["layers"] * row["microseconds"][row["best"]] for row in found)
    floor = math.fsum(row["layers"] * row["floor_microseconds"] for row in found)
    print(f"all layers: {best:.0f} us, {floor / best:.0%} of the floor of {floor:.0f} us")
    result = {"copy_gb_per_s": bandwidth / 1e9, "matmul_tflop_per_s": peak / 1e12, "calls": found}
    if train:
        print(f"\n{'batch_norm_act beside PyTorch':36}{'residual':>10}{'forward':>9}{'backward':>9}")
        result["against_pytorch"] = []
        for row in against_pytorch(calls, device):
            kind = "with BN" if row["residual_bn"] else "plain" if row["residual"] else "-"
            print(f"{row['shape']:36}{kind:>10}{row['forward_ratio']:8.2f}x{row['backward_ratio']:8.2f}x", flush=True)
            result["against_pytorch"].append(row)
    return result


def device_of(text: str) -> ceilings.Ceilings:
    """A device by name, or by its GB/s and 16-bit TFLOP/s."""
    if text in floors.DEVICES:
        return floors.DEVICES[text]
    try:
        bandwidth, peak = map(float, text.split(":"))
    except ValueError:
        raise ValueError(f"device must be one of {', '.join(floors.DEVICES)}, or GB/s:TFLOP/s, got {text!r}") from None
    return ceilings.Ceilings(bandwidth * 1e9, peak * 1e12)


def print_floors(model: str, batches: list[int], device: ceilings.Ceilings, image_size: int) -> int:
    """Every layer's floor in microseconds a batch, by scheme, and what they allow in all."""
    for batch in batches:
        print(f"{model}, {batch} images in 16 bits: floors in microseconds")
        print(f"{'layer':28}" + "".join(f"{scheme:>18}" for scheme in floors.SCHEMES))
        for layer in floors.layers(model, batch, image_size=image_size):
            us = (batch * 1e6 * floors.seconds(layer, scheme, device) for scheme in floors.SCHEMES)
            print(f"{layer.name:28}" + "".join(f"{value:18.1f}" for value in us))
        found = [floors.totals(model, batch, device, scheme, image_size) for scheme in floors.SCHEMES]
        print(f"{'MB an image':28}" + "".join(f"{total['mb']:18.1f}" for total in found))
        print(f"{'img/s at most':28}" + "".join(f"{total['images_per_s']:18.0f}" for total in found))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=bench.SUITES, default="inference")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batches", nargs="+", type=int, default=[256])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", choices=bench.DTYPES, default="float16")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    known = ", ".join(floors.DEVICES)
    parser.add_argument("--device", help=f"only the floors, of {known}, or GB/s:TFLOP/s, for example 1008:165")
    args = parser.parse_args()
    if args.device is not None:
        return print_floors(args.model, args.batches, device_of(args.device), args.image_size)
    if not torch.cuda.is_available():
        raise ValueError("PyTorch sees no CUDA device: a floor says nothing about another machine")
    args.out.mkdir(parents=True, exist_ok=True)
    device, dtype = torch.device("cuda"), bench.DTYPES[args.dtype]
    model = get_model(args.model).to(device, dtype if args.suite == "inference" else torch.float32)
    path = args.out / bench.result_name(f"roofline-{args.suite}", args.dtype, "nhwc", device)
    runs = []
    for batch in args.batches:
        x = torch.randn(batch, 3, args.image_size, args.image_size, device=device, dtype=dtype)
        run = {"task": "roofline", "suite": args.suite, "dtype": args.dtype}
        run |= {"model": args.model, "batch": batch, "image_size": args.image_size}
        print(f"\n{args.model} {args.suite}, {batch} images")
        runs.append({"conditions": bench.conditions(device), **run, **measure(args.suite, model, x)})
        bench.write_json(path, runs)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"benchmarks/roofline.py: error: {error}", file=sys.stderr)
        sys.exit(2)
