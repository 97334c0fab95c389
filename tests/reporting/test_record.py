import json
import math
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone

import pytest
import torch
from pydantic import ValidationError

from peftkit import staging
from peftkit.errors import RunError
from peftkit.reporting import environment
from peftkit.reporting.environment import (
    GitState,
    device_description,
    git_state,
    library_versions,
)
from peftkit.reporting.record import RunRecord, read_record, write_record
from peftkit.reporting.summary import summary_lines

DIGEST = "sha256:" + "a" * 64
STARTED = datetime(2026, 11, 23, 16, 0, tzinfo=UTC)
MIB = 2**20


def fields(**changes):
    values = {
        "name": "lora_sst2",
        "status": "completed",
        "error": None,
        "recipe": {"name": "lora_sst2", "training": {"learning_rate": 5e-4}},
        "recipe_digest": DIGEST,
        "seed": 1,
        "metrics": {"holdout": {"accuracy": 0.875}, "validation": {"accuracy": 0.9, "f1": 0.91}},
        "history": [{"epoch": 1, "step": 10, "loss": 0.7, "holdout": {"accuracy": 0.875}}],
        "memory": {
            "load": {
                "allocated_bytes": 90 * MIB,
                "reserved_bytes": None,
                "resident_bytes": 512 * MIB,
            },
        },
        "seconds": {
            "load": 1.0,
            "tokenise": 2.0,
            "train": 30.25,
            "train_cpu": 29.5,
            "eval": 4.0,
            "metered": 0.5,
        },
        "examples_per_second": 100.0,
        "tokens_per_second": 2345.6,
        "optimizer_steps": 10,
        "trainable_parameters": 1000,
        "total_parameters": 100_000,
        "delta_bytes": 3 * MIB,
        "delta": "sst2-lora@v1",
        "digests": {
            "base": DIGEST,
            "data_train": DIGEST,
            "data_validation": DIGEST,
            "recipe": DIGEST,
        },
        "learning_rates_tried": [5e-4],
        "libraries": {"torch": "2.13.0"},
        "device": "CPU",
        "processes": 1,
        "mixed_precision": "no",
        "distributed_type": "NO",
        "git_commit": None,
        "git_dirty": None,
        "predictions": "predictions.parquet",
        "stand_in": False,
        "origins": {"base": "package", "data": "mirror"},
        "started": STARTED,
        "finished": STARTED + timedelta(seconds=60),
    }
    return values | changes


def record(**changes) -> RunRecord:
    return RunRecord(**fields(**changes))


def written(tmp_path, edit=None):
    path = tmp_path / "record.json"
    write_record(path, record())
    if edit is not None:
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
    return path


def problems_of(path) -> list[str]:
    with pytest.raises(RunError) as caught:
        read_record(path)
    return caught.value.problems


