"""From run folders to rows: what is grouped, marked, tested, and left out with a line."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from made_runs import DIGEST, digest, recipe_of, record_of, right_share, write_arm, write_run

from peftkit.reporting.comparison import compare, write_comparison
from peftkit.reporting.wording import summary_sentences


def only_table(folder, **settings):
    comparison = compare([folder], **settings)
    assert len(comparison.tables) == 1
    return comparison.tables[0]


def labels(table):
    return [row.label for row in table.rows]


def condition(table, name):
    return next((c for c in table.conditions if c.condition == name), None)


def problem_texts(comparison):
    return [str(problem) for problem in comparison.problems]


@pytest.fixture
def two_arms(tmp_path):
    write_arm(tmp_path, "lora", 0.90)
    write_arm(tmp_path, "full", 0.91, recipe=recipe_of("full", method={"type": "full"}))
    return tmp_path


def test_runs_that_differ_in_the_seed_only_are_one_row(two_arms):
    table = only_table(two_arms)
    assert sorted(labels(table)) == ["full", "lora"]
    assert [sorted(row.scores) for row in table.rows] == [[0, 1, 2], [0, 1, 2]]
    assert table.conditions == ()


def test_a_row_holds_the_mean_and_an_interval_around_it(two_arms):
    for row in only_table(two_arms).rows:
        assert row.score == pytest.approx(np.mean(list(row.scores.values())))
        for low, high in (row.seed_interval, row.interval):
            assert low < row.score < high


def test_other_settings_under_one_name_are_rows_that_say_what_differs(tmp_path):
    for rate in (1e-4, 5e-4):
        recipe = recipe_of("lora", training={"learning_rate": rate})
        record = record_of("lora", recipe=recipe)
        write_run(tmp_path / f"run{rate}", record, right_share(0.9, int(rate * 1e6)))
    table = only_table(tmp_path)
    assert sorted(labels(table)) == ["lora (learning_rate=0.0001)", "lora (learning_rate=0.0005)"]
    assert table.conditions == ()


def test_other_validation_data_is_another_table(tmp_path):
    write_arm(tmp_path, "lora", 0.9)
    other = {"base": DIGEST, "data_train": DIGEST, "data_validation": digest("b"), "recipe": DIGEST}
    write_arm(tmp_path, "full", 0.9, digests=other)
    tables = compare([tmp_path]).tables
    assert sorted(labels(table) for table in tables) == [["full"], ["lora"]]
    assert all(len(table.pairs) == 0 for table in tables)


def test_of_two_runs_of_a_seed_the_newer_counts_and_a_line_says_so(tmp_path):
    old, new = record_of("lora", 0), record_of("lora", 0)
    write_run(tmp_path / "a_new", new, right_share(0.95, 1))
    write_run(tmp_path / "b_old", old, right_share(0.80, 2))
    comparison = compare([tmp_path])
    (row,) = comparison.tables[0].rows
    assert [run.folder.name for run in row.arm.runs] == ["a_new"]
    assert problem_texts(comparison) == [
        f"{tmp_path / 'b_old'}: seed 0 of lora was run again; {tmp_path / 'a_new'} is newer"
    ]
    assert comparison.is_complete


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("effective batch", {"recipe": {"training": {"gradient_accumulation_steps": 2}}}),
        ("activation checkpointing", {"recipe": {"training": {"gradient_checkpointing": True}}}),
        ("epochs", {"recipe": {"training": {"num_train_epochs": 1.0}}}),
        ("share of train that is held out", {"recipe": {"task": {"holdout_fraction": 0.05}}}),
        ("effective batch", {"processes": 2}),
        ("precision", {"mixed_precision": "bf16"}),
        ("number of learning rates tried", {"learning_rates_tried": [1e-4, 2e-4, 5e-4]}),
        ("version of torch", {"libraries": {"torch": "2.14.0"}}),
        ("version of bitsandbytes", {"libraries": {"torch": "2.13.0", "bitsandbytes": "0.50"}}),
        ("device", {"device": "H100"}),
        ("commit", {"git_commit": "837b83d1f8", "git_dirty": True}),
        ("resumed", {"resumed_after_step": 10}),
        ("begun with weights of a training before", {"weights_from_step": 10}),
        ("sample data", {"stand_in": True}),
        ("base weights", {"digests": {"base": digest("c")}}),
        ("training data", {"digests": {"data_train": digest("c")}}),
    ],
)
def test_a_condition_that_differs_is_named_and_the_row_marked(two_arms, name, change):
    changes = dict(change)
    if "recipe" in changes:
        changes["recipe"] = recipe_of("top", **changes["recipe"])
    if "digests" in changes:
        whole = dict.fromkeys(("base", "data_train", "data_validation", "recipe"), DIGEST)
        changes["digests"] = whole | changes["digests"]
    write_arm(two_arms, "top", 0.9, **changes)
    table = only_table(two_arms)
    found = condition(table, name)
    assert found is not None
    assert found.marked == ["top"]
    marks = {row.label: row.notes for row in table.rows}
    assert found.letter in marks["top"]
    assert marks["lora"] == marks["full"] == ()


def test_what_is_compared_is_no_condition(two_arms):
    recipe = recipe_of("top", method={"type": "top_layers", "layers": 2})
    recipe["training"] |= {"learning_rate": 5e-4, "learning_rates_tried": [5e-4]}
    write_arm(two_arms, "top", 0.9, recipe=recipe)
    assert only_table(two_arms).conditions == ()


def used(size, accumulation):
    """A record's word of a batch that was found."""
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    return {**sizes, "found": True}


