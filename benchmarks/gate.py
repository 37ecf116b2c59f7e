"""Fail where the CPU path became slower against torchvision's, both timed in this run: what CI can say of speed.

    python benchmarks/gate.py

Compared are the least times of interleaved rounds on one thread, which a busy machine disturbs least; no absolute time
is looked at.
"""

import argparse
import sys

import torch

from resnet_fused import bench
from resnet_fused.bench.engine import BASELINE
from resnet_fused.bench.variants import DEPLOY

LEAST = {"resnet_fused": 0.85, "resnet_fused-onednn": 0.9, DEPLOY: 1.0}  # of its speed: far from noise


def slower(least: dict[str, float]) -> list[str]:
    """A line for each variant that is below its share; least: milliseconds by variant."""
    ratios = {name: least[BASELINE] / least[name] for name in LEAST}
    below = (name for name, ratio in ratios.items() if not ratio >= LEAST[name])
    return [f"{name}: {ratios[name]:.2f}x of {BASELINE}, at least {LEAST[name]}x" for name in below]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    report = bench.run("resnet18", 4, "float32", "cpu", [BASELINE, *LEAST], image_size=96, rounds=args.rounds)
    print(report.table())
    wrong = [f"{r.variant} {r.status}: {r.reason}" for r in report.results if r.status != "measured"]
    wrong = wrong or slower({r.variant: min(r.samples_ms) for r in report.results})
    print(*(f"<- {line}" for line in wrong), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