def test_a_record_reads_back_equal(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, record())
    assert read_record(path) == record()
    assert json.loads(path.read_text())["started"] == "2026-11-23T16:00:00Z"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_null_in_the_file_and_nan_once_read(tmp_path, value):
    path = tmp_path / "record.json"
    history = [{"step": 1, "loss": value, "holdout": {"f1": value}}]
    made = record(metrics={"validation": {"f1": value}}, history=history)
    assert math.isnan(made.metrics["validation"]["f1"])
    write_record(path, made)
    content = json.loads(path.read_text())
    assert content["metrics"]["validation"]["f1"] is None
    assert content["history"] == [{"step": 1, "loss": None, "holdout": {"f1": None}}]
    read = read_record(path)
    assert math.isnan(read.metrics["validation"]["f1"])
    assert math.isnan(read.history[0]["loss"])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"examples_per_second": math.nan}, "examples_per_second"),
        ({"learning_rates_tried": [math.inf]}, "learning_rates_tried.0"),
        ({"recipe": {"training": {"learning_rate": math.nan}}}, "recipe"),
        ({"recipe": {"path": STARTED}}, "recipe"),
        ({"status": "done"}, "status"),
        ({"seed": "1"}, "seed"),
        ({"optimizer_steps": -1}, "optimizer_steps"),
        ({"recipe_digest": "aaaa"}, "recipe_digest"),
        ({"metrics": {"train": {"accuracy": 1.0}}}, "metrics.train.[key]"),
        ({"history": [{"step": 1, "loss": 0.1, "holdout": {}, "lr": 1}]}, "history.0.lr"),
        ({"started": datetime(2026, 11, 23)}, "started"),
        ({"predictions": "/predictions.parquet"}, "predictions"),
        ({"predictions": "../predictions.parquet"}, "predictions"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_value_outside_the_schema_is_refused(changes, key):
    with pytest.raises(ValidationError) as caught:
        record(**changes)
    assert {".".join(map(str, e["loc"])) for e in caught.value.errors()} == {key}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"recipe_digest": "sha256:" + "b" * 64},
            "recipe_digest differs from digests.recipe",
        ),
        (
            {"origins": {"base": "hub", "data": "sample"}},
            "stand_in must be true when origins name a sample",
        ),
        ({"error": "out of luck"}, "a completed run has no error"),
        (
            {"started": STARTED.astimezone(timezone(timedelta(hours=1)))},
            "started and finished must be UTC",
        ),
    ],
)
def test_parts_that_disagree_are_refused(changes, message):
    with pytest.raises(ValidationError) as caught:
        record(**changes)
    assert [e["msg"] for e in caught.value.errors()] == [f"Value error, {message}"]


def test_a_record_cannot_be_changed():
    with pytest.raises(ValidationError):
        record().status = "failed"


def test_a_run_that_got_nowhere_still_has_a_record(tmp_path):
    nothing = dict.fromkeys(("load", "tokenise", "train", "train_cpu", "eval", "metered"))
    early = record(
        status="out_of_memory",
        error="no memory for the base",
        metrics={},
        history=[],
        memory={},
        seconds=nothing,
        digests={"base": None, "data_train": None, "data_validation": None, "recipe": DIGEST},
        origins={"base": None, "data": None},
        **dict.fromkeys(
            (
                "examples_per_second",
                "tokens_per_second",
                "trainable_parameters",
                "total_parameters",
                "delta_bytes",
                "delta",
                "predictions",
            )
        ),
    )
    write_record(tmp_path / "record.json", early)
    assert read_record(tmp_path / "record.json") == early
    assert summary_lines(early) == [
        "lora_sst2 (seed 1): out of memory",
        "Error: no memory for the base",
        "Seconds: load -, tokenise -, train -, train cpu -, eval -, metered -",
        "Throughput: not measured",
        "Trainable parameters: not counted",
        "Delta: none saved",
    ]


