"""The measures as pictures."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..dispatch.store import atomic_write
from .measures import Values


def draw_responses(path: Path, networks: dict[str, Values]) -> None:
    """As figure 7 of https://arxiv.org/abs/1512.03385: in the layers' order above, by magnitude below."""

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1)
        for name, values in networks.items():
            _line(above, name, [v for _, v in values])
            _line(below, name, sorted((v for _, v in values), reverse=True))
        above.set(xlabel="layer", ylabel="std")
        below.set(xlabel="layer, by magnitude", ylabel="std")
        above.legend()

    save(path, draw, (8, 6))


def draw_gradients(path: Path, networks: dict[str, Values]) -> None:
    """Layer by layer, on a logarithmic scale."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, values in networks.items():
            _line(axes, name, [v for _, v in values])
        axes.set(xlabel="layer", ylabel="norm of the weight's gradient", yscale="log")
        axes.legend()

    save(path, draw, (8, 4))


def draw_lesions(path: Path, networks: dict[str, tuple[float, Values]]) -> None:
    """The error without each block; the whole network's dashed."""

    def draw(figure: Figure) -> None:
        for axes, (name, (whole, values)) in zip(
            figure.subplots(len(networks), 1, squeeze=False)[:, 0], networks.items(), strict=True
        ):
            axes.bar(range(1, len(values) + 1), [v for _, v in values], label="without the block")
            axes.axhline(whole, color="black", linestyle="--", label="whole")
            axes.set(title=name, xlabel="block", ylabel="top-1 error (%)")
            axes.legend()

    save(path, draw, (8, 3.5 * len(networks)))


def _line(axes: Axes, name: str, values: list[float]) -> None:
    axes.plot(range(1, len(values) + 1), values, marker=".", linewidth=1, label=name)
    axes.grid(alpha=0.3)


def save(path: Path, draw: Callable[[Figure], None], size: tuple[float, float]) -> None:
    """What `draw` makes of a figure of that size in inches, in the format of the path's suffix."""
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    for axes in figure.axes:
        axes.locator_params("x", integer=True)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format=path.suffix[1:], dpi=120)
