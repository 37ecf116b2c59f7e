"""The options of `resnet-fused info`."""

import argparse
import json
import sys

from .. import info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        action="store_true",
        help="parameters and multiply-adds of every model; default: versions, devices and backends",
    )
    parser.add_argument("--json", action="store_true", help="print JSON; default: tables")


def main(args: argparse.Namespace) -> int:
    """Print what there is.

    Raises:
        ValueError: a variable of the environment is wrong, said after all that was found.
    """
    if args.models:
        from ..models import costs

        rows = costs.table()
        print(json.dumps(rows, indent=2) if args.json else info.models_text(rows))
        return 0
    found = info.collect()
    print(json.dumps(found, indent=2) if args.json else info.text(found))
    if found["problems"]:
        sys.stdout.flush()
        raise ValueError("; ".join(found["problems"]))
    return 0
