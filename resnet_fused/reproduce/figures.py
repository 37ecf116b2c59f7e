"""The figures, as the papers draw them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..analysis import plots
from .experiments import Experiment
from .runs import Run

_LABELS = {"train": "training error (%)", "eval": "test error (%)"}


def draw(path: Path, experiment: Experiment, runs: Sequence[Run]) -> None:
    """The errors while the networks train, into a file whose suffix is its format."""
    how = {"splits": _splits, "panels": _panels, "loss": _loss}[experiment.figure or ""]
    plots.save(path, lambda figure: how(figure, experiment, runs), (10, 4))


def _splits(figure: Figure, experiment: Experiment, runs: Sequence[Run]) -> None:
    """Training error on the left, test error on the right."""
    for axes, (split, label) in zip(figure.subplots(1, 2, sharey=True), _LABELS.items(), strict=True):
        for i, run in enumerate(runs):
            _curve(axes, run, split, f"C{i}", run.network.label)
        _finish(axes, label)


def _panels(figure: Figure, experiment: Experiment, runs: Sequence[Run]) -> None:
    """Families beside each other: training error thin and dashed, test error bold."""
    groups = [
        (title, [r for r in runs if r.network.family in families and (not depths or r.network.depth in depths)])
        for title, families, depths in experiment.panels
    ]
    groups = [(title, group) for title, group in groups if group]
    for axes, (title, group) in zip(
        figure.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups, strict=True
    ):
        for i, run in enumerate(group):
            _curve(axes, run, "train", f"C{i}", None)
            _curve(axes, run, "eval", f"C{i}", run.network.label)
        axes.set_title(title)
        _finish(axes, "error (%); dashed: training")


def _loss(figure: Figure, experiment: Experiment, runs: Sequence[Run]) -> None:
    """Test error bold, on the left scale; training loss dashed, on the right one."""
    left = figure.subplots()
    right = left.twinx()
    right.set(ylabel="training loss (dashed)", yscale="log")
    for i, run in enumerate(runs):
        _curve(right, run, "train", f"C{i}", None, "loss")
        _curve(left, run, "eval", f"C{i}", run.network.label)
    _finish(left, "test error (%)")


def _curve(axes: Axes, run: Run, split: str, color: str, label: str | None, key: str = "error") -> None:
    rows = run.train if split == "train" else run.eval
    style: dict[str, Any] = {"linestyle": "--", "linewidth": 0.8} if label is None else {"linewidth": 2}
    if split == "eval":
        style["marker"] = "."
    points = [[float(row[column]) for row in rows] for column in ("step", key)]
    axes.plot(*points, color=color, label=label, **style)


def _finish(axes: Axes, label: str) -> None:
    axes.set(xlabel="iteration", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
