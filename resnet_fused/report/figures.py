"""The figures, as SVG whose text takes the page's colour, and as PNG on white."""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..dispatch import registry
from .load import Entry

INK = "#0a0b0c"  # stands for the page's own colour in the SVG
OURS = "#d9541e"
OTHERS = ("#3573b9", "#7a8ba0", "#2a9d8f", "#9b72cf", "#b8860b", "#5b8c5a", "#c06c84", "#4a4e69")
WIDTH = 4.6  # inches: on a page of 400 pixels the text is 9 pixels high


@dataclass(frozen=True)
class Figure:
    name: str  # of the files
    title: str
    note: str
    entries: list[Entry]
    svg: str
    png: bytes


def drawn(entries: list[Entry]) -> list[Figure]:
    """All figures that the results allow.

    Raises:
        ImportError: matplotlib is missing.
    """
    return [
        *_by_batch(entries, "img_per_s", "throughput by batch", "images a second"),
        *_ladders(entries),
        *_layers(entries),
        *_by_batch(entries, "peak_mib", "memory by batch", "MiB at the peak"),
        *_ops(entries),
        *_traffic(entries),
    ]


def _render(
    name: str, title: str, note: str, entries: list[Entry], height: float, draw: Callable[[Any], None]
) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.0, "axes.grid": True, "grid.alpha": 0.2}
    style |= {key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False}
    with matplotlib.rc_context(style | {"grid.color": INK, "font.family": "sans-serif"}):
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        draw(canvas.subplots())
        svg, png = io.BytesIO(), io.BytesIO()
        canvas.savefig(svg, format="svg", transparent=True)
        canvas.savefig(png, format="png", dpi=200, facecolor="white")
    return Figure(name, title, note, entries, _inline(svg.getvalue().decode(), title), png.getvalue())


