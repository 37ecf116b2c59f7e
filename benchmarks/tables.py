"""Write the tables of figures in the documents anew, from committed results.

    python benchmarks/tables.py            # README.md, benchmarks/README.md
    python benchmarks/tables.py --check    # 1 where a document disagrees with its results

Between `<!-- generated: KIND PATHS -->` and `<!-- end -->` stands what KIND makes of the files; paths are the root's.
"""

import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
DEPLOY = "resnet_fused+deploy"
MARKED = re.compile(r"(<!-- generated: (\w+) (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def inference(paths: list[Path]) -> str:
    """Of `resnet-fused bench --json`: img/s and the ratio to the baseline, the best of each file first."""
    lines = []
    for path in paths:
        report = json.loads(path.read_text())
        c, results = report["conditions"], [r for r in report["results"] if r["samples_ms"]]
        ours = [r for r in results if r["variant"].startswith("resnet_fused")]
        best = min(ours or results, key=lambda r: statistics.median(r["samples_ms"]))
        rounds = max(len(r["samples_ms"]) for r in results)
        lines += [
            f"{report['model']} {report['task']}, {report['dtype']}, batch {report['batch']}: {c['threads']} threads "
            f"of {c['device'].removeprefix('CPU ')}, load {c['load']:.1f}, torch {c['torch']}, medians of {rounds} "
            f"interleaved rounds, `{c['command']}`",
            "",
            *_table(
                ("variant", "img/s", f"against {report['baseline']}"),
                ((r["variant"], f"{r['img_per_s']:.1f}", f"{r['ratio']:.2f}") for r in _first(best, results)),
            ),
            "",
        ]
        lines += [f"Not timed: {r['variant']} ({r['reason']})" for r in report["results"] if r["status"] == "refused"]
    return "\n".join(lines).rstrip()


def peers(paths: list[Path]) -> str:
    """Of several `resnet-fused bench --json` on one machine: img/s and the ratio, a column for each file."""
    reports = [json.loads(path.read_text()) for path in paths]
    baselines, dtypes = ({report[key] for report in reports} for key in ("baseline", "dtype"))
    machines = {tuple(report["conditions"][k] for k in ("threads", "device", "torch", "commit")) for report in reports}
    same = machines, dtypes, baselines
    if any(len(found) > 1 for found in same):
        raise ValueError(f"results of one machine, commit, dtype and baseline make a table, got {same}")
    [(threads, device, torch, _)], [baseline], [dtype] = machines, baselines, dtypes
    results = [{r["variant"]: r for r in report["results"] if r["samples_ms"]} for report in reports]
    cells = [{name: f"{r['img_per_s']:.1f} ({r['ratio']:.2f})" for name, r in found.items()} for found in results]
    names = list(dict.fromkeys(name for found in results for name in found))
    rows = [(name, *(column.get(name, "-") for column in cells)) for name in names]
    engines = [next(iter(found[DEPLOY]["ran"]), "").removeprefix("engine ") for found in results if DEPLOY in found]
    if any(engines):
        rows += [(f"the engine that `{DEPLOY}` took", *engines)]
    rounds = sorted({len(r["samples_ms"]) for found in results for r in found.values()})
    spread = max(r["spread"] for found in results for r in found.values())
    lines = [
        f"{threads} threads of {device.removeprefix('CPU ')}, torch {torch}, {dtype}: img/s by model and batch, in "
        f"brackets against {baseline}; medians of {rounds[0]} to {rounds[-1]} interleaved rounds, `resnet-fused bench "
        "--device cpu --model resnet50 --batch 1` and so on. The machine is shared: times spread by up to "
        f"{spread:.0%} between the quartiles.",
        "",
        *_table(("variant", *(f"{report['model']}, {report['batch']}" for report in reports)), rows),
    ]
    return "\n".join(lines)


def traffic(paths: list[Path]) -> str:
    """Of `resnet-fused bench --suite traffic` or `memory`: MB and launches, or MiB saved and at the peak."""
    rows: list[tuple[str, ...]] = []
    [report] = [json.loads(path.read_text()) for path in paths]
    for row in report["rows"]:
        rival = next(r for r in report["rows"] if r["pass"] == row["pass"])
        moved, against = (r["read"] + r["written"] for r in (row, rival))
        saved = f"{row['saved'] / report['batch'] / 2**20:.1f}" if row["saved"] else "-"
        figures = f"{moved / report['batch'] / 1e6:.1f}", f"{moved / against:.2f}", str(row["launches"]), saved
        rows.append((row["pass"], row["variant"], *figures, f"{row['peak'] / 2**30:.2f}"))
    head = ("pass", "variant", "MB an image", "ratio", "launches", "MiB an image saved", "peak GiB")
    return "\n".join(_table(head, rows))


def errors(paths: list[Path]) -> str:
    """Of runs of `resnet-fused train`: the last test error in each eval.csv."""
    rows = []
    for path in paths:
        with path.open() as file:
            last = [row for row in csv.DictReader(file) if row["split"] == "test"][-1]
        rows.append((path.stem.removesuffix("-eval"), last["step"], f"{float(last['error']):.2f} %"))
    return "\n".join(_table(("network", "iterations", "test error"), rows))


KINDS: dict[str, Callable[[list[Path]], str]] = {
    "inference": inference,
    "peers": peers,
    "traffic": traffic,
    "errors": errors,
}


def written(text: str, root: Path = ROOT) -> str:
    """A document with its tables made anew.

    Raises:
        ValueError: an unknown kind, or a file that is not there.
    """

    def table(found: re.Match) -> str:
        begin, kind, paths, _, end = found.groups()
        if kind not in KINDS:
            raise ValueError(f"generated: unknown {kind!r}; there are: {', '.join(KINDS)}")
        files = [root / path for path in paths.split()]
        for path in files:
            if not path.is_file():
                raise ValueError(f"generated: {path} is not there")
        return f"{begin}\n{KINDS[kind](files)}\n\n{end}"

    return MARKED.sub(table, text)


def _first(best: dict[str, Any], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(results, key=lambda r: r is not best)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="*", type=Path, default=list(DOCUMENTS))
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    stale = 0
    for path in args.documents:
        before = path.read_text()
        after = written(before)
        if after != before:
            stale += 1
            print(f"{path}: {'disagrees with its results' if args.check else 'written'}")
            if not args.check:
                path.write_text(after)
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"benchmarks/tables.py: error: {error}", file=sys.stderr)
        sys.exit(2)
