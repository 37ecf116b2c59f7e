"""Two runs, variant by variant."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from .load import Entry

LEAST = 0.05  # a change up to here is noise, or one within the quartiles' spread of both


@dataclass(frozen=True)
class Change:
    what: str
    before: float  # of `unit`
    after: float
    unit: str
    change: float  # of the speed: -0.1 is a tenth slower
    verdict: str  # "slower", "faster" or "same"


def compared(before: list[Entry], after: list[Entry]) -> list[Change]:
    """What is in both, the slower first."""
    old, found = {k: v for e in before for k, v in _figures(e)}, []
    for key, (value, spread, unit) in ((k, v) for e in after for k, v in _figures(e)):
        if key in old:
            was, was_spread, _ = old[key]
            change = (value / was if unit == "img/s" else was / value) - 1
            verdict = "slower" if change < 0 else "faster"
            if abs(change) <= max(LEAST, spread, was_spread):
                verdict = "same"
            found.append(Change(key, was, value, unit, change, verdict))
    return sorted(found, key=lambda c: c.change)


def _figures(entry: Entry) -> Iterator[tuple[str, tuple[float, float, str]]]:
    """(what, (value, spread, unit))."""
    d = entry.data
    if entry.task in ("inference", "training"):
        for r in d["results"]:
            if r["samples_ms"]:
                speed = d["batch"] * 1e3 / statistics.median(r["samples_ms"])
                yield f"{entry.title}: {r['variant']}", (speed, r.get("spread", 0.0), "img/s")
    elif entry.task == "ops":
        for row in d["rows"]:
            for name, b in row["backends"].items():
                if b["status"] == "ok":
                    yield f"{row['case']}, {row['dtype']}: {name}", (b["microseconds"], b["spread"], "us")
    elif entry.task == "traffic":
        for row in d["rows"]:
            megabytes = (row["read"] + row["written"]) / d["batch"] / 1e6
            yield f"{entry.title}: {row['pass']}, {row['variant']}", (megabytes, 0.0, "MB/image")
