"""`extract` prints what was kept of the change, as lines or as JSON."""

import json

import pytest
from stored_deltas import store

from peftkit.cli import main
from peftkit.registry.store import Registry


@pytest.fixture
def full(base_of, workplace):
    store(Registry(workplace / "registry"), base_of("bert"), "full", {"type": "full"})


def test_a_lora_is_made_and_described(full, capsys):
    assert main(["extract", "full", "--rank", "2", "--save-as", "small"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert [key.strip() for key in lines] == [
        "saved",
        "extracted from",
        "norm held",
        "in layers",
        "left out",
        "verified",
        "drift",
    ]
    assert lines["saved"].strip() == "small@v1 (adapter of rank 2)"
    assert main(["extract", "full", "--rank", "4", "--save-as", "small", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["version"], found["kind"], found["method"]["rank"]) == ("v2", "adapter", 4)
    assert 0 < found["method"]["norm_held"] < found["method"]["norm_held_in_layers"] < 1
    assert main(["adapters", "show", "small@v2"]) == 0
    shown = capsys.readouterr().out
    assert "full@v1, weight 1 (sha256:" in shown
    assert main(["adapters", "diff", "small@v1", "small@v2"]) == 0
    assert main(["adapters", "verify"]) == 0


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["nope", "--rank", "2"], 1, "no delta 'nope'; Choices: full"),
        (["full", "--rank", "0"], 2, "extract: --rank 0: must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_one_line(full, capsys, words, code, line):
    assert main(["extract", *words, "--save-as", "small"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(f"{line}\n")
    assert len(err.splitlines()) == 1
