"""Deeper plain networks train worse, deeper residual ones better: figure 6 of https://arxiv.org/abs/1512.03385 redrawn.

Trains plain-20, plain-56, ResNet-20 and ResNet-56 on CIFAR-10 by the recipe `cifar`, shortened, one after the other.
Interrupted and started again, it goes on where it was. Needs `pip install ".[train]"` and `resnet-fused fetch cifar10`.

    python examples/degradation.py                        # a GPU: 8000 iterations each
    python examples/degradation.py --dtype bf16           # a CPU: 400 at a lower rate
    python examples/degradation.py --iterations 64000     # the paper's schedule
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from resnet_fused.train import Settings, logs
from resnet_fused.train.loop import train

FAMILIES = {"plain": "plain networks", "resnet": "ResNets"}


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56], help="out of 20, 32, 44, 56, 110")
    parser.add_argument("--iterations", type=int, default=8000 if on_gpu else 400, help="default here: %(default)s")
    parser.add_argument("--lr", type=float, default=0.1 if on_gpu else 0.03, help="default here: %(default)s")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/degradation"), help="folder; default: %(default)s")
    args = parser.parse_args()

    for family in FAMILIES:
        for depth in args.depths:
            settings = Settings(
                model=f"cifar_{family}{depth}",
                data=args.data,
                iterations=args.iterations,
                batch=args.batch,
                lr=args.lr,
                dtype=args.dtype,
                seed=args.seed,
                log_every=max(1, args.iterations // 50),
                eval_every=max(args.iterations // 20, min(100, args.iterations)),
            )
            train(settings, args.out / f"{family}{depth}", device="cuda" if on_gpu else "cpu", resume=True)
    draw(args)
    print(table(args))


def draw(args: argparse.Namespace) -> None:
    """Training error dashed, test error bold."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (family, title) in zip(figure.subplots(1, 2, sharey=True), FAMILIES.items(), strict=True):
        for i, depth in enumerate(args.depths):
            for split, style in (
                ("train", {"linestyle": "--", "linewidth": 0.8}),
                ("eval", {"linewidth": 2, "marker": "."}),
            ):
                rows = logs.read(args.out / f"{family}{depth}" / f"{split}.csv")
                label = f"{family}-{depth}" if split == "eval" else None
                axes.plot(
                    *([float(row[key]) for row in rows] for key in ("step", "error")), f"C{i}", label=label, **style
                )
        axes.set(title=f"{title}, {args.iterations} iterations of {args.batch}", xlabel="iteration", ylabel="error (%)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(args.out / "degradation.png", dpi=120)


def table(args: argparse.Namespace) -> str:
    """The last tenth's mean training error, and the last test error."""
    lines = [f"{args.iterations} iterations of {args.batch} at {args.lr}, {args.dtype}; {args.out / 'degradation.png'}"]
    lines.append(f"{'network':12}{'training error':>16}{'test error':>12}")
    for family in FAMILIES:
        for depth in args.depths:
            folder = args.out / f"{family}{depth}"
            errors = [float(r["error"]) for r in logs.read(folder / "train.csv")]
            last = errors[-max(1, len(errors) // 10) :]
            test = float(logs.read(folder / "eval.csv")[-1]["error"])
            lines.append(f"{f'{family}-{depth}':12}{sum(last) / len(last):14.2f} %{test:10.2f} %")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
