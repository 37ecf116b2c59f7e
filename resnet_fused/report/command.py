"""The options and the output of `resnet-fused report`."""

import argparse
from pathlib import Path
from typing import Any

from ..dispatch.store import atomic_write
from .compare import compared
from .figures import Figure, drawn
from .load import Entry, load

TITLE = "resnet_fused, measured"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resnet-fused report`."""
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULTS", help="JSON of `resnet-fused bench --json` or benchmarks/"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="for index.html, SVG and PNG")
    earlier = "earlier results, what became slower stands out (default: none)"
    parser.add_argument("--compare", nargs="+", type=Path, default=[], metavar="OLD", help=earlier)


def main(args: argparse.Namespace) -> int:
    """Run `resnet-fused report`: 0, or 1 where something became slower than in the results compared with.

    Raises:
        ValueError: a file is no result.
        ImportError: jinja2 or matplotlib is missing.
        OSError: a file can't be read or written.
    """
    entries, before = load(args.results), load(args.compare)
    figures = drawn(entries)
    changes = compared(before, entries)
    page = render(entries, figures, changes)
    args.out.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        for suffix, content in (("svg", figure.svg.encode()), ("png", figure.png)):
            with atomic_write(args.out / f"{figure.name}.{suffix}", "wb") as file:
                file.write(content)
    with atomic_write(args.out / "index.html") as file:
        file.write(page)
    slower = [change for change in changes if change.verdict == "slower"]
    print(f"{args.out / 'index.html'}: {_count(figures, 'figure')} of {_count(entries, 'result')}")
    for change in slower:
        print(f"slower: {change.what}: {change.change:+.1%}")
    return 1 if slower else 0


def _count(items: list[Any], what: str) -> str:
    return f"{len(items)} {what}{'s' * (len(items) != 1)}"


def render(entries: list[Entry], figures: list[Figure], changes: list[Any]) -> str:
    """The page, with everything in it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("page.html.j2")
    return template.render(title=TITLE, entries=entries, figures=figures, changes=changes)