def test_a_write_that_fails_leaves_the_old_record(tmp_path, monkeypatch):
    path = written(tmp_path)

    def fail(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(staging.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_record(path, record(seed=2))
    assert read_record(path).seed == 1
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_an_absent_record_is_named(tmp_path):
    path = tmp_path / "record.json"
    assert problems_of(path) == [
        f"{path}: cannot be read as a run record: No such file or directory"
    ]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_record_is_refused(tmp_path, share):
    path = written(tmp_path)
    whole = path.read_bytes().rstrip()
    path.write_bytes(whole[: int(len(whole) * share)])
    (line,) = problems_of(path)
    assert line.startswith(f"{path}: not a whole JSON document (")
    assert line.endswith("); restore it or run the experiment again")


def test_bytes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "record.json"
    path.write_bytes(b"\xff\x00\xff")
    assert len(problems_of(path)) == 1


def test_nan_literals_in_the_file_are_refused(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text().replace("30.25", "NaN"))
    assert problems_of(path) == [
        f"{path}: not a whole JSON document (NaN is not JSON); "
        "restore it or run the experiment again"
    ]


def test_a_list_is_not_a_record(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("[]")
    assert problems_of(path) == [f"{path}: found list, a run record is a JSON object"]


def test_a_newer_schema_is_refused_before_its_fields_are_judged(tmp_path):
    path = written(tmp_path, lambda c: c.update(schema_version=2, galaxy=1))
    assert problems_of(path) == [
        f"{path}: schema_version: found 2, this peftkit reads up to 1; upgrade peftkit to read it"
    ]


def test_a_file_without_a_schema_version_is_refused(tmp_path):
    path = written(tmp_path, lambda c: c.pop("schema_version"))
    assert problems_of(path) == [f"{path}: schema_version: missing; this is not a run record"]


def test_every_problem_of_a_record_is_listed_at_once(tmp_path):
    def edit(content):
        del content["seed"], content["seconds"]["train"]
        content["galaxy"] = 1
        content["processes"] = 0

    path = written(tmp_path, edit)
    assert sorted(problems_of(path)) == [
        f"{path}: galaxy: unknown field",
        f"{path}: processes: found '0'; input should be greater than or equal to 1",
        f"{path}: seconds.train: missing",
        f"{path}: seed: missing",
    ]


def test_every_field_is_required_in_a_file(tmp_path):
    # Records from before these can be read.
    later = {"resumed_after_step", "weights_from_step", "predicted_allocated_bytes", "train_batch"}
    for name in RunRecord.model_fields.keys() - later:
        path = written(tmp_path, lambda c, name=name: c.pop(name))
        assert any(f"{name}: missing" in line for line in problems_of(path))


def test_the_summary_says_what_a_run_cost_and_scored():
    scores = {"accuracy": 0.9, "f1": math.nan}
    assert summary_lines(record(metrics={"validation": scores})) == [
        "lora_sst2 (seed 1): completed",
        "Validation: accuracy 0.9000, f1 not finite",
        "Seconds: load 1.0, tokenise 2.0, train 30.2, train cpu 29.5, eval 4.0, metered 0.5",
        "Throughput: 100.0 examples/s, 2346 tokens/s without padding",
        "Peak memory in load: allocated 90.0 MiB, reserved not measured, resident 512.0 MiB",
        "Trainable parameters: 1,000 of 100,000 (1.00%)",
        "Delta: sst2-lora@v1, 3.0 MiB",
    ]


def test_the_summary_says_when_the_data_are_a_sample():
    sample = record(stand_in=True, origins={"base": "package", "data": "sample"})
    assert summary_lines(sample)[-1] == "Data: peftkit's own sample, not the real data set"
    assert not any("sample" in line for line in summary_lines(record()))


def test_records_are_read_without_torch():
    code = "import sys, peftkit.reporting.record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_library_versions_name_what_is_installed(monkeypatch):
    monkeypatch.setattr(environment, "LIBRARIES", ("numpy", "no-such-library"))
    assert set(library_versions()) == {"python", "numpy"}


def test_the_cpu_is_described_with_its_cores_and_threads():
    text = device_description(torch.device("cpu"))
    assert text.endswith(f", {os.cpu_count()} cores, {torch.get_num_threads()} threads")


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, env=clean, check=True, capture_output=True
    )
    return done.stdout.decode().strip()


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "file.txt").write_text("one")
    git(tmp_path, "add", "file.txt")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_git_state_follows_tracked_files(repository):
    commit = git(repository, "rev-parse", "HEAD")
    (repository / "untracked.txt").write_text("runs")
    assert git_state(repository) == GitState(commit, False)
    (repository / "file.txt").write_text("two")
    assert git_state(repository) == GitState(commit, True)


def test_git_state_ignores_the_repository_of_a_hook(repository, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    assert git_state(other) == GitState(None, None)


def test_git_state_is_unknown_without_a_repository_a_commit_a_folder_or_git(tmp_path, monkeypatch):
    assert git_state(tmp_path) == GitState(None, None)
    assert git_state(tmp_path / "absent") == GitState(None, None)
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == GitState(None, None)
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == GitState(None, None)
