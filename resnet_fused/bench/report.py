"""What a measurement of variants says: as a table and as JSON."""

import itertools
import json
import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..dispatch.store import atomic_write
from .timing import ROUNDS, SECONDS
from .variants import is_ours

NOISY = 0.05  # spread
FEW = 3  # rounds


@dataclass
class Result:
    """One variant: its parity, and its samples where it was timed."""

    variant: str
    layout: str  # of the images: "nchw" or "nhwc"
    status: str = "measured"  # or "refused" (wrong numbers), "unavailable", "failed"
    reason: str = ""
    error: float | None = None  # largest difference from float64: a logit's, or in training a gradient's, relative
    limit: float | None = None
    bit_identical: bool | None = None  # to the report's reference
    ran: dict[str, int] = field(default_factory=dict)  # what served the layers, and how many
    peak_mib: float | None = None
    samples_ms: list[float] = field(default_factory=list)  # one a round, milliseconds a batch
    ratios: list[float] = field(default_factory=list)  # speed against the baseline, round by round
    latency_ms: list[float] = field(default_factory=list)  # median and, of 100 calls, the 99th percentile; short calls
    joules_per_image: float | None = None  # by the GPU's own counter

    @property
    def parity(self) -> str:
        """In a word."""
        words = {"measured": "bits" if self.bit_identical else "ok", "unavailable": "absent"}
        return words.get(self.status, self.status)


