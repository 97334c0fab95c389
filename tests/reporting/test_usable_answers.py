"""Which runs stand in the tests, and that what is said of a row is about these runs."""

import numpy as np
import pytest
from made_runs import LABELS, record_of, right_share, write_arm, write_run

from peftkit.reporting.comparison import compare, write_comparison
from peftkit.reporting.predictions import write_predictions
from peftkit.reporting.tables import choice_view, result_view
from peftkit.reporting.wording import summary_sentences


def table_of(folder):
    (table,) = compare([folder]).tables
    return table


def row_of(table, label):
    return next(row for row in table.rows if row.label == label)


def cell(table, label, header):
    view = result_view(table)
    row = next(row for row in view.rows if row[0].split()[0] == label)
    return row[view.headers.index(header)]


def text_of(table):
    return " ".join(summary_sentences(table))


def answer_all_with(folder, labels):
    """Predictions that are right about `labels`, and a record that says so."""
    columns = {"label": labels, "prediction": labels, "loss": np.full(len(labels), 0.1)}
    write_predictions(folder / "predictions.parquet", columns)


@pytest.fixture
def three_arms(tmp_path):
    write_arm(tmp_path, "full", 0.95)
    write_arm(tmp_path, "lora", 0.945)
    write_arm(tmp_path, "top", 0.60)
    return tmp_path


@pytest.mark.parametrize("labels", [LABELS[:-1], 1 - LABELS, LABELS[::-1]])
def test_one_bad_file_that_is_read_first_leaves_the_others_in_the_tests(three_arms, labels):
    answer_all_with(three_arms / "full-seed0", labels)
    comparison = compare([three_arms])
    (line,) = map(str, comparison.problems)
    assert line.startswith(str(three_arms / "full-seed0"))
    assert "it is in no test" in line
    assert len(comparison.tables[0].pairs) == 3


def test_the_labels_of_most_runs_count_where_all_agree_with_their_records(three_arms):
    """A run on other labels, right about all of them as its record says."""
    record = record_of("aaa", 0, predictions="predictions.parquet")
    scores = {"validation": {"accuracy": 1.0}}
    write_run(three_arms / "aaa", record.model_copy(update={"metrics": scores}))
    answer_all_with(three_arms / "aaa", LABELS[::-1])
    comparison = compare([three_arms])
    (line,) = map(str, comparison.problems)
    assert "its labels are not those of the other runs on this data" in line
    assert len(comparison.tables[0].pairs) == 3


def lose_predictions(folder, *runs):
    for run in runs:
        (folder / run / "predictions.parquet").unlink()


def test_a_row_of_which_one_seed_is_tested_speaks_of_that_seed(three_arms):
    whole = row_of(table_of(three_arms), "full").scores
    lose_predictions(three_arms, "full-seed1", "full-seed2")
    table = table_of(three_arms)
    row = row_of(table, "full")
    assert (row.score, row.scores, row.tested_seeds) == (sum(whole.values()) / 3, whole, (0,))
    assert cell(table, "full", "seeds") == "3, 1 tested"
    assert cell(table, "full", "95% seeds + examples").endswith("*")
    low, high = row.interval
    assert (low + high) / 2 == pytest.approx(whole[0])
    text = text_of(table)
    assert "One seed only for full" in text
    assert f"full: tests over 1 of 3 seeds (their mean is {whole[0]:.4f})" in text
    documents = {path.suffix: path.read_text() for path in written(three_arms)}
    assert "\\* one seed" in documents[".md"]
    assert "* One seed" in documents[".html"]


def written(folder):
    return write_comparison(compare([folder]), folder / "out")


def test_a_row_of_which_most_seeds_are_tested_says_so(three_arms):
    lose_predictions(three_arms, "lora-seed1")
    table = table_of(three_arms)
    row = row_of(table, "lora")
    assert row.score == pytest.approx(sum(row.scores.values()) / 3)
    assert cell(table, "lora", "seeds") == "3, 2 tested"
    assert "lora: tests over 2 of 3 seeds" in text_of(table)
    assert "One seed" not in text_of(table)