def test_a_batch_that_was_found_is_shown_as_it_was_used(two_arms):
    asked = recipe_of("top", training={"auto_batch_size": True, "report_to": ["wandb"]})
    write_arm(two_arms, "top", 0.9, recipe=asked, train_batch=used(8, 4))
    found = only_table(two_arms).conditions
    assert {one.condition: (one.values, one.marked) for one in found} == {
        "examples in a forward pass of training": (
            {"32": ["full", "lora"], "8": ["top"]},
            ["top"],
        ),
        "accumulation steps": ({"1": ["full", "lora"], "4": ["top"]}, ["top"]),
    }


def test_a_batch_that_was_found_as_asked_for_is_no_condition(two_arms):
    asked = recipe_of("top", training={"auto_batch_size": True})
    write_arm(two_arms, "top", 0.9, recipe=asked, train_batch=used(32, 1))
    assert only_table(two_arms).conditions == ()


def test_training_data_may_hang_on_the_seed(tmp_path):
    for name in ("lora", "full"):
        for seed, letter in ((0, "b"), (1, "c")):
            digests = dict.fromkeys(("base", "data_validation", "recipe"), DIGEST)
            record = record_of(name, seed, digests=digests | {"data_train": digest(letter)})
            write_run(tmp_path / f"{name}{seed}", record, right_share(0.9, seed))
    assert condition(only_table(tmp_path), "training data") is None


def test_runs_at_the_same_time_on_one_machine_are_marked(two_arms):
    first = record_of("top", 0)
    write_run(two_arms / "top0", first, right_share(0.9, 7))
    beside = record_of("top", 1, started=first.started, finished=first.finished)
    write_run(two_arms / "top1", beside, right_share(0.9, 8))
    assert condition(only_table(two_arms), "another run at the same time").marked == ["top"]


def test_a_failed_run_is_a_row_with_its_reason(two_arms):
    error = "RuntimeError: can't allocate memory"
    changes = {"status": "out_of_memory", "error": error, "metrics": {}, "history": []}
    digests = {"base": DIGEST, "data_train": None, "data_validation": None, "recipe": DIGEST}
    record = record_of("huge", 0, digests=digests, **changes)
    write_run(two_arms / "huge-seed0", record)
    table = only_table(two_arms)
    assert labels(table)[-1] == "huge"
    row = table.rows[-1]
    assert (row.score, row.interval, row.figures.statuses) == (None, None, {"out_of_memory": 1})
    for path in write_comparison(compare([two_arms]), two_arms / "out"):
        assert "allocate memory" in path.read_text().replace("\\", ""), path.suffix


