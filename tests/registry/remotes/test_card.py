"""What a model card says, and what no text of a stranger's delta can make of it."""

import yaml
from remote_deltas import save

from peftkit.registry.manifest import RunSummary
from peftkit.registry.remotes.address import HubAddress
from peftkit.registry.remotes.card import STAND_IN, model_card

ADDRESS = HubAddress("me/toy")


def card_of(registry, **changes):
    """The front matter and the text below it."""
    stored = save(registry, "card", **changes)
    _, front, text = model_card(stored, ADDRESS).split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_card_says_what_the_delta_is_and_how_it_scored(elsewhere):
    front, text = card_of(elsewhere)
    assert front == {
        "library_name": "peft",
        "tags": ["peftkit", "lora", "classification"],
        "base_model": "some/base",
        "base_model_relation": "adapter",
        "datasets": ["some/data"],
        "metrics": ["accuracy", "f1"],
    }
    assert (
        text
        == f"""
# toy

What `lora` training changed of `some/base`, kept by peftkit as a delta of kind adapter.

| fact | value |
| --- | --- |
| task | `classification some/data` |
| labels | `no`, `yes` |
| base digest | `sha256:{"0" * 64}` |
| seed | 3 |
| run | `completed` |
| made | `2026-11-23T16:28:16+00:00` |
| digest | `{elsewhere.find("card").digest}` |

The recipe of `peftkit run` that made it, and all else that is known of it, is in `manifest.json`.

## Scores on validation

| metric | value |
| --- | --- |
| `accuracy` | 0.5000 |
| `f1` | - |

## Use

    peftkit adapters pull hf://me/toy --save-as card
    peftkit evaluate card

or with PEFT alone:

    model = peft.PeftModel.from_pretrained(base, "me/toy")
"""
    )


def test_a_sample_does_not_pass_for_the_data_set(elsewhere):
    front, text = card_of(elsewhere, stand_in=True)
    assert "datasets" not in front
    assert front["tags"][-1] == "stand-in"
    assert STAND_IN in text
    assert "## Scores on peftkit's sample" in text


def test_a_weights_delta_is_for_peftkit_only(elsewhere):
    front, text = card_of(elsewhere, kind="weights")
    assert (front["library_name"], front["base_model_relation"]) == ("peftkit", "finetune")
    assert "PeftModel" not in text


def test_a_base_that_is_a_path_is_not_given_to_the_hub(elsewhere):
    front, _ = card_of(elsewhere, base_name="/home/me/base", task={"dataset": "sample:reviews"})
    assert front.keys() == {"library_name", "tags", "metrics"}


def test_texts_of_a_stranger_stay_texts(elsewhere):
    evil = "a`|\n---\n<script>x</script>\r[b](c)\n# d"
    run = RunSummary(record="r", seed=1, status=evil, metrics={evil: 1.0})
    front, text = card_of(
        elsewhere,
        base_name=evil,
        labels=[evil],
        run=run,
        method={"type": evil},
        task={"type": evil},
    )
    assert front["tags"] == ["peftkit", evil, evil]
    assert front["metrics"] == [evil]
    for mark in ("<script", "\n---\n", "\n# d", "[b]"):
        assert mark not in text
    assert all(line.count("|") == 3 for line in text.splitlines() if line.startswith("|"))
