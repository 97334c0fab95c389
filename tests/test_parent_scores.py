"""A combined delta is scored on its parents' tasks, under their own heads where they differ."""

import json

import pytest
import tiny_runs
from stored_deltas import LORA, store

from peftkit.cli import main
from peftkit.errors import RegistryError
from peftkit.merging.combining import combine
from peftkit.merging.plan import plan_from
from peftkit.registry.loading import load_delta
from peftkit.registry.store import Registry
from peftkit.scoring import parent_scores, rescore


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def registry(base_of, tiny_data, workplace):
    """`two` and `other` answer with two labels, `three` and `full-three` with three."""
    registry, drawn = Registry(workplace / "registry"), Registry(workplace / "drawn")
    folder = base_of("bert")
    recipe = {"base": {"name": str(folder)}, "training": {"per_device_eval_batch_size": 16}}
    sections = {"two": LORA, "other": LORA, "three": LORA, "full-three": {"type": "full"}}
    for seed, (name, section) in enumerate(sections.items()):
        labels = ["negative", "positive", "mixed"][: 3 if "three" in name else 2]
        task = {**tiny_runs.TASK, "dataset": str(tiny_data), "labels": labels, "max_length": 64}
        facts = {"task": task, "labels": labels, "recipe": recipe, "stand_in": False}
        raw = store(drawn, folder, name, section, labels=len(labels), seed=seed)
        info = raw.info.model_copy(update=facts)
        registry.save(name, drawn.read_delta(raw, base=folder), info, base=folder)
    return registry


def combined(registry, names, weights=(), **options):
    return combine(registry, plan_from(names, weights, {"save_as": "both"} | options)).stored


def own(registry, name):
    return {score.metric: score.now for score in rescore(load_delta(name, registry=registry))[0]}


def by_parent(scores):
    found = {}
    for score in scores:
        found.setdefault(score.parent, {})[score.metric] = score.result
    return found


def test_parents_with_the_results_head_are_scored_with_the_result(registry):
    combined(registry, ["two", "other"])
    scores = by_parent(parent_scores(registry, "both"))
    expected = own(registry, "both")
    assert scores == {"two@v1": expected, "other@v1": expected}
    assert expected.keys() == {"loss", "accuracy"}


@pytest.mark.slow
@pytest.mark.parametrize("names", [["two", "three"], ["two", "full-three"]])
def test_a_parent_with_another_head_keeps_it(registry, names):
    combined(registry, names, [0.0, 1.0], head_from="two")  # the body is the other parent's
    scores = by_parent(parent_scores(registry, "both"))
    assert scores[f"{names[1]}@v1"] == pytest.approx(own(registry, names[1]), abs=1e-5)
    assert scores["two@v1"] == own(registry, "both") != own(registry, "two")


@pytest.mark.slow
def test_what_the_parents_runs_recorded_stands_beside(registry):
    stored = registry.find("two")
    run = stored.info.run.model_copy(update={"metrics": {"accuracy": 0.25}})
    info = stored.info.model_copy(update={"run": run})
    registry.save("scored", registry.read_delta(stored), info)
    combined(registry, ["scored", "other"])
    recorded = {(s.parent, s.metric): s.recorded for s in parent_scores(registry, "both")}
    assert recorded == {
        ("scored@v1", "accuracy"): 0.25,
        ("scored@v1", "loss"): None,
        ("other@v1", "accuracy"): None,
        ("other@v1", "loss"): None,
    }


def test_a_parent_that_is_gone_is_named(registry):
    combined(registry, ["two", "other"])
    registry.rm("other")
    with pytest.raises(RegistryError, match=r"no delta 'other'"):
        parent_scores(registry, "both")


def test_evaluate_reads_well_without_recorded_scores(registry, capsys):
    combined(registry, ["two", "other"])
    assert main(["evaluate", "both"]) == 0
    out, err = capsys.readouterr()
    header, *lines = out.splitlines()
    assert header.split() == ["metric", "now"]
    assert sorted(line.split()[0] for line in lines) == ["accuracy", "loss"]
    assert err == (
        "both@v1: made of two@v1, other@v1; no run has scored it, so nothing is compared\n"
    )
    assert main(["evaluate", "both", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is None
    assert found["metrics"] == own(registry, "both")


def test_predict_ls_and_show_work_with_it(registry, capsys):
    combined(registry, ["two", "three"], head_from="three")
    assert main(["predict", "both", "good film", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["scores"].keys() == {"negative", "positive", "mixed"}
    assert main(["adapters", "ls", "--method", "merge", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["metrics"]) == ("both", {})
    assert main(["adapters", "show", "both"]) == 0
    shown = capsys.readouterr().out
    assert "two@v1, weight 0.5 (sha256:" in shown
    assert "three@v1, weight 0.5 (sha256:" in shown


def test_one_parent_that_saw_a_sample_marks_the_result(registry):
    stored = registry.find("other")
    info = stored.info.model_copy(update={"stand_in": True})
    registry.save("sampled", registry.read_delta(stored), info)
    assert combined(registry, ["two", "sampled"]).info.stand_in
    assert own(registry, "both").keys() == {"loss", "accuracy"}
