"""Conditions that part the runs of a table: between arms, between the seeds of one, and unknown."""

from datetime import timedelta

import pytest
from made_runs import DIGEST, record_of, right_share, write_arm, write_run

from peftkit.reporting.charts import charts_of
from peftkit.reporting.comparison import compare, write_comparison
from peftkit.reporting.tables import result_view
from peftkit.reporting.wording import condition_groups, condition_sentence


def table_of(folder):
    (table,) = compare([folder]).tables
    return table


def conditions(table):
    return {one.condition: (one.values, one.marked) for one in table.conditions}


def write_seeds(root, name, share, changes):
    """An arm whose runs have `changes` of their own, one entry a seed."""
    for seed, own in enumerate(changes):
        record = record_of(name, seed, **own)
        write_run(root / f"{name}-seed{seed}", record, right_share(share, 10 * len(name) + seed))


def test_a_condition_that_varies_alike_within_all_arms_is_shown_by_seed(tmp_path):
    mixed = [{"device": "H100", "mixed_precision": "bf16"}, {}, {}]
    write_seeds(tmp_path, "lora", 0.90, mixed)
    write_seeds(tmp_path, "full", 0.91, mixed)
    table = table_of(tmp_path)
    both = ["full", "lora"]
    assert conditions(table) == {
        "precision": ({"bf16 (seed 0), no (seeds 1 and 2)": both}, both),
        "device": ({"H100 (seed 0), CPU (seeds 1 and 2)": both}, both),
    }
    (group,) = condition_groups(table)
    assert group.arms == ["full and lora"]
    for path in write_comparison(compare([tmp_path]), tmp_path / "out"):
        if path.suffix != ".csv":
            assert "H100 (seed 0), CPU (seeds 1 and 2)" in path.read_text()


def test_arms_that_vary_in_other_seeds_differ(tmp_path):
    commits = [{"git_commit": letter * 40, "git_dirty": False} for letter in "aab"]
    write_seeds(tmp_path, "lora", 0.90, commits)
    write_seeds(tmp_path, "full", 0.91, commits[::-1])
    values, marked = conditions(table_of(tmp_path))["commit"]
    assert values == {
        "aaaaaaaa (seeds 0 and 1), bbbbbbbb (seed 2)": ["lora"],
        "bbbbbbbb (seed 0), aaaaaaaa (seeds 1 and 2)": ["full"],
    }
    assert sorted(marked) == ["full", "lora"]


def test_an_arm_that_varies_is_marked_even_if_most_do(tmp_path):
    write_seeds(tmp_path, "lora", 0.90, [{"device": "H100"}, {}])
    write_seeds(tmp_path, "full", 0.91, [{"device": "H100"}, {}])
    write_seeds(tmp_path, "top", 0.92, [{}, {}])
    _, marked = conditions(table_of(tmp_path))["device"]
    assert sorted(marked) == ["full", "lora", "top"]


def test_what_holds_for_all_rows_is_said_of_all():
    assert condition_sentence({"yes": ["a", "b", "c"]}, 3) == "yes for all"
    assert condition_sentence({"yes": ["a", "b", "c"], "no": ["d"]}, 4) == "yes for most; no for d"


def test_runs_that_all_shared_the_machine_are_told_with_their_seconds(tmp_path):
    first = record_of("lora", 0)
    times = {"started": first.started, "finished": first.finished}
    write_seeds(tmp_path, "lora", 0.90, [times] * 2)
    write_seeds(tmp_path, "full", 0.91, [times] * 2)
    table = table_of(tmp_path)
    values, marked = conditions(table)["another run at the same time"]
    assert (values, sorted(marked)) == ({"yes": ["full", "lora"]}, ["full", "lora"])
    view = result_view(table)
    assert [row[view.headers.index("train s")] for row in view.rows] == ["1,800†", "1,800†"]
    for path in write_comparison(compare([tmp_path]), tmp_path / "out"):
        if path.suffix in (".md", ".html"):
            assert "another run was at work on the same machine" in path.read_text()
    (note,) = [c.note for c in charts_of(table, ["a", "b"]) if c.title == "Score and time"]
    assert "beside another run" in note


def test_whoever_shared_the_machine_is_marked_even_if_most_did(tmp_path):
    first = record_of("lora", 0)
    times = {"started": first.started, "finished": first.finished}
    for name in ("lora", "full", "top"):
        write_seeds(tmp_path, name, 0.90, [times] * 2)
    write_seeds(tmp_path, "alone", 0.90, [{}, {}])
    _, marked = conditions(table_of(tmp_path))["another run at the same time"]
    assert sorted(marked) == ["full", "lora", "top"]


def test_seconds_of_runs_on_their_own_carry_no_warning(tmp_path):
    write_seeds(tmp_path, "lora", 0.90, [{}, {}])
    beside = record_of("full", 0)
    late = {"started": beside.started + timedelta(minutes=5), "finished": beside.finished}
    write_run(tmp_path / "full-seed0", beside, right_share(0.9, 1))
    write_run(tmp_path / "full-seed1", record_of("full", 1, **late), right_share(0.9, 2))
    view = result_view(table_of(tmp_path))
    assert {row[0].split()[0]: row[view.headers.index("train s")] for row in view.rows} == {
        "lora": "1,800",
        "full": "1,800†",
    }


@pytest.mark.parametrize("stand_in", [False, True])
def test_what_a_failed_run_did_not_reach_is_no_difference(tmp_path, stand_in):
    write_arm(tmp_path, "lora", 0.90, stand_in=stand_in)
    write_arm(tmp_path, "full", 0.91, stand_in=stand_in)
    nothing = {"base": None, "data_train": None, "data_validation": None, "recipe": DIGEST}
    write_run(
        tmp_path / "huge",
        record_of(
            "huge",
            0,
            status="failed",
            error="no such model",
            metrics={},
            digests=nothing,
            origins={"base": None, "data": None},
        ),
    )
    table = table_of(tmp_path)
    assert set(conditions(table)) == {"seeds"}
