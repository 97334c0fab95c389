"""What a row is made of: which run of a seed counts, and what its figures stand for."""

import json
from datetime import timedelta

import numpy as np
import pytest
from made_runs import DIGEST, MIB, digest, recipe_of, record_of, right_share, write_arm, write_run

from peftkit.reporting.comparison import compare, write_comparison
from peftkit.reporting.page import page
from peftkit.reporting.predictions import read_predictions, write_predictions
from peftkit.reporting.resampling import recomputed
from peftkit.reporting.tables import choice_view, memory_view, result_view
from peftkit.reporting.wording import summary_sentences


def table_of(folder):
    (table,) = compare([folder]).tables
    return table


def row_of(table, label):
    return next(row for row in table.rows if row.label == label)


def text_of(table):
    return " ".join(summary_sentences(table))


def unfinished(status, seed=0):
    return record_of("lora", seed, status=status, error="stopped", metrics={})


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_completed_run_is_not_replaced_by_one_that_did_not_complete(tmp_path, status):
    write_arm(tmp_path, "lora", 0.9)
    write_run(tmp_path / "again", unfinished(status))
    comparison = compare([tmp_path])
    (row,) = comparison.tables[0].rows
    assert row.figures.statuses == {"completed": 3}
    assert row.tested_seeds == (0, 1, 2)
    assert [str(problem) for problem in comparison.problems] == [
        f"{tmp_path / 'again'}: seed 0 of lora was run again and ended {status}; "
        f"the completed run {tmp_path / 'lora-seed0'} counts"
    ]
    assert comparison.is_complete
    assert f"seed 0: {status}, not counted" in page(comparison)


def test_a_launch_that_calls_itself_completed_replaces_no_record(tmp_path):
    write_arm(tmp_path, "lora", 0.9)
    content = {"recipe": "lora", "seed": 0, "status": "completed", "error": None}
    (tmp_path / "launched").mkdir()
    (tmp_path / "launched" / "launch.json").write_text(json.dumps(content))
    (row,) = table_of(tmp_path).rows
    assert row.tested_seeds == (0, 1, 2)


def test_of_runs_that_did_not_complete_the_newest_counts(tmp_path):
    write_run(tmp_path / "a", unfinished("failed"))
    write_run(tmp_path / "b", unfinished("interrupted"))
    (row,) = table_of(tmp_path).rows
    assert row.figures.statuses == {"interrupted": 1}


def test_of_completed_runs_the_newest_counts_whatever_failed_since(tmp_path):
    for name in ("old", "new"):
        write_run(tmp_path / name, record_of("lora", 0), right_share(0.9, len(name)))
    write_run(tmp_path / "failed", unfinished("failed"))
    comparison = compare([tmp_path])
    (row,) = comparison.tables[0].rows
    kept = max(
        row.arm.runs + row.arm.superseded, key=lambda run: (run.is_completed, run.record.finished)
    )
    assert row.arm.runs == (kept,)
    assert kept.folder.name == "new"
    assert len(comparison.problems) == 2


def peaks(load, train_step, evaluation, resident=1000):
    found = zip(("load", "train_step", "eval"), (load, train_step, evaluation), strict=True)
    return {
        phase: {
            "allocated_bytes": size * MIB,
            "reserved_bytes": None,
            "resident_bytes": resident * MIB,
        }
        for phase, size in found
    }


def test_the_prediction_error_is_that_of_the_worst_run(tmp_path):
    """Seed 0 is predicted far too low and seed 1 too high: the two peaks agree by chance."""
    for seed, (measured, predicted) in enumerate([(500, 250), (200, 500)]):
        record = record_of(
            "lora",
            seed,
            memory=peaks(90, measured, 120),
            predicted_allocated_bytes={"train_step": predicted * MIB, "eval": 60 * MIB},
        )
        write_run(tmp_path / f"lora{seed}", record, right_share(0.9, seed))
    table = table_of(tmp_path)
    (row,) = table.rows
    assert row.figures.prediction_error == pytest.approx(1.5)
    view = memory_view(table)
    cells = dict(zip(view.headers, view.rows[0], strict=True))
    assert (cells["error: train, %"], cells["error: eval, %"]) == ("+150.0", "−50.0")
    assert "error: load, %" not in cells


def write_with_memory(root, name, share, memory):
    write_arm(root, name, share, memory=memory)


