"""`adapters push` and `adapters pull`, with the remote left out or on this machine."""

import json
import subprocess
import sys

import pytest
import torch

from peftkit.cli import main
from peftkit.contracts import Delta
from peftkit.registry import DeltaInfo, Registry, RunSummary, remotes

DIGEST = f"sha256:{'0' * 64}"
REMOTE = "oci://localhost:5000/team/toy:v1"
PINNED = f"oci://localhost:5000/team/toy@{DIGEST}"
INFO = DeltaInfo(
    kind="weights",
    base_name="some/base",
    base_digest=DIGEST,
    tokenizer_digest=DIGEST,
    task={"type": "classification"},
    method={"type": "full"},
    model={},
    recipe={},
    recipe_digest=DIGEST,
    run=RunSummary(record="record.json", seed=3, status="completed", metrics={}),
    stand_in=True,
)


@pytest.fixture
def stored(workplace):
    registry = Registry(workplace / "registry")
    return registry.save("toy", Delta("weights", {"w": torch.ones(3)}), INFO)


@pytest.fixture
def asked(stored, monkeypatch):
    """What the verbs hand on; both remotes say that all went well."""
    calls = []

    def push(registry, name, remote):
        calls.append((name, remote))
        return remotes.Pushed(stored, remote, PINNED)

    def pull(registry, remote, *, save_as=None):
        calls.append((remote, save_as))
        return stored

    monkeypatch.setattr(remotes, "push", push)
    monkeypatch.setattr(remotes, "pull", pull)
    return calls


def test_push_says_where_the_bytes_are_for_ever(asked, capsys):
    assert main(["adapters", "push", "toy@v1", REMOTE]) == 0
    assert capsys.readouterr() == (f"toy@v1 is {PINNED}\n", "")
    assert asked == [("toy@v1", REMOTE)]


def test_pull_says_what_was_stored(asked, stored, capsys):
    assert main(["adapters", "pull", REMOTE, "--save-as", "other"]) == 0
    assert capsys.readouterr() == (f"toy@v1 {stored.digest}\n", "")
    assert asked == [(REMOTE, "other")]


@pytest.mark.parametrize("words", [["push", "toy", REMOTE], ["pull", REMOTE]])
def test_as_json_both_say_all_of_it(asked, stored, capsys, words):
    assert main(["adapters", *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["name"], said["version"], said["digest"]) == ("toy", "v1", stored.digest)
    assert (said["remote"], said["stand_in"]) == (REMOTE, True)
    own = {"push": ("pinned", PINNED), "pull": ("path", str(stored.path))}
    assert said[own[words[0]][0]] == own[words[0]][1]


@pytest.mark.parametrize("words", [["push", "toy", "ocy://a/b"], ["pull", "ocy://a/b"]])
def test_a_bad_address_is_one_line(stored, capsys, words):
    assert main(["adapters", *words]) == 1
    assert capsys.readouterr() == (
        "",
        "remote 'ocy://a/b': unknown scheme 'ocy'; did you mean 'oci'? Choices: hf, oci\n",
    )


LIGHT = """
import sys
import peftkit.registry.remotes
from peftkit.cli.app import build_app
build_app()
heavy = {"oras", "requests", "urllib3", "huggingface_hub", "httpx2", "torch"} & sys.modules.keys()
print(sorted(heavy))
"""


def test_no_library_of_the_network_is_loaded_before_it_is_needed():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
