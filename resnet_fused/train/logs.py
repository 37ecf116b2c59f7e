"""What a run leaves to read: CSV files, TensorBoard events and the curves as a picture."""

import csv
from pathlib import Path
from typing import Any

from ..dispatch.store import atomic_write

TRAIN = ("step", "epoch", "lr", "loss", "error", "images_per_s")
EVAL = ("step", "split", "loss", "error")


class Log:
    """The logs in a run's folder, cut back to iteration `step` where the run resumes there.

    Args:
        evaluated: the iteration of the last evaluation that the resumed run knows of.

    Raises:
        OSError: they can't be written.
    """

    def __init__(self, folder: Path, step: int, evaluated: int) -> None:
        self._folder = folder
        lasts = {"train": step, "eval": evaluated}
        self._files = {name: _reopen(folder / f"{name}.csv", names, lasts[name]) for name, names in _NAMES.items()}
        self._writer = _tensorboard(folder / "tensorboard", step)

    def train(self, **values: Any) -> None:
        """A row of train.csv: the means since the row before, the error in percent."""
        self._add("train", "train", values)

    def eval(self, **values: Any) -> None:
        """A row of eval.csv, and the curves drawn again."""
        self._add("eval", values["split"], values)
        draw(self._folder)

    def _add(self, name: str, prefix: str, values: dict[str, Any]) -> None:
        file = self._files[name]
        try:
            csv.writer(file, lineterminator="\n").writerow([values[key] for key in _NAMES[name]])
            file.flush()
        except OSError as error:
            error.filename = error.filename or file.name
            raise
        if self._writer is not None:
            for key, value in values.items():
                if key not in ("step", "split"):
                    self._writer.add_scalar(f"{prefix}/{key}", value, values["step"])

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._writer is not None:
            self._writer.close()


_NAMES = {"train": TRAIN, "eval": EVAL}


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a log, without one that a killed run left half-written."""
    if not path.is_file():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return list(csv.DictReader(whole))


def draw(folder: Path) -> None:
    """`curves.png`: the errors of training (thin) and evaluation (bold), and the training loss, against iterations."""
    from matplotlib.figure import Figure

    trained, evaluated = read(folder / "train.csv"), read(folder / "eval.csv")
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, label in ((left, "error", "error (%)"), (right, "loss", "loss")):
        axes.plot(*_points(trained, key), linewidth=0.8, label="train")
        for split in dict.fromkeys(row["split"] for row in evaluated):
            points = _points([row for row in evaluated if row["split"] == split], key)
            axes.plot(*points, linewidth=2, marker=".", label=split)
        axes.set(xlabel="iteration", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_ylim(bottom=0)
    with atomic_write(folder / "curves.png", "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def _points(rows: list[dict[str, str]], key: str) -> tuple[list[int], list[float]]:
    return [int(row["step"]) for row in rows], [float(row[key]) for row in rows]


def _reopen(path: Path, names: tuple[str, ...], step: int) -> Any:
    kept = [row for row in read(path) if int(row["step"]) <= step]
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    return path.open("a")


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer that makes events after `step` void, or None where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
