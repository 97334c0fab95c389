"""`peftkit report`: what it prints, what it writes, and how it ends."""

import json
import time

import pytest
from made_runs import record_of, write_arm, write_run

from peftkit.cli import main
from peftkit.reporting.record import read_record, write_record

RECORDS = 1000
PAGE_BYTES = 2_000_000


@pytest.fixture
def runs(tmp_path):
    write_arm(tmp_path / "runs", "lora", 0.90)
    write_arm(tmp_path / "runs", "full", 0.91)
    return tmp_path / "runs"


def test_the_table_and_the_summary_go_to_stdout_and_the_paths_to_stderr(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["report", str(runs), "--out", str(out)]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0] == "glue sst2 validation: accuracy"
    assert lines[1].split()[0] == "method"
    assert {line.split()[0] for line in lines[2:4]} == {"lora", "full"}
    assert "best mean accuracy" in lines[4]
    endings = ("json", "csv", "md", "html")
    assert shown.err.splitlines() == [str(out / f"comparison.{ending}") for ending in endings]


def test_json_is_the_document_that_is_written(runs, tmp_path, capsys):
    assert main(["report", str(runs), "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "comparison.json").read_text())


def test_the_default_folder_is_comparison(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs"]) == 0
    assert (tmp_path / "comparison" / "comparison.html").is_file()


def test_what_cannot_be_read_is_a_line_and_exit_1_and_the_rest_is_written(runs, tmp_path, capsys):
    write_run(runs / "bad", record_of("lora", 7))
    (runs / "bad" / "record.json").write_text("{")
    assert main(["report", str(runs), "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines()[0].startswith(f"{runs / 'bad' / 'record.json'}: not a whole JSON")
    assert "Traceback" not in shown.err
    assert "lora" in shown.out
    assert (tmp_path / "out" / "comparison.html").is_file()


def test_a_folder_that_cannot_be_written_is_one_line(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["report", str(runs), "--out", str(tmp_path / "file")]) == 1
    assert "cannot be written" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("price", ["-1", "nan", "inf", "-inf", "1e300", "x"])
def test_a_price_that_is_no_amount_of_money_is_refused(runs, price, capsys):
    assert main(["report", str(runs), f"--price-per-hour={price}"]) == 2
    shown = capsys.readouterr().err
    assert "--price-per-hour" in shown
    assert "unexpected" not in shown


def test_a_report_of_nothing_is_wrong_usage():
    assert main(["report"]) == 2


def test_a_record_stands_for_its_folder(runs, tmp_path, capsys):
    record = runs / "lora-seed0" / "record.json"
    assert main(["report", str(record), "--out", str(tmp_path / "out")]) == 0
    assert "lora" in capsys.readouterr().out


def test_another_file_is_told_from_a_missing_folder(runs, tmp_path, capsys):
    file = runs / "lora-seed0" / "predictions.parquet"
    assert main(["report", str(file), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.splitlines()[0]
    assert said == f"{file}: is no folder; name that of a run or one above it"


@pytest.fixture
def thousand(tmp_path):
    """Records of 400 recipes, some of them tested."""
    root = tmp_path / "many"
    template = record_of("lora", 0)
    for number in range(RECORDS - 30):
        arm, seed = divmod(number, 3)
        name = f"lora_{arm:03d}"
        recipe = template.recipe | {"name": name, "seed": seed}
        change = {"name": name, "recipe": recipe, "seed": seed}
        folder = root / f"run{number}"
        folder.mkdir(parents=True)
        write_record(folder / "record.json", template.model_copy(update=change))
    for number in range(10):
        write_arm(root, f"tested_{number}", 0.85 + 0.01 * number)
    assert len(list(root.rglob("record.json"))) == RECORDS
    assert read_record(root / "run0" / "record.json").name == "lora_000"
    return root


def test_a_thousand_records_take_under_five_seconds_and_two_megabytes(thousand, tmp_path):
    started = time.process_time()
    assert main(["report", str(thousand), "--out", str(tmp_path / "out")]) == 0
    # Processor time: what else the machine does is no property of the report.
    assert time.process_time() - started < 5
    assert (tmp_path / "out" / "comparison.html").stat().st_size < PAGE_BYTES