def test_what_a_budget_must_hold_is_the_highest_peak_of_all_phases(tmp_path):
    write_with_memory(tmp_path, "top", 0.90, peaks(600, 280, 155))
    write_with_memory(tmp_path, "full", 0.91, peaks(90, 500, 120))
    table = table_of(tmp_path)
    assert row_of(table, "top").figures.needed_bytes == 600 * MIB
    view = choice_view(table)
    assert view.headers[0] == "live tensors from, MiB"
    assert [(row[0], row[2]) for row in view.rows] == [("500", "full")]
    results = result_view(table)
    place = results.headers.index("train peak, MiB")
    assert {row[0].split()[0]: row[place] for row in results.rows} == {"top": "280", "full": "500"}
    assert "cheapest in memory of them: 500 MiB of live tensors at the peak" in text_of(table)


def test_the_resident_memory_stands_beside_it_and_another_order_is_said(tmp_path):
    write_with_memory(tmp_path, "full", 0.95, peaks(90, 700, 120, resident=2000))
    write_with_memory(tmp_path, "qlora", 0.945, peaks(50, 500, 120, resident=2400))
    table = table_of(tmp_path)
    view = choice_view(table)
    assert "resident, MiB" in view.headers
    place = view.headers.index("resident, MiB")
    assert [row[place] for row in view.rows] == ["2,400", "2,000"]
    words = (
        "By the resident memory of the whole process the order is another: "
        "full 2,000 MiB and qlora 2,400 MiB."
    )
    for path in write_comparison(compare([tmp_path]), tmp_path / "out"):
        if path.suffix != ".csv":
            assert words in path.read_text()


def test_an_order_that_resident_memory_shares_is_not_said(tmp_path):
    write_with_memory(tmp_path, "full", 0.95, peaks(90, 700, 120, resident=2400))
    write_with_memory(tmp_path, "qlora", 0.945, peaks(50, 500, 120, resident=2000))
    assert "order is another" not in text_of(table_of(tmp_path))


def test_host_memory_does_not_contradict_that_of_a_gpu(tmp_path):
    for name, share, size, resident in (("full", 0.95, 700, 2000), ("qlora", 0.945, 500, 2400)):
        memory = peaks(90, size, 120, resident=resident)
        for phase in memory.values():
            phase["reserved_bytes"] = phase["allocated_bytes"]
        write_with_memory(tmp_path, name, share, memory)
    assert "order is another" not in text_of(table_of(tmp_path))


SECTIONS = ("base", "task", "method", "training", "name", "seed", "output_dir")
ODD = (None, [], ["x", 1], "text", 7, 1.5, True, {}, {"a": None, "b": [1, {"c": 2}]})


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_an_odd_section_of_one_recipe_costs_the_others_nothing(tmp_path, section, odd):
    write_arm(tmp_path, "lora", 0.90)
    write_arm(tmp_path, "full", 0.91)
    path = tmp_path / "full-seed1" / "record.json"
    content = json.loads(path.read_text())
    content["recipe"][section] = odd
    path.write_text(json.dumps(content))
    comparison = compare([tmp_path])
    assert len(write_comparison(comparison, tmp_path / "out")) == 4
    assert "lora" in [row.label for table in comparison.tables for row in table.rows]


KEYS = ("metrics", "dataset", "per_device_train_batch_size", "learning_rate", "mixed_precision")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_an_odd_value_in_one_recipe_costs_the_others_nothing(tmp_path, key, odd):
    write_arm(tmp_path, "lora", 0.90)
    write_arm(tmp_path, "full", 0.91)
    path = tmp_path / "full-seed1" / "record.json"
    content = json.loads(path.read_text())
    for section in ("task", "training"):
        content["recipe"][section][key] = odd
    path.write_text(json.dumps(content))
    assert len(write_comparison(compare([tmp_path]), tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metrics", {"validation": {"accuracy": 1e308, "loss": 1e308}}),
        ("metrics", {"validation": {"loss": 1e308}}),
        ("seconds", dict.fromkeys(("load", "tokenise", "train", "eval", "metered"), 1.7e308)),
        ("examples_per_second", 1.7e308),
        ("trainable_parameters", 10**400),
        ("optimizer_steps", 10**30),
        ("learning_rates_tried", [1.7e308]),
        ("seed", -(10**30)),
        ("libraries", {}),
        ("name", ""),
        ("device", ""),
        ("history", [{"step": 10**30, "loss": 1e308, "holdout": {"accuracy": -1e308}}]),
        ("processes", 10**30),
    ],
)
def test_figures_out_of_all_bounds_cost_the_others_nothing(tmp_path, field, value):
    write_arm(tmp_path, "lora", 0.90)
    write_arm(tmp_path, "full", 0.91)
    for seed in (0, 1):
        path = tmp_path / f"full-seed{seed}" / "record.json"
        content = json.loads(path.read_text())
        content[field] = value
        content["recipe"] |= {field: value} if field in ("name", "seed") else {}
        path.write_text(json.dumps(content))
    comparison = compare([tmp_path], price_per_hour=1e9)
    assert len(write_comparison(comparison, tmp_path / "out")) == 4
    assert "lora" in [row.label for table in comparison.tables for row in table.rows]