def test_a_run_without_a_record_is_a_row_too(two_arms):
    content = {"recipe": "qlora", "seed": 1, "status": "failed", "error": "exit code -9"}
    (two_arms / "qlora-seed1").mkdir()
    (two_arms / "qlora-seed1" / "launch.json").write_text(json.dumps(content))
    table = only_table(two_arms)
    row = table.rows[-1]
    assert (row.label, row.arm.runs[0].error) == ("qlora", "exit code -9")


def test_a_run_without_a_record_joins_the_arm_of_its_name(two_arms):
    content = {"recipe": "lora", "seed": 3, "status": "failed", "error": "exit code -9"}
    (two_arms / "lora-seed3").mkdir()
    (two_arms / "lora-seed3" / "launch.json").write_text(json.dumps(content))
    row = next(r for r in only_table(two_arms).rows if r.label == "lora")
    assert row.figures.statuses == {"completed": 3, "failed": 1}


def broken(edit):
    def damage(folder):
        path = folder / "record.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return damage


def truncated(folder):
    path = folder / "record.json"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (broken(lambda c: c.pop("memory")), "memory: missing"),
        (broken(lambda c: c.update(schema_version=99)), "upgrade peftkit to read it"),
        (truncated, "not a whole JSON document"),
        (lambda f: (f / "predictions.parquet").unlink(), "No such file"),
        (lambda f: (f / "predictions.parquet").write_bytes(b"PAR1"), "not a whole Parquet file"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_the_rest_is_compared(two_arms, damage, words):
    write_arm(two_arms, "top", 0.9, seeds=(0,))
    damage(two_arms / "top-seed0")
    comparison = compare([two_arms])
    (line,) = problem_texts(comparison)
    assert str(two_arms / "top-seed0") in line
    assert words in line
    assert "\n" not in line
    assert not comparison.is_complete
    assert {"lora", "full"} <= set(labels(comparison.tables[0]))
    assert len(comparison.tables[0].pairs) == 1


def test_a_copied_run_counts_once(two_arms):
    shutil.copytree(two_arms / "lora-seed0", two_arms / "zz_copy")
    comparison = compare([two_arms, two_arms / "lora-seed0"])
    (line,) = problem_texts(comparison)
    assert (
        line
        == f"{two_arms / 'zz_copy'}: the same record as {two_arms / 'lora-seed0'}; counted once"
    )
    assert comparison.is_complete


def test_a_run_without_predictions_is_shown_and_not_tested(two_arms):
    write_run(two_arms / "top-seed0", record_of("top", 0))
    comparison = compare([two_arms])
    row = next(r for r in comparison.tables[0].rows if r.label == "top")
    assert (row.score, row.interval) == (0.9, None)
    assert problem_texts(comparison) == [
        f"{two_arms / 'top-seed0'}: has no predictions; it is in no test"
    ]


def test_predictions_of_another_run_are_not_tested(two_arms):
    write_run(two_arms / "top-seed0", record_of("top", 0), right_share(0.9, 5))
    shutil.copy(two_arms / "lora-seed0" / "predictions.parquet", two_arms / "top-seed0")
    record = two_arms / "top-seed0" / "record.json"
    content = json.loads(record.read_text())
    content["metrics"]["validation"]["accuracy"] = 0.5
    record.write_text(json.dumps(content))
    (line,) = problem_texts(compare([two_arms]))
    assert "its record says 0.5000; it is in no test" in line


def test_an_empty_folder_and_a_missing_one_are_lines(tmp_path):
    (tmp_path / "empty").mkdir()
    comparison = compare([tmp_path / "empty", tmp_path / "missing"])
    assert comparison.tables == ()
    assert problem_texts(comparison) == [
        f"{tmp_path / 'empty'}: no record.json at or below it",
        f"{tmp_path / 'missing'}: no such folder",
    ]
    assert len(write_comparison(comparison, tmp_path / "out")) == 4


def test_one_seed_has_no_interval_over_seeds_and_says_so(tmp_path):
    write_arm(tmp_path, "lora", 0.9, seeds=(0,))
    write_arm(tmp_path, "full", 0.9, seeds=(0,))
    table = only_table(tmp_path)
    assert all(row.seed_interval is None and row.interval for row in table.rows)
    assert not next(iter(table.pairs)).covers_seeds
    assert any(s.startswith("One seed only for") for s in summary_sentences(table))


def test_a_clear_difference_is_told_apart_and_a_lack_of_one_is_not(tmp_path):
    write_arm(tmp_path, "good", 0.95)
    write_arm(tmp_path, "same", 0.945)
    write_arm(tmp_path, "bad", 0.60)
    table = only_table(tmp_path)
    assert {row.label: row.in_best_group for row in table.rows} == {
        "good": True,
        "same": True,
        "bad": False,
    }
    assert [row.letters for row in table.rows] == ["a", "a", "b"]
    lead = summary_sentences(table)[0]
    assert "it is ahead of bad" in lead
    assert "cannot be told apart from" in lead


def test_a_sample_is_named_first(tmp_path):
    write_arm(tmp_path, "lora", 0.9, stand_in=True)
    assert summary_sentences(only_table(tmp_path))[0].startswith("Sample data")


def test_the_price_gives_a_cost(two_arms):
    table = only_table(two_arms, price_per_hour=3.0)
    assert [row.figures.cost for row in table.rows] == [3.0, 3.0]


def test_the_prediction_stands_beside_the_measurement(two_arms):
    predicted = {"load": 90 * 2**20, "train_step": 525 * 2**20, "eval": None}
    predicted = {k: v for k, v in predicted.items() if v}
    write_arm(two_arms, "top", 0.9, predicted_allocated_bytes=predicted)
    row = next(r for r in only_table(two_arms).rows if r.label == "top")
    assert row.figures.prediction_error == pytest.approx(0.05)


def test_the_csv_has_one_line_a_run(two_arms):
    paths = write_comparison(compare([two_arms]), two_arms / "out")
    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert len(rows) == 6
    assert {row["status"] for row in rows} == {"completed"}
    assert all(float(row["train_step_allocated_bytes"]) == 500 * 2**20 for row in rows)


def test_the_json_has_arms_pairs_groups_conditions_runs_and_problems(two_arms):
    paths = write_comparison(compare([two_arms]), two_arms / "out")
    content = json.loads(paths[0].read_text())
    assert content == compare([two_arms]).as_json() | {"problems": content["problems"]}
    (table,) = content["tables"]
    assert set(table["groups"]) == {"a"}
    assert len(table["pairs"]) == 1
    assert [len(arm["runs"]) for arm in table["arms"]] == [3, 3]
    assert len(table["pairs"][0]["mcnemar"]) == 3


def test_a_report_is_the_same_each_time(two_arms):
    texts = [
        [path.read_bytes() for path in write_comparison(compare([two_arms]), two_arms.parent / out)]
        for out in ("one", "two")
    ]
    assert texts[0] == texts[1]


def test_names_cannot_break_a_markdown_table(tmp_path):
    write_arm(tmp_path, "a|b", 0.9)
    text = write_comparison(compare([tmp_path]), tmp_path / "out")[2].read_text()
    assert "a\\|b" in text
    assert "| a|b" not in text


def test_comparing_and_writing_import_no_torch(two_arms, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from peftkit.reporting.comparison import compare, write_comparison\n"
        "write_comparison(compare([Path(sys.argv[1])]), Path(sys.argv[1]) / 'out')\n"
        "print({'torch', 'pandas', 'transformers', 'statsmodels'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(two_arms)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"
