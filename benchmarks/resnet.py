"""Whole models beside torchvision's, in several batch sizes and dtypes: a result file for each dtype."""

import argparse
import json
import sys
from pathlib import Path

import torch

from resnet_fused import bench
from resnet_fused.bench.conditions import same_sources


def kept(path: Path, device: torch.device) -> list[dict]:
    """The reports of a file that these sources wrote."""
    reports = json.loads(path.read_text()) if path.exists() else []
    now = bench.conditions(device)
    return [report for report in reports if same_sources(report["conditions"], now)]


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
    parser.add_argument("--resume", action="store_true", help="keep what the result files have of this commit")
    parser.add_argument("--device", type=torch.device, default=device, help="default: a GPU where there is one")
    args = parser.parse_args()
    device = args.device
    args.out.mkdir(parents=True, exist_ok=True)

    ok = True
    for dtype in args.dtypes:
        path = args.out / bench.result_name(args.suite, dtype, "nhwc", device)
        reports = kept(path, device) if args.resume else []
        have = {(report["model"], report["batch"], tuple(report.get("asked_for") or ())) for report in reports}
        for model in args.models:
            for batch in args.batches:
                if (model, batch, tuple(args.variants or ())) in have:
                    continue
                report = bench.run(
                    model,
                    batch,
                    dtype,
                    str(device),
                    variants=args.variants,
                    suite=args.suite,
                    rounds=args.rounds,
                    image_size=args.image_size,
                    track=bench.progress,
                )
                print(report.table(), end="\n\n", flush=True)
                ok = ok and report.ok
                reports.append(report.to_dict() | {"asked_for": args.variants})
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