@pytest.mark.parametrize(
    "change",
    [
        {"status": "completed"},
        {"status": "?"},
        {"status": None},
        {"seed": float("inf")},
        {"seed": "x"},
        {"seed": 1.5},
        {"error": {}},
        {"recipe": ["x"]},
    ],
    ids=repr,
)
@pytest.mark.parametrize("recipe", ["1: a\nname: qlora\n", "task: [", "- a\n", "training: x\n"])
def test_an_odd_launch_costs_the_others_nothing(tmp_path, change, recipe):
    write_arm(tmp_path, "lora", 0.90)
    write_arm(tmp_path, "full", 0.91)
    content = {"recipe": "qlora", "seed": 1, "status": "failed", "error": "exit code -9"}
    folder = tmp_path / "qlora-seed1"
    folder.mkdir()
    (folder / "launch.json").write_text(json.dumps(content | change))
    (folder / "recipe.yaml").write_text(recipe)
    comparison = compare([tmp_path])
    assert len(write_comparison(comparison, tmp_path / "out")) == 4
    assert len(comparison.tables[0].pairs) == 1


@pytest.mark.parametrize(
    "odd",
    [
        np.full(400, "yes"),
        np.full(400, np.nan),
        np.full(400, 10**15),
        np.full(400, -1),
        np.zeros((400, 2)),
        np.full(400, 0.5),
    ],
    ids=["text", "nan", "huge", "negative", "lists", "fractions"],
)
@pytest.mark.parametrize("column", ["label", "prediction", "loss"])
@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "spearmanr", "pearsonr"])
def test_odd_predictions_of_one_run_cost_the_others_nothing(tmp_path, column, odd, metric):
    task = {"metrics": [metric]}
    for name in ("lora", "full"):
        write_arm(tmp_path, name, 0.90, recipe=recipe_of(name, task=task))
        for seed in range(3):
            put_score(tmp_path / f"{name}-seed{seed}", metric)
    columns = read_predictions(tmp_path / "full-seed0" / "predictions.parquet") | {column: odd}
    write_predictions(tmp_path / "full-seed0" / "predictions.parquet", columns)
    comparison = compare([tmp_path])
    assert len(write_comparison(comparison, tmp_path / "out")) == 4
    assert len(comparison.tables[0].pairs) == 1


def put_score(folder, metric):
    """The score that the predictions give, into the record."""
    path = folder / "record.json"
    content = json.loads(path.read_text())
    score = recomputed(metric, read_predictions(folder / "predictions.parquet"))
    content["metrics"] = {"validation": {metric: score}}
    path.write_text(json.dumps(content))


def test_a_sample_among_real_data_is_named(tmp_path):
    write_arm(tmp_path, "lora", 0.90)
    write_arm(tmp_path, "toy", 0.91, stand_in=True)
    lead = summary_sentences(table_of(tmp_path))[0]
    assert lead.startswith("Sample data: toy used a small stand-in")
    assert "lora" not in lead
    assert lead in page(compare([tmp_path])).partition("</header>")[0]


def test_a_sample_in_another_table_is_named_on_the_page(tmp_path):
    write_arm(tmp_path, "lora", 0.90)
    other = {"base": DIGEST, "data_train": DIGEST, "data_validation": digest("b"), "recipe": DIGEST}
    write_arm(tmp_path, "toy", 0.91, stand_in=True, digests=other)
    head = page(compare([tmp_path])).partition("</header>")[0]
    assert "Sample data: toy used a small stand-in" in head


def test_a_sample_in_one_run_of_an_arm_is_named(tmp_path):
    write_arm(tmp_path, "lora", 0.90, seeds=(0, 1))
    write_run(tmp_path / "toy", record_of("lora", 2, stand_in=True), right_share(0.9, 4))
    assert "Sample data: lora used" in summary_sentences(table_of(tmp_path))[0]


def test_later_is_by_the_end_of_a_run(tmp_path):
    first = record_of("lora", 0)
    longer = record_of("lora", 0, started=first.started, finished=first.finished + timedelta(1))
    write_run(tmp_path / "longer", longer, right_share(0.9, 1))
    write_run(tmp_path / "shorter", record_of("lora", 0), right_share(0.9, 2))
    (row,) = table_of(tmp_path).rows
    assert [run.folder.name for run in row.arm.runs] == ["longer"]
