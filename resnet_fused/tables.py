"""The tables of every command: as wide as the terminal, plain and never wrapped where the output is no terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

_ENDLESS = 10_000  # columns of a pipe


def table(rows: Iterable[Sequence[Any]], header: Sequence[str] = (), right: Iterable[int] = (), indent: int = 0) -> str:
    """Rows under each other, without rules.

    Args:
        rows: as long as each other; cells are shown by `str`.
        header: a name for every column; none by default.
        right: the columns that are aligned to the right.
        indent: spaces in front of every line.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    cells, right = [[str(cell) for cell in row] for row in rows], set(right)
    grid = Table(box=None, show_header=bool(header), pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(header or cells[0] if cells else header):
        grid.add_column(name if header else "", justify="right" if i in right else "left", overflow="fold")
    for row in cells:
        grid.add_row(*row)
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, highlight=False, width=_ENDLESS, color_system=None)
    with console.capture() as printed:
        console.print(Padding(grid, (0, 0, 0, indent), expand=False))
    return "\n".join(line.rstrip() for line in printed.get().splitlines())
