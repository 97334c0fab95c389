"""`adapters ls` and `adapters show` over a real registry."""

import json

import pytest
import torch

from peftkit.cli import main
from peftkit.cli.adapters import COLUMNS
from peftkit.contracts import Delta, Quantisation
from peftkit.registry import DeltaInfo, Registry, RunSummary

DIGEST = f"sha256:{'0' * 64}"


def info(**changes):
    content = {
        "kind": "weights",
        "base_name": "some/base",
        "base_digest": DIGEST,
        "tokenizer_digest": DIGEST,
        "task": {"type": "classification", "dataset": "some/data", "dataset_config": None},
        "method": {"type": "top_layers", "num_layers": 2, "note": None},
        "labels": ["no", "yes"],
        "model": {},
        "recipe": {},
        "recipe_digest": DIGEST,
        "run": RunSummary(
            record="runs/a/record.json",
            seed=3,
            status="completed",
            metrics={"accuracy": 0.5, "f1": None},
        ),
        "stand_in": False,
        "created": "2026-11-23T16:28:16+00:00",
    }
    return DeltaInfo(**(content | changes))


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_REGISTRY", str(tmp_path / "registry"))
    return Registry(tmp_path / "registry")


@pytest.fixture
def filled(registry):
    delta = Delta("weights", {"w": torch.ones(3)})
    registry.save("toy", delta, info())
    registry.save("toy", delta, info(stand_in=True, quantisation=Quantisation()))
    return registry


def test_an_empty_registry_is_said_on_stderr(registry, capsys):
    assert main(["adapters", "ls"]) == 0
    assert capsys.readouterr() == ("", f"no deltas in {registry.root}\n")


def test_ls_has_a_line_for_each_version_and_marks_samples(filled, capsys):
    assert main(["adapters", "ls"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert tuple(header.split()) == COLUMNS
    assert [line.split()[:5] for line in lines] == [
        ["toy", "v1", "top_layers", "classification", "some/data"],
        ["toy", "v2", "top_layers", "classification", "some/data"],
    ]
    assert ["(sample)" in line for line in lines] == [False, True]
    assert "accuracy 0.5000, f1 -" in lines[0]


def test_ls_as_json_has_the_numbers(filled, capsys):
    assert main(["adapters", "ls", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["name"], first["version"], second["version"]) == ("toy", "v1", "v2")
    assert first["metrics"] == {"accuracy": 0.5, "f1": None}
    assert first["bytes"] == (filled.root / "deltas/toy@v1/weights.safetensors").stat().st_size
    assert (first["stand_in"], second["stand_in"]) == (False, True)


def test_ls_names_what_it_cannot_read_and_exits_1(filled, capsys):
    (filled.root / "cache.sqlite").unlink()
    blob = (filled.root / "deltas/toy@v2/manifest.json").resolve()
    blob.chmod(0o644)
    blob.write_text("{}")
    assert main(["adapters", "ls"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert f"{blob.name}: changed, expected sha256:{blob.name}" in err


def test_show_says_what_a_delta_is(filled, capsys):
    assert main(["adapters", "show", "toy@v1"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    for expected in (
        ["name", "toy@v1"],
        ["method", "top_layers"],
        ["num_layers", "2"],
        ["labels", "no, yes"],
        ["metrics", "accuracy 0.5000, f1 -"],
        ["run", "runs/a/record.json (seed 3, completed)"],
    ):
        assert expected in lines
    assert not any(line[0] in ("note", "dataset_config") for line in lines)


def test_show_says_that_a_sample_stood_in(filled, capsys):
    assert main(["adapters", "show", "toy"]) == 0
    shown = capsys.readouterr().out
    assert "a sample that peftkit made" in shown
    assert "nf4" in shown


def test_show_as_json_has_the_whole_info(filled, capsys):
    assert main(["adapters", "show", "toy@v1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["info"] == filled.find("toy@v1").info.model_dump(mode="json")
    assert shown["files"] == {
        "weights.safetensors": str(filled.find("toy").files["weights.safetensors"])
    }


def test_an_unknown_name_is_one_line(filled, capsys):
    assert main(["adapters", "show", "tyo"]) == 1
    said = f"{filled.root}: no delta 'tyo'; did you mean 'toy'? Choices: toy\n"
    assert capsys.readouterr() == ("", said)