def test_a_row_of_which_no_seed_is_tested_shows_the_mean_of_all(three_arms):
    lose_predictions(three_arms, "top-seed0", "top-seed1", "top-seed2")
    table = table_of(three_arms)
    row = row_of(table, "top")
    assert row.score == pytest.approx(sum(row.scores.values()) / 3)
    assert row.seed_interval is not None
    assert row.interval is None
    assert cell(table, "top", "seeds") == "3, 0 tested"


def test_where_nothing_is_tested_the_seeds_are_those_with_a_score(three_arms):
    lose_predictions(three_arms, *(f"{a}-seed{s}" for a in ("full", "lora", "top") for s in "012"))
    table = table_of(three_arms)
    assert cell(table, "full", "seeds") == "3"


def test_being_ahead_by_one_seed_is_said_of_these_trained_models(three_arms):
    lose_predictions(three_arms, "full-seed1", "full-seed2")
    lead = summary_sentences(table_of(three_arms))[0]
    assert "these trained models are ahead of those of top" in lead
    assert "it is ahead of" not in lead


def test_being_ahead_by_more_seeds_is_told_apart_from_being_ahead_by_one(three_arms):
    write_arm(three_arms, "bottom", 0.55)
    lose_predictions(three_arms, "top-seed1", "top-seed2")
    lead = summary_sentences(table_of(three_arms))[0]
    assert "it is ahead of bottom (adjusted p at most <0.001)" in lead
    assert "these trained models are ahead of those of top (adjusted p at most <0.001)" in lead


def test_tests_that_point_the_other_way_than_the_means_make_no_arm_ahead(tmp_path):
    """The means put `full` first, the one seed of it that can be tested far behind."""
    write_arm(tmp_path, "full", 0.95)
    peaks = {"allocated_bytes": 100, "reserved_bytes": None, "resident_bytes": None}
    write_arm(tmp_path, "lora", 0.80, memory={"train_step": peaks})
    lose_predictions(tmp_path, "full-seed0", "full-seed1", "full-seed2")
    write_run(tmp_path / "full-seed3", record_of("full", 3), right_share(0.60, 3))
    table = table_of(tmp_path)
    assert [row.label for row in table.rows] == ["full", "lora"]
    assert all(row.in_best_group for row in table.rows)
    lead = summary_sentences(table)[0]
    assert "By the tested seeds alone lora (adjusted p at most <0.001) would be ahead" in lead
    assert "is ahead" not in lead
    assert "cannot be told apart" not in lead
    assert [row[-1] for row in choice_view(table).rows] == ["–", "no: behind by the tested seeds"]


def sure(table):
    return next(s for s in summary_sentences(table) if s.startswith("How sure"))


def test_one_seed_does_not_make_the_report_surer(three_arms):
    """The difference that could be seen is that of the pairs that know of seeds."""
    whole = table_of(three_arms)
    lose_predictions(three_arms, "top-seed1", "top-seed2")
    table = table_of(three_arms)
    (pair,) = [p for p in table.pairs if p.covers_seeds]
    assert f"a true difference in accuracy of {pair.detectable:.3f} would" in sure(table)
    assert "Tests with top are not in this: they speak of these trained models only" in sure(table)
    assert "not in this" not in sure(whole)


def test_with_one_seed_of_all_the_sureness_is_of_these_trained_models(tmp_path):
    write_arm(tmp_path, "full", 0.95, seeds=(0,))
    write_arm(tmp_path, "lora", 0.945, seeds=(0,))
    text = sure(table_of(tmp_path))
    assert text.startswith("How sure, of these trained models only: with 400 validation examples")
    assert "how much another seed would change is not known" in text
    assert "these seeds" not in text


def test_the_clearest_open_difference_says_whom_it_is_about(tmp_path):
    write_arm(tmp_path, "full", 0.95, seeds=(0,))
    write_arm(tmp_path, "lora", 0.945)
    text = sure(table_of(tmp_path))
    assert "these trained models only" in text.partition("Clearest among")[2]
