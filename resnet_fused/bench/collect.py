"""Rows of a suite, each written as soon as it is there; a run that was cut off goes on where it stopped."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .conditions import same_sources
from .report import write_json

Row = dict[str, Any]


def collect(
    head: Row,
    rows: Iterable[tuple[str, Callable[[], Row]]],
    path: Path | None,
    resume: bool,
    show: Callable[[Row], str],
) -> Row:
    """The head with "rows".

    Args:
        head: what the rows have in common, with their "conditions".
        rows: each row's key, and what makes it.
        path: the JSON file, or None.
        resume: take over the rows of the file that is there, if its head says the same, conditions apart, and this
            commit wrote it.
        show: a row's printed line.

    Raises:
        ValueError: with resume, a file of another suite or other settings.
    """
    done = kept(path, head) if resume and path is not None else []
    report = head | {"rows": done}
    have = {row["key"] for row in done}
    for row in done:
        print(show(row), "(kept)", flush=True)
    for key, make in rows:
        if key not in have:
            report["rows"].append({"key": key} | make())
            print(show(report["rows"][-1]), flush=True)
            if path is not None:
                write_json(path, report)
    return report


def kept(path: Path, head: Row) -> list[Row]:
    """The rows of a file that was cut off; none where there is no file, or of another commit."""
    if not path.exists():
        return []
    try:
        before = json.loads(path.read_text())
        same = all(before[key] == value for key, value in head.items() if key != "conditions")
        if same:
            return before["rows"] if same_sources(before["conditions"], head["conditions"]) else []
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"--resume: {path} holds something else; remove it, or leave --resume out")
