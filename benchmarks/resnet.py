"""Whole models beside torchvision's, in several batch sizes and dtypes: a result file for each dtype."""

import argparse
import sys
from pathlib import Path

import torch

from resnet_fused import bench


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet50"])
    parser.add_argument("--suite", choices=bench.SUITES, default="inference")
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 32, 1] if gpu else [8, 1])
    parser.add_argument(
        "--dtypes", nargs="+", choices=bench.DTYPES, default=["float16", "bfloat16"] if gpu else ["float32"]
    )
    parser.add_argument("--variants", nargs="+", choices=bench.VARIANTS)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    ok = True
    for dtype in args.dtypes:
        path = args.out / bench.result_name(args.suite, dtype, "nhwc", device)
        reports = []
        for model in args.models:
            for batch in args.batches:
                report = bench.run(
                    model,
                    batch,
                    dtype,
                    variants=args.variants,
                    suite=args.suite,
                    rounds=args.rounds,
                    image_size=args.image_size,
                    track=bench.progress,
                )
                print(report.table(), end="\n\n", flush=True)
                ok = ok and report.ok
                reports.append(report.to_dict())
                bench.write_json(path, reports)  # after each: a run that is cut short keeps what it has
    return 0 if ok else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, ImportError, OSError) as error:
        print(f"benchmarks/resnet.py: error: {error}", file=sys.stderr)
        sys.exit(2)