@dataclass
class Report:
    """One model in all its variants."""

    model: str
    batch: int
    image_size: int
    dtype: str
    device: str
    baseline: str
    conditions: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    task: str = "inference"  # the suite
    reference: str = "torchvision-nhwc"  # whose bits are looked for
    of_bytes: bool = False  # the images
    rounds: int = ROUNDS  # that were meant to be
    asked: bool = False  # for these variants, by name
    after: dict[str, Any] = field(default_factory=dict)  # clocks and temperature at the end, as in conditions["gpu"]

    @property
    def ok(self) -> bool:
        """No variant was refused or failed, and none that was asked for is missing."""
        return all(r.status == "measured" or r.status == "unavailable" and not self.asked for r in self.results)

    def best(self, ours: bool) -> Result | None:
        """The fastest of this package's variants, or of the others."""
        timed = [r for r in self.results if r.samples_ms and is_ours(r.variant) == ours]
        return min(timed, key=lambda r: statistics.median(r.samples_ms), default=None)

    def lead(self) -> str:
        """The fastest that this package offers, what serves it, and its speed beside the fastest of the others."""
        ours, other = self.best(True), self.best(False)
        if ours is None or other is None:
            return ""
        speed = [self.batch * 1e3 / statistics.median(r.samples_ms) for r in (ours, other)]
        engine = next((f" ({what})" for what in ours.ran if what.startswith("engine ")), "")  # maybe one of the others
        return (
            f"this package's fastest: {ours.variant}{engine}, {_digits(speed[0], 4)} img/s, "
            f"{speed[0] / speed[1]:.2f}x the speed of {other.variant}, the fastest of the others"
        )

    def ratio(self, result: Result) -> float | None:
        """A variant's speed against the baseline's, by the medians of their times."""
        times = next((r.samples_ms for r in self.results if r.variant == self.baseline), [])
        if not (times and result.samples_ms):
            return None
        return statistics.median(times) / statistics.median(result.samples_ms)

    def warnings(self) -> list[str]:
        """What makes the figures doubtful."""
        c, found = self.conditions, []
        base = next((quartiles(r.samples_ms) for r in self.results if r.variant == self.baseline), [])
        times = {r.variant: quartiles(r.samples_ms) for r in self.results if r.variant != self.baseline}
        near = [name for name, ms in times.items() if base and ms and ms[0] <= base[2] and base[0] <= ms[2]]
        if near:
            found.append(f"{self.baseline}'s times overlap those of {', '.join(near)}, by the quartiles: no difference")
        spreads = {r.variant: spread(r.samples_ms) for r in self.results}
        noisy = [f"{name} {share:.0%}" for name, share in spreads.items() if share > NOISY]
        if noisy:
            found.append(f"noisy: times spread over {NOISY:.0%}, between the quartiles: {', '.join(noisy)}")
        rounds = min((len(r.samples_ms) for r in self.results if r.samples_ms), default=FEW)
        if rounds < FEW:
            found.append(f"{rounds} round{'s' * (rounds > 1)}: no fewer than {FEW} tell a difference from noise")
        if c["load"] > c["cpus"] / 4:
            found.append(f"the load was {c['load']:.1f} on {c['cpus']} CPUs at the start: something else was running")
        return found

    def table(self) -> str:
        """A line for each variant, medians over the rounds and quartiles; 80 columns."""
        c = self.conditions
        images = f"{self.batch} x 3 x {self.image_size} x {self.image_size}{' bytes' * self.of_bytes}"
        head = (
            f"{self.model} {self.task}, {images}, {self.dtype}, "
            f"{c['device']}, {c['threads']} threads, load {c['load']:.1f}, torch {c['torch']}"
        )
        rows: list[tuple[str, ...]] = [("variant", "img/s", "ms", "quartiles", "ratio", "quartiles", "MiB", "parity")]
        best = self.best(True)
        for r in sorted(self.results, key=lambda r: r is not best):
            figures = ("-",) * 5
            if r.samples_ms:
                ms, speed, ratio = quartiles(r.samples_ms), quartiles(r.ratios), self.ratio(r)
                figures = (
                    *(_digits(self.batch * 1e3 / ms[1], 4), _digits(ms[1], 4)),
                    f"{_digits(ms[0], 3)}-{_digits(ms[2], 3)}",
                    *(("-", "-") if ratio is None else (f"{ratio:.2f}", f"{speed[0]:.2f}-{speed[2]:.2f}")),
                )
            rows.append((r.variant, *figures, "-" if r.peak_mib is None else f"{r.peak_mib:.0f}", r.parity))
        if all(r.peak_mib is None for r in self.results):
            rows = [(*row[:-2], row[-1]) for row in rows]
        lines = [head, *([self.lead()] if best is not None else []), "", *aligned(rows)]
        wrapped = [textwrap.wrap(line, 80, subsequent_indent="  ") or [""] for line in (*lines, "", *self._notes())]
        return "\n".join(itertools.chain.from_iterable(wrapped))

    def _notes(self) -> list[str]:
        rounds = max((len(r.samples_ms) for r in self.results), default=0)
        short = 0 < rounds < self.rounds
        call = "a train step" if self.task == "training" else "a batch"
        notes = [
            f"ms: of {call}, medians of {rounds} interleaved rounds. ratio: speed against {self.baseline} by these "
            f"medians; its quartiles are of the ratios within each round. parity: bits, {self.reference}'s to the bit; "
            "ok, an error within the limit.",
            *([f"rounds: {rounds} of {self.rounds}, as more would take over {SECONDS:.0f} s"] if short else []),
            *(f"warning: {warning}" for warning in self.warnings()),
            *(f"{r.variant} {r.status}: {r.reason}" for r in self.results if r.reason),
        ]
        errors = [f"{r.variant} {r.error:.1e}" for r in self.results if r.status == "measured" and r.error is not None]
        if errors:
            notes.append(f"error against float64 (limit {self.results[0].limit:.1e}): {', '.join(errors)}")
        for r in self.results:
            if r.ran:
                notes.append(f"{r.variant} ran " + ", ".join(f"{what} ({n})" for what, n in r.ran.items()))
        return notes

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON, with medians and quartiles beside the samples."""
        out = asdict(self) | {"warnings": self.warnings()}
        for entry, result in zip(out["results"], self.results, strict=True):
            if result.error is not None and not math.isfinite(result.error):
                entry["error"] = None  # JSON has no NaN; the reason says it
            if result.samples_ms:
                entry["ms_quartiles"] = quartiles(result.samples_ms)
                entry["spread"] = spread(result.samples_ms)
                entry["img_per_s"] = self.batch * 1e3 / statistics.median(result.samples_ms)
                entry["ratio"] = self.ratio(result)
                entry["ratio_quartiles"] = quartiles(result.ratios)
        return out


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row: the first and the last column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    between = "  " if sum(widths) + 2 * len(widths) <= 82 else " "
    lines = []
    for name, *cells, last in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True))
        lines.append(between.join((name.ljust(widths[0]), *padded, last)))
    return lines


def _digits(value: float, count: int) -> str:
    """So many digits, or all that stand before the point."""
    return f"{value:.{max(0, count - len(str(int(value))))}f}"


def quartiles(samples: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile; empty for no samples."""
    if len(samples) < 2:
        return [*samples] * 3
    return statistics.quantiles(samples, n=4, method="inclusive")


def spread(samples: Sequence[float]) -> float:
    """Between the quartiles, as a share of the median."""
    low, median, high = quartiles(samples) or (0.0, 1.0, 0.0)
    return (high - low) / median


def write_json(path: Path, content: Any) -> None:
    """Write a whole file or leave what was there."""
    with atomic_write(path) as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.write("\n")
