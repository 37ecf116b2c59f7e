"""The options of `resnet-fused info`."""

import argparse
import json

from .. import info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        action="store_true",
        help="parameters and multiply-adds of every model; default: versions, devices and backends",
    )
    parser.add_argument("--json", action="store_true", help="print JSON; default: tables")


def main(args: argparse.Namespace) -> int:
    if args.models:
        from ..models import costs

        rows = costs.table()
        print(json.dumps(rows, indent=2) if args.json else info.models_text(rows))
        return 0
    found = info.collect()
    print(json.dumps(found, indent=2) if args.json else info.text(found))
    return 0
