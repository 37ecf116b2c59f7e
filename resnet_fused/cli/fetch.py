"""The options of `resnet-fused fetch`."""

import argparse

from ..fetch import PACKAGES, fetch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = ", ".join(f"{name} ({package.size})" for name, package in PACKAGES.items())
    parser.add_argument("package", choices=PACKAGES, metavar="PACKAGE", help=f"one of {sizes}")


def main(args: argparse.Namespace) -> int:
    print(fetch(args.package))
    return 0
