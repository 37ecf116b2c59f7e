"""Result files, as `bench` and the programs of benchmarks/ write them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASKS = ("inference", "training", "parity", "ops", "memory", "traffic", "host", "fit", "roofline")


@dataclass(frozen=True)
class Entry:
    """One measurement of a file."""

    path: Path
    data: dict[str, Any]

    @property
    def task(self) -> str:
        return self.data["task"]

    @property
    def conditions(self) -> dict[str, Any]:
        return self.data["conditions"]

    @property
    def title(self) -> str:
        """What was measured."""
        d = self.data
        batch = f"batch {d['batch']}" if d.get("batch") else ""
        dtype = d.get("dtype") or ", ".join(d.get("dtypes", []))
        model = d["model"] if isinstance(d.get("model"), str) else ""
        images = "bytes" if d.get("of_bytes") else ""
        return ", ".join(part for part in (f"{model} {self.task}".strip(), batch, images, dtype) if part)

    @property
    def caption(self) -> str:
        """The conditions in a line."""
        c = self.conditions
        device = "counted, on no device" if self.task in ("memory", "traffic") else c["device"]
        parts = [device, f"torch {c['torch']}", f"commit {c.get('commit') or 'unknown'}", c["date"][:10]]
        if self.task not in ("memory", "traffic"):
            parts.insert(1, f"{c['threads']} threads, load {c['load']:.1f}")
        return ", ".join(parts)

    @property
    def warnings(self) -> list[str]:
        return self.data.get("warnings", [])


def load(paths: Sequence[Path]) -> list[Entry]:
    """Every measurement of the files, in order.

    Raises:
        ValueError: a file is not JSON, or holds no results.
    """
    found: list[Entry] = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"{path} is no JSON: results are what `resnet-fused bench --json FILE` writes") from None
        for data in content if isinstance(content, list) else [content]:
            known = isinstance(data, dict) and data.get("task") in TASKS and isinstance(data.get("conditions"), dict)
            if not known:
                raise ValueError(f"{path} holds no results of bench: a task of {', '.join(TASKS)}, and conditions")
            found.append(Entry(path, data))
    return found
