import io
import sys

import pytest

from resnet_fused.tables import table

ROWS = [("conv1", 1.5), ("[bold]a name in brackets[/bold] :smile:", 20)]


def test_in_a_pipe_it_is_plain_and_as_wide_as_it_has_to_be(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    text = table(ROWS, ("layer", "us"), right=[1], indent=2)
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "us"] and lines[1].startswith("  conv1  ") and lines[1].endswith(" 1.5")
    assert lines[2] == f"  {ROWS[1][0]}   20" and len(lines) == 3 and "\x1b" not in text
    assert len({len(line) for line in lines}) == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [40, 60])
def test_it_wraps_to_the_terminal(monkeypatch, columns):
    monkeypatch.setattr(sys, "stdout", Terminal())
    for name, value in (("COLUMNS", str(columns)), ("NO_COLOR", "1"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    text = table([("triton", "word " * 30)])
    assert len(text.splitlines()) > 2 and all(len(line) <= columns for line in text.splitlines())
    assert text.count("word") == 30


def test_without_a_header_there_is_none():
    assert table([("a", "b")]) == "a  b"