def _inline(svg: str, title: str) -> str:
    """For a page: as wide as its place, in its colour, with a name for who can't see it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1).replace(INK, "currentColor")


def _ours(name: str) -> bool:
    return name.startswith(("resnet_fused", "fused"))


def _slug(*parts: object) -> str:
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, parts)).lower()).strip("-")


def _runs(entries: list[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    """Whole models: the batches of one model, task, dtype and device."""
    groups: dict[tuple, list[Entry]] = {}
    for e in entries:
        if e.task in ("inference", "training"):
            key = (e.data["model"], e.task, e.data["dtype"], e.conditions["device"])
            groups.setdefault(key, []).append(e)
    for (model, task, dtype, _), found in groups.items():
        yield f"{model} {task}, {dtype}", sorted(found, key=lambda e: e.data["batch"])


def _by_batch(entries: list[Entry], key: str, what: str, unit: str) -> Iterator[Figure]:
    for n, (title, group) in enumerate(_runs(entries)):
        lines: dict[str, list[tuple[int, float]]] = {}
        for e in group:
            for r in e.data["results"]:
                if r.get(key) is not None:
                    lines.setdefault(r["variant"], []).append((e.data["batch"], r[key]))
        if len(group) < 2 or not lines:
            continue

        def draw(axes: Any, lines: dict[str, list[tuple[int, float]]] = lines) -> None:
            others = iter(OTHERS * len(lines))
            for name, points in lines.items():
                style = {"color": OURS, "ls": "-"} if name == "resnet_fused" else {"color": next(others)}
                style |= {"ls": "-" if _ours(name) else "--"}
                axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=name, **style)
            axes.set_xscale("log", base=2)
            batches = sorted({batch for points in lines.values() for batch, _ in points})
            axes.set_xticks(batches, map(str, batches))
            axes.set(xlabel="images a call", ylabel=unit, ylim=(0, None))
            axes.legend(fontsize=8)

        yield _render(_slug(what, title, n), f"{title}: {what}", unit, group, 3.8, draw)


def _bars(axes: Any, rows: list[tuple[str, float, str, bool]], label: str) -> None:
    """Horizontal, the first on top: name, length, text at the end, ours?"""
    names, values, texts, ours = zip(*rows, strict=True)
    colors = [OURS if own else OTHERS[1] for own in ours]
    bars = axes.barh(range(len(rows)), values, color=colors, height=0.7)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.bar_label(bars, texts, padding=3, fontsize=8, color=INK)
    room = max(values) * (0.02 + 0.001 * max(map(len, names)))  # a letter's, in the place that the names leave
    axes.set_xlim(0, 1.02 * max(v + room * len(t) for v, t in zip(values, texts, strict=True)))
    axes.locator_params(axis="x", nbins=4)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(label)


def _ladders(entries: list[Entry]) -> Iterator[Figure]:
    for n, e in enumerate(entries):
        if e.task not in ("inference", "training"):
            continue
        d = e.data
        timed = sorted((r for r in d["results"] if r.get("img_per_s")), key=lambda r: r["img_per_s"])
        rows = [
            (r["variant"], r["img_per_s"], f"{r['img_per_s']:.4g}{_ratio(r['ratio'])}", _ours(r["variant"]))
            for r in timed
        ]
        if rows:
            note = f"images a second; ratios to {d['baseline']}"
            left_out = [f"{r['variant']} {r['status']}" for r in d["results"] if not r["samples_ms"]]
            note += "; not timed: " + ", ".join(left_out) if left_out else ""
            height = 1.0 + 0.3 * len(rows)
            draw = _drawing(rows, "images a second")
            yield _render(_slug("ladder", e.title, n), f"{e.title}: from eager to fused", note, [e], height, draw)


def _ratio(value: float | None) -> str:
    return "" if value is None else f" ({value:.2f}x)"


def _drawing(rows: list[tuple[str, float, str, bool]], label: str) -> Callable[[Any], None]:
    return lambda axes: _bars(axes, rows, label)


def _layers(entries: list[Entry]) -> Iterator[Figure]:
    for n, e in enumerate(entries):
        if e.task != "roofline":
            continue

        def over(call: dict[str, Any]) -> float:
            return call["layers"] * (call["microseconds"][call["best"]] - call["floor_microseconds"])

        worst = sorted(e.data["calls"], key=over, reverse=True)[:16]
        rows = [
            (f"{c['shape']} ({c['layers']}x)", over(c), f"{1 / c['share_of_floor']:.1f}x, {c['best']}", True)
            for c in worst
        ]
        if rows:
            note = "what to work on next: microseconds over the floor, a shape's layers together; times the floor"
            draw = _drawing(rows, "microseconds over the floor")
            title = f"{e.title}: time over the floor, by layer"
            yield _render(_slug("layers", e.title, n), title, note, [e], 1.0 + 0.3 * len(rows), draw)


def _ops(entries: list[Entry]) -> Iterator[Figure]:
    for n, e in enumerate(entries):
        for dtype in e.data["dtypes"] if e.task == "ops" else ():
            rows = [
                (f"{row['case']}, {name}", b["gb_per_s"], f"{b['gb_per_s']:,.0f} ({b['ratio_to_eager']:.2f}x)", True)
                for row in e.data["rows"]
                for name, b in row["backends"].items()
                if row["dtype"] == dtype and b["status"] == "ok" and name != registry.PLAIN
            ]
            if rows:
                copy = e.conditions["ceilings"][dtype]["bytes_per_s"] / 1e9
                note = f"GB/s, every operand and result once; ratios to eager; a device copy reaches {copy:,.0f} GB/s"
                draw = _drawing(rows, "GB/s")
                title = f"operators, {dtype}: bandwidth"
                yield _render(_slug("ops", dtype, n), title, note, [e], 1.0 + 0.26 * len(rows), draw)


def _traffic(entries: list[Entry]) -> Iterator[Figure]:
    for n, e in enumerate(entries):
        if e.task not in ("traffic", "memory"):
            continue
        d, rows = e.data, []
        for row in d["rows"]:
            rival = next(r for r in d["rows"] if r["pass"] == row["pass"])
            if e.task == "traffic":
                value, against = (sum(r[k] for k in ("read", "written")) / d["batch"] / 1e6 for r in (row, rival))
                text = f"{value:.1f} ({value / against:.2f}x), {row['launches']}"
            else:
                value, text = row["peak"] / 2**20, f"{row['peak'] / 2**20:.0f} ({row['peak'] / rival['peak']:.2f}x)"
            rows.append((f"{row['pass']}, {row['variant']}", value, text, _ours(row["variant"])))
        unit = "MB an image, read and written" if e.task == "traffic" else "MiB at the peak"
        launches = ", then launches" if e.task == "traffic" else ""
        note = f"{unit}, counted operator by operator; ratios to {d['rows'][0]['variant']}{launches}"
        draw = _drawing(rows, unit)
        yield _render(_slug(e.title, n), f"{e.title}", note, [e], 1.0 + 0.34 * len(rows), draw)
