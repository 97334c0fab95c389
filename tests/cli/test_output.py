"""Tables in a pipe and on a terminal, and JSON."""

import io
import json
import sys

from peftkit.cli.output import megabytes, print_json, print_pairs, print_table


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_pipe_gets_aligned_uncut_text(capsys):
    print_table(["a", "name"], [["long cell " * 20, "x"], ["1", "[bold]y"]])
    long = "long cell " * 20
    lines = capsys.readouterr().out.split("\n")
    assert lines == [f"{'a'.ljust(200)}  name", f"{long}  x", f"{'1'.ljust(200)}  [bold]y", ""]


def test_a_terminal_gets_a_drawn_table_with_cells_as_they_are(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    print_table(["state", "name"], [["ok", "[bold]y"]])
    drawn = sys.stdout.getvalue()
    assert "─" in drawn
    assert "[bold]y" in drawn


def test_pairs_are_aligned(capsys):
    print_pairs([("name", "x"), ("base digest", "y")])
    assert capsys.readouterr().out == "name         x\nbase digest  y\n"


def test_json_keeps_letters_and_order(capsys):
    print_json({"b": "é", "a": None})
    out = capsys.readouterr().out
    assert "é" in out
    assert list(json.loads(out)) == ["b", "a"]


def test_sizes_are_for_people():
    assert megabytes(1_365_072) == "1.4 MB"
    assert megabytes(2_500) == "2.5 kB"
    assert megabytes(1_234_000_000) == "1,234.0 MB"
