"""A whole run: what it leaves behind, however it ends."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate import tracking
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertForSequenceClassification

from peftkit import experiment, plugins
from peftkit.data import hub
from peftkit.errors import Interrupted, NonFiniteError, RunError, UsageError
from peftkit.experiment import run_experiment
from peftkit.modeling.parameters import trainable_parameters
from peftkit.recipe import from_resolved, resolved_yaml
from peftkit.registry import Registry
from peftkit.reporting.record import read_record
from peftkit.reporting.summary import summary_lines
from peftkit.tasks.classification import Classification
from peftkit.training.checkpoints import CheckpointFolder
from peftkit.training.evaluation import Evaluator
from peftkit.training.loop import Trainer

RUN = Path(__file__).parents[1] / "peftkit" / "run.py"
FOLDER = Path("runs/tiny-seed0")


METHODS = {
    "full": {"type": "full"},
    "top_layers": {"type": "top_layers", "num_layers": 1},
    "lora": {"type": "lora", "lora_dropout": 0.1},
    "qlora": {"type": "qlora", "lora_dropout": 0.1},
}
EACH_METHOD = pytest.mark.parametrize(
    "method",
    ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "lora")],
)


class Crash(BaseException):
    pass


@pytest.fixture(autouse=True)
def _no_prediction(monkeypatch):
    """They take a second a run and have tests of their own in tests/planning."""
    for name in ("foresee", "fitting_batch"):
        monkeypatch.setattr(experiment, name, lambda *arguments: None)


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


@pytest.fixture
def recipe(tiny_recipe, workplace):
    """The tiny recipe with changes of its training section; `method` replaces the method."""

    def recipe(method=None, seed=0, name="tiny", **training):
        training = {**tiny_recipe["training"], "logging_steps": 1, **training}
        content = {**tiny_recipe, "seed": seed, "name": name, "training": training}
        content["task"] = {**content["task"], "max_length": 64}
        return from_resolved(content | ({"method": method} if method else {}))

    return recipe


def delta_bytes(name="tiny", version="v1"):
    """Content of the stored tensors."""
    folder = Path(os.environ["PEFTKIT_REGISTRY"])
    found = sorted((folder / "deltas" / f"{name}@{version}").glob("*.safetensors"))
    assert found, sorted(folder.rglob("*"))
    return [path.read_bytes() for path in found]


def die_in_step(monkeypatch, step, error=Crash):
    """Make training raise in step number `step`; returns what takes that back."""
    real = Trainer._step

    def dying(self, batches):
        if self.state.step + 1 == step:
            raise error() if isinstance(error, type) else error
        return real(self, batches)

    monkeypatch.setattr(Trainer, "_step", dying)
    return lambda: monkeypatch.setattr(Trainer, "_step", real)


def test_completed_run_leaves_everything_and_says_nothing_on_stdout(recipe, capfd):
    record = run_experiment(recipe())
    out, err = capfd.readouterr()
    assert out == ""
    assert "base: " in err
    assert "training " in err
    assert "step 22/22  " in err
    left = sorted(path.name for path in FOLDER.iterdir())
    assert left == ["log.jsonl", "predictions.parquet", "recipe.yaml", "record.json"]
    assert read_record(FOLDER / "record.json") == record
    assert (record.status, record.error, record.optimizer_steps) == ("completed", None, 22)
    assert [row["step"] for row in record.history] == [11, 22]
    assert record.delta == "tiny@v1"
    assert delta_bytes()


def test_the_record_says_what_the_run_was(recipe):
    made = recipe()
    record = run_experiment(made)
    task = plugins.load("tasks", "classification")(made.task)
    data = task.load(AutoTokenizer.from_pretrained(made.base.name), seed=0)
    digests = record.digests
    assert (digests.data_train, digests.data_validation) == (
        data.train.digest,
        data.validation.digest,
    )
    tokens_each = record.tokens_per_second / record.examples_per_second
    assert 2 < min(data.train.lengths) < tokens_each < max(data.train.lengths)
    counted = {name: peaks.allocated_bytes > 0 for name, peaks in record.memory.items()}
    assert counted == dict.fromkeys(("load", "train_step", "eval"), True)
    files = Path(os.environ["PEFTKIT_REGISTRY"], "deltas", "tiny@v1").glob("*.safetensors")
    assert record.delta_bytes == sum(file.stat().st_size for file in files)
    predicted = pq.read_table(FOLDER / record.predictions).to_pylist()
    assert [row["label"] for row in predicted] == [row["label"] for row in data.validation.rows]
    assert record.resumed_after_step is None


def watch(monkeypatch, look):
    """What `look` finds in the model before each step."""
    seen, real = [], Trainer._step

    def watched(self, batches):
        seen.append(look(self.job.model))
        return real(self, batches)

    monkeypatch.setattr(Trainer, "_step", watched)
    return seen


TOP = {"type": "top_layers", "num_layers": 1}


def test_frozen_blocks_stay_without_dropout_in_every_step(recipe, monkeypatch):
    def modes(model):
        parts = (model, model.bert.embeddings, model.bert.encoder.layer[0])
        return tuple(part.training for part in parts)

    seen = watch(monkeypatch, modes)
    run_experiment(recipe(TOP, eval_steps=1, max_steps=3))
    assert seen == [(True, False, False)] * 3


def test_a_bf16_run_holds_what_is_frozen_in_bf16_and_trains_in_float32(recipe, monkeypatch):
    def held(model):
        return {(p.requires_grad, p.dtype) for p in model.parameters() if p.ndim > 1}

    seen = watch(monkeypatch, held)
    run_experiment(recipe(TOP, mixed_precision="bf16", max_steps=1))
    assert seen == [{(True, torch.float32), (False, torch.bfloat16)}]


def test_dropout_of_the_recipe_reaches_the_model(recipe, monkeypatch):
    def probabilities(model):
        return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}

    seen = watch(monkeypatch, probabilities)
    run_experiment(recipe(dropout=0.3, max_steps=1))
    assert seen == [{0.3}]


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_recomputed_when_asked(recipe, monkeypatch, recompute):
    calls, real = [], Trainer._step

    def counted(self, batches):
        attention = self.job.model.bert.encoder.layer[0].attention
        hook = attention.register_forward_hook(lambda *_: calls.append(1))
        result = real(self, batches)
        hook.remove()
        return result

    monkeypatch.setattr(Trainer, "_step", counted)
    run_experiment(recipe(gradient_checkpointing=recompute, max_steps=1))
    assert len(calls) == 1 + recompute


def test_holdout_selects_and_validation_is_scored_once_at_the_end(recipe, monkeypatch):
    calls, real = [], Evaluator.evaluate

    def counted(self, model, task, split):
        calls.append((split.name, len(split.rows)))
        return real(self, model, task, split)

    monkeypatch.setattr(Evaluator, "evaluate", counted)
    record = run_experiment(recipe(num_train_epochs=3.0))
    names = [name for name, _ in calls]
    assert names == ["holdout"] * 3 + ["validation"]
    assert calls[-1][1] == 33
    best = max(record.history, key=lambda row: row["holdout"]["accuracy"])
    assert record.metrics["holdout"] == best["holdout"]


@EACH_METHOD
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(recipe, method):
    section = METHODS[method]
    run_experiment(recipe(section, dropout=0.2))
    workers = {"on_exists": "overwrite"}
    run_experiment(recipe(section, dropout=0.2, dataloader_num_workers=2), **workers)
    run_experiment(recipe(section, dropout=0.2, seed=1))
    assert delta_bytes(version="v1") == delta_bytes(version="v2") != delta_bytes(version="v3")


@EACH_METHOD
def test_recomputing_activations_changes_no_loss(recipe, method):
    losses = []
    for recompute in (False, True):
        changes = {"gradient_checkpointing": recompute, "max_steps": 6, "dropout": 0.2}
        run_experiment(recipe(METHODS[method], **changes), on_exists="overwrite")
        rows = [json.loads(line) for line in (FOLDER / "log.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert len(losses[0]) == 6
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= 1e-6


def no_memory_on_cpu(*_, **__):
    torch.empty(2**55)


@pytest.mark.parametrize("how", ["python", "torch"])
def test_out_of_memory_leaves_a_record_and_an_advice(recipe, monkeypatch, how):
    if how == "python":
        die_in_step(monkeypatch, 3, MemoryError)
    else:
        monkeypatch.setattr(Trainer, "_step", no_memory_on_cpu)
    with pytest.raises(RunError) as raised:
        run_experiment(recipe())
    assert str(raised.value) == (
        "out of memory; halve training.per_device_train_batch_size (8) and double "
        "training.gradient_accumulation_steps, which changes nothing else "
        "(training.auto_batch_size: true does both), or set training.gradient_checkpointing: true"
    )
    record = read_record(FOLDER / "record.json")
    assert record.status == "out_of_memory"
    if how == "python":
        assert (record.error, record.optimizer_steps) == ("MemoryError", 2)
    else:
        assert "can't allocate memory" in record.error
    assert record.delta is None
    assert record.total_parameters > 0


def test_advice_does_not_repeat_what_is_on(recipe, monkeypatch):
    die_in_step(monkeypatch, 1, MemoryError)
    advice = []
    for size in (8, 9):
        sizes = {"per_device_train_batch_size": size, "gradient_checkpointing": True}
        with pytest.raises(RunError) as raised:
            run_experiment(recipe(auto_batch_size=True, **sizes), on_exists="overwrite")
        advice.append(str(raised.value))
    assert advice == [
        "out of memory; halve training.per_device_train_batch_size (8) and double "
        "training.gradient_accumulation_steps, which changes nothing else",
        "out of memory; training.auto_batch_size got as far as 9, which is odd; "
        "take a smaller base",
    ]


def used(record):
    batch = record.train_batch
    return batch.per_device_train_batch_size, batch.gradient_accumulation_steps, batch.found


def no_memory_above(monkeypatch, most, model=BertForSequenceClassification):
    real = model.forward

    def forward(self, *args, **kwargs):
        if self.training and len(kwargs["input_ids"]) > most:
            raise MemoryError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)


@pytest.mark.slow
def test_a_batch_that_was_found_is_in_the_record_beside_the_recipe(recipe, monkeypatch):
    asked = run_experiment(recipe(per_device_train_batch_size=2, gradient_accumulation_steps=4))
    log = (FOLDER / "log.jsonl").read_text()
    no_memory_above(monkeypatch, 3)
    found = run_experiment(recipe(auto_batch_size=True), on_exists="overwrite")
    assert (used(asked), used(found)) == ((2, 4, False), (2, 4, True))
    assert found.recipe["training"]["per_device_train_batch_size"] == 8
    assert (FOLDER / "log.jsonl").read_text() == log
    assert delta_bytes(version="v1") == delta_bytes(version="v2")


def test_a_run_that_reached_no_step_used_no_batch(recipe, monkeypatch):
    monkeypatch.setattr(experiment, "load_model", no_memory_on_cpu)
    with pytest.raises(RunError):
        run_experiment(recipe())
    assert read_record(FOLDER / "record.json").train_batch is None


def test_a_tracker_without_its_package_is_refused_before_anything_is_touched(recipe, monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    monkeypatch.setattr(experiment, "start_accelerator", None)
    with pytest.raises(UsageError, match=r"training.report_to: 'mlflow' needs the package mlflow"):
        run_experiment(recipe(report_to=["mlflow"]))
    assert not Path("runs").exists()


def test_a_broken_tracker_changes_nothing_of_a_run(recipe, monkeypatch, capfd):
    class Broken(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "wandb", False, None

        def __init__(self, run_name, **arguments):
            super().__init__()

        def log(self, values, step):
            seen.append((step, values))
            torch.rand(1)
            if "validation_accuracy" in values:
                raise ConnectionError("nobody answers")

    seen = []
    monkeypatch.setattr(tracking, "_available_trackers", ["wandb"])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Broken)
    settings = {"dropout": 0.2, "max_steps": 3}
    plain = run_experiment(recipe(**settings))
    tracked = run_experiment(recipe(report_to=["wandb"], **settings), on_exists="overwrite")
    assert [step for step, _ in seen] == [1, 2, 3, 3, 3]
    assert "the tracker wandb failed in logging step 3 (Conn" in capfd.readouterr().err
    assert (plain.metrics, plain.history) == (tracked.metrics, tracked.history)
    assert delta_bytes(version="v1") == delta_bytes(version="v2")
    assert plain.recipe_digest == tracked.recipe_digest


@pytest.mark.parametrize(
    ("where", "advice"),
    [
        (
            (Evaluator, "_batch"),
            "out of memory while scoring; halve training.per_device_eval_batch_size (64), "
            "which changes no score",
        ),
        (
            (experiment, "load_model"),
            "out of memory before training; take a smaller base, or method.type: qlora",
        ),
    ],
)
def test_the_advice_is_for_where_memory_ran_out(recipe, monkeypatch, where, advice):
    monkeypatch.setattr(*where, no_memory_on_cpu)
    with pytest.raises(RunError) as raised:
        run_experiment(recipe(max_steps=1))
    assert str(raised.value) == advice


def test_predictions_that_could_not_be_written_are_not_named(recipe, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(experiment, "write_predictions", full)
    with pytest.raises(OSError, match="No space left"):
        run_experiment(recipe(max_steps=1))
    record = read_record(FOLDER / "record.json")
    assert (record.status, record.predictions) == ("failed", None)
    assert "validation" in record.metrics


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KeyError("surprise"), "failed", "KeyError: 'surprise'"),
        (RuntimeError("first\nsecond"), "failed", "RuntimeError: first"),
        (NonFiniteError("step 3: loss nan"), "non_finite", "step 3: loss nan"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (Interrupted(signal.SIGINT), "interrupted", "stopped by SIGINT"),
        (Interrupted(signal.SIGTERM), "terminated", "stopped by SIGTERM"),
    ],
)
def test_however_it_ends_there_is_a_record_and_the_error_goes_on(
    recipe, monkeypatch, error, status, text
):
    die_in_step(monkeypatch, 3, error)
    with pytest.raises(type(error)) as raised:
        run_experiment(recipe())
    assert raised.value is error
    record = read_record(FOLDER / "record.json")
    assert (record.status, record.error, record.optimizer_steps) == (status, text, 2)
    assert record.digests.base is not None
    assert not Path(os.environ["PEFTKIT_REGISTRY"]).exists()


@EACH_METHOD
def test_nan_in_a_weight_is_non_finite_and_keeps_the_checkpoint(recipe, monkeypatch, method):
    real = Trainer._step

    def poisoned(self, batches):
        if self.state.step == 12:
            with torch.no_grad():
                next(p for p in self.job.model.parameters() if p.requires_grad)[:] = torch.nan
        return real(self, batches)

    monkeypatch.setattr(Trainer, "_step", poisoned)
    with pytest.raises(NonFiniteError, match=r"^step 13: loss nan, .*; train rows \d+, "):
        run_experiment(recipe(METHODS[method]))
    assert not Path(os.environ["PEFTKIT_REGISTRY"]).exists()
    assert read_record(FOLDER / "record.json").status == "non_finite"
    newest = CheckpointFolder(FOLDER / "checkpoints").newest()
    assert newest.state["step"] == 11
    assert all(tensor.isfinite().all() for tensor in newest.trained.values())


@EACH_METHOD
def test_the_stored_delta_is_that_of_the_first_best_evaluation(recipe, monkeypatch, method):
    """Scripted scores with a tie and a NaN, and the run is taken up after the best of them."""
    script = {2: math.nan, 4: 0.5, 6: 0.7, 8: 0.7, 10: math.nan, 12: 0.2}
    seen, real, metrics = {}, Trainer._evaluate, Classification.metrics

    def noted(self, holdout):
        noted.step = self.state.step
        trained = trainable_parameters(self.job.model).values()
        seen[noted.step] = [parameter.detach().clone() for parameter in trained]
        return real(self, holdout)

    def scripted(self, columns):
        found = metrics(self, columns)
        return found | {"accuracy": script.get(noted.step, 0.0)}

    monkeypatch.setattr(Trainer, "_evaluate", noted)
    monkeypatch.setattr(Classification, "metrics", scripted)
    settings = {"eval_steps": 2, "save_steps": 3, "max_steps": 12, "dropout": 0.2}
    mend = die_in_step(monkeypatch, 11)
    with pytest.raises(Crash):
        run_experiment(recipe(METHODS[method], **settings))
    mend()
    record = run_experiment(recipe(METHODS[method], **settings), on_exists="resume")
    assert record.metrics["holdout"]["accuracy"] == 0.7
    stored = Registry(Path(os.environ["PEFTKIT_REGISTRY"]))
    tensors = list(stored.read_delta(stored.find("tiny")).tensors.values())

    def holds(step):
        return all(any(torch.equal(parameter, t) for t in tensors) for parameter in seen[step])

    assert [step for step in script if holds(step)] == [6]


def test_weights_alone_go_on_under_another_recipe_and_the_record_says_so(recipe, monkeypatch):
    mend = die_in_step(monkeypatch, 15)
    with pytest.raises(Crash):
        run_experiment(recipe())
    mend()
    other = recipe(learning_rate=1e-4, max_steps=4)
    with pytest.raises(RunError, match="--resume-weights-only begins anew with its weights"):
        run_experiment(other, on_exists="resume")
    record = run_experiment(other, on_exists="resume-weights-only")
    assert (record.weights_from_step, record.resumed_after_step) == (11, None)
    assert (record.optimizer_steps, record.status) == (4, "completed")
    assert (FOLDER / "recipe.yaml").read_text() == resolved_yaml(other)
    steps = [json.loads(line)["step"] for line in (FOLDER / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4]
    assert "Began with weights of a training before: step 11" in summary_lines(record)


def test_weights_of_another_method_are_refused_and_the_run_can_go_on(recipe, monkeypatch):
    mend = die_in_step(monkeypatch, 15)
    with pytest.raises(Crash):
        run_experiment(recipe())
    mend()
    with pytest.raises(RunError, match="trained parameters differ"):
        run_experiment(recipe(TOP), on_exists="resume-weights-only")
    assert run_experiment(recipe(), on_exists="resume").resumed_after_step == 11


def test_a_checkpoint_of_another_recipe_is_refused_whatever_the_folder_says(recipe, monkeypatch):
    mend = die_in_step(monkeypatch, 15)
    with pytest.raises(Crash):
        run_experiment(recipe())
    mend()
    other = recipe(weight_decay=0.5)
    (FOLDER / "recipe.yaml").write_text(resolved_yaml(other))
    with pytest.raises(RunError) as raised:
        run_experiment(other, on_exists="resume")
    assert raised.value.problems == [
        "--resume: recipe.training.weight_decay: then 0.01, now 0.5",
        f"{FOLDER}/checkpoints: --resume-weights-only begins anew with its weights, "
        "--overwrite without them",
    ]


def test_a_record_that_cannot_be_written_hides_no_error(recipe, monkeypatch, capfd):
    die_in_step(monkeypatch, 3, NonFiniteError("step 3: loss nan"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(experiment, "write_record", full)
    with pytest.raises(NonFiniteError):
        run_experiment(recipe())
    said = capfd.readouterr().err.splitlines()[-1]
    assert said == "the record cannot be written either: No space left on device"


def test_a_base_that_is_not_there_leaves_a_record_too(recipe, tiny_recipe):
    tiny_recipe["base"] = {"name": "nowhere/at-all"}
    with pytest.raises(Exception, match="nowhere/at-all"):
        run_experiment(recipe())
    record = read_record(FOLDER / "record.json")
    assert (record.status, record.optimizer_steps, record.metrics) == ("failed", 0, {})


def test_a_complete_run_is_not_resumed(recipe):
    run_experiment(recipe(max_steps=1))
    before = (FOLDER / "record.json").read_bytes()
    with pytest.raises(RunError) as raised:
        run_experiment(recipe(max_steps=1), on_exists="resume")
    assert str(raised.value) == (
        f"{FOLDER}: the run is complete, nothing is left to resume; add --overwrite"
    )
    assert (FOLDER / "record.json").read_bytes() == before


def test_a_run_is_not_resumed_on_another_base_or_other_data(recipe, tiny_recipe, monkeypatch):
    mend = die_in_step(monkeypatch, 15)
    with pytest.raises(Crash):
        run_experiment(recipe())
    mend()
    record = (FOLDER / "record.json").read_bytes()
    base, data = Path(tiny_recipe["base"]["name"]), Path(tiny_recipe["task"]["dataset"])
    tensors = load_file(base / "model.safetensors")
    before = {"weights": (base / "model.safetensors").read_bytes()}
    before["rows"] = (data / "train.jsonl").read_bytes()
    next(iter(tensors.values()))[0] += 1
    try:
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        (data / "train.jsonl").write_bytes(before["rows"].replace(b"awful", b"great"))
        with pytest.raises(RunError) as raised:
            run_experiment(recipe(), on_exists="resume")
    finally:
        (base / "model.safetensors").write_bytes(before["weights"])
        (data / "train.jsonl").write_bytes(before["rows"])
    assert (FOLDER / "record.json").read_bytes() == record
    *found, _advice = raised.value.problems
    named = ("base", "holdout data", "train data")
    expected = [f'--resume: {name}: then "sha256:' for name in named]
    assert [p[: len(e)] for p, e in zip(found, expected, strict=True)] == expected
    assert run_experiment(recipe(), on_exists="resume").resumed_after_step == 11


def test_a_signal_while_the_hub_is_asked_ends_the_run(recipe, tiny_recipe, monkeypatch):
    import huggingface_hub

    tiny_recipe["task"] |= {"dataset": "org/real", "offline": "sample:reviews"}
    asked = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", asked)
    monkeypatch.setattr(hub, "_hub_obstacle", lambda: None)
    with pytest.raises(Interrupted, match=r"^stopped by SIGINT$"):
        run_experiment(recipe(max_steps=1))
    record = read_record(FOLDER / "record.json")
    assert (record.status, record.stand_in, record.origins.data) == ("interrupted", False, None)


@pytest.fixture
def signal_while_the_record_is_written(monkeypatch):
    """Each record of this process is written only after SIGTERM has come (once more)."""
    real = experiment.write_record

    def write(path, record):
        now = time.monotonic()
        for late in (0, 10):
            with monkeypatch.context() as patched:
                patched.setattr(time, "monotonic", lambda at=now + late: at)
                os.kill(os.getpid(), signal.SIGTERM)
        real(path, record)

    def unheeded(*_):
        raise AssertionError("the signal came through")

    monkeypatch.setattr(experiment, "write_record", write)
    before = signal.signal(signal.SIGTERM, unheeded)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("signal_while_the_record_is_written")
@pytest.mark.parametrize(
    ("error", "status"), [(Interrupted(signal.SIGTERM), "terminated"), (ValueError(), "failed")]
)
def test_a_signal_does_not_cost_a_failed_run_its_record(recipe, monkeypatch, error, status):
    def die(_):
        if isinstance(error, Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
        raise error

    monkeypatch.setattr(experiment, "resolve_base", die)
    with pytest.raises(type(error)):
        run_experiment(recipe())
    assert read_record(FOLDER / "record.json").status == status


@pytest.mark.usefixtures("signal_while_the_record_is_written")
def test_a_run_that_is_complete_is_stopped_by_no_signal(recipe):
    assert run_experiment(recipe(max_steps=1)).status == "completed"
    assert read_record(FOLDER / "record.json").status == "completed"
    assert not (FOLDER / "checkpoints").exists()


def test_checkpoints_outlive_a_failure_to_store(recipe, monkeypatch):
    real = Registry.save
    monkeypatch.setattr(Registry, "save", no_memory_on_cpu)
    with pytest.raises(RunError):
        run_experiment(recipe(max_steps=2))
    monkeypatch.setattr(Registry, "save", real)
    assert run_experiment(recipe(max_steps=2), on_exists="resume").delta == "tiny@v1"
    assert not (FOLDER / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_of_each_method_equals_the_uninterrupted_one(recipe, monkeypatch, method):
    monkeypatch.setattr(CheckpointFolder, "clear", lambda self: None)
    settings = {
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 4,
        "save_steps": 3,
        "dropout": 0.2,
    }

    def outcome(record):
        last = max((FOLDER / "checkpoints").glob("step-*"))
        kinds = ("trained.safetensors", "optimizer.pt", "rng.pt")
        files = {kind: (last / kind).read_bytes() for kind in kinds}
        history = record.model_dump()["history"]
        return last.name, files, (FOLDER / "log.jsonl").read_text(), history, record.metrics

    whole = outcome(run_experiment(recipe(METHODS[method], **settings)))
    assert whole[0] == "step-00000016"
    resume = {"on_exists": "overwrite"}
    for step in (5, 12):  # in the first epoch, and in the second
        mend = die_in_step(monkeypatch, step)
        with pytest.raises(Crash):
            run_experiment(recipe(METHODS[method], **settings), **resume)
        resume = {"on_exists": "resume"}
        mend()
    found = outcome(run_experiment(recipe(METHODS[method], **settings), **resume))
    assert found == whole
    assert delta_bytes(version="v1") == delta_bytes(version="v2")


# In processes of their own


def start(recipe_path, *arguments, rank=0, processes=1, port=0):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    if processes > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    command = [sys.executable, str(RUN), str(recipe_path), *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_both(recipe_path, *arguments):
    """Two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(recipe_path, *arguments, rank=r, processes=2, port=port) for r in range(2)]


@pytest.fixture
def recipe_file(recipe, workplace):
    def recipe_file(**changes):
        path = workplace / "tiny.yaml"
        path.write_text(yaml.safe_dump(recipe(**changes).resolved()))
        return path

    return recipe_file


@pytest.mark.slow
def test_two_processes_compute_what_one_does(recipe, recipe_file):
    settings = {"dropout": 0.0, "max_steps": 13, "per_device_train_batch_size": 8}
    run_experiment(recipe(optimizer="sgd", max_grad_norm=0.5, l1=1e-4, **settings))
    one = [json.loads(line) for line in (FOLDER / "log.jsonl").read_text().splitlines()]
    # Rounds of several micro-batches, in which a process may be left without a share.
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    path = recipe_file(optimizer="sgd", max_grad_norm=0.5, l1=1e-4, name="two", **settings)
    ranks = start_both(path)
    ended = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], ended
    assert ended[1] == ("", "")
    assert ended[0][0].startswith("two (seed 0): completed\n")
    lines = Path("runs/two-seed0/log.jsonl").read_text().splitlines()
    two = [json.loads(line) for line in lines]
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for ours, theirs in zip(one, two, strict=True):
        assert all(abs(ours[k] - theirs[k]) <= 5e-6 for k in ours), (ours, theirs)
    registry = Registry(Path(os.environ["PEFTKIT_REGISTRY"]))
    stored = [registry.find(name) for name in ("tiny", "two")]
    deltas = [registry.read_delta(version).tensors for version in stored]
    assert max((deltas[0][n] - deltas[1][n]).abs().max() for n in deltas[0]) <= 5e-6
    assert read_record(Path("runs/two-seed0/record.json")).processes == 2


SHORT_OF_MEMORY = """
import os, runpy, sys
from transformers import BertForSequenceClassification as Model

real = Model.forward

def forward(self, *args, **kwargs):
    if self.training and os.environ["RANK"] == "1" and len(kwargs["input_ids"]) > 2:
        raise MemoryError
    return real(self, *args, **kwargs)

Model.forward = forward
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_halve_together_if_one_has_no_memory(recipe_file, workplace, monkeypatch):
    settings = {"dropout": 0.2, "max_steps": 5}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}

    def finish(ranks):
        ended = [process.communicate(timeout=300) for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], ended

    finish(start_both(recipe_file(name="asked", **settings, **sizes)))
    (workplace / "short.py").write_text(SHORT_OF_MEMORY)
    path = recipe_file(auto_batch_size=True, **settings, per_device_train_batch_size=4)
    real = subprocess.Popen
    short = [sys.executable, str(workplace / "short.py")]
    monkeypatch.setattr(subprocess, "Popen", lambda c, **kw: real([*short, *c[1:]], **kw))
    finish(start_both(path))
    assert used(read_record(FOLDER / "record.json")) == (2, 2, True)
    assert (FOLDER / "log.jsonl").read_text() == Path("runs/asked-seed0/log.jsonl").read_text()
    assert delta_bytes("tiny") == delta_bytes("asked")


def wait_for_step(process, step):
    log = FOLDER / "log.jsonl"
    for _ in range(12000):
        if log.exists() and f'"step": {step},' in log.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    pytest.fail("the run takes too long")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted"), (signal.SIGKILL, None)],
)
def test_signalled_run_resumes_to_the_same_delta(recipe, recipe_file, number, status):
    settings = {"num_train_epochs": 40.0, "save_steps": 10, "dropout": 0.1}
    run_experiment(recipe(name="whole", **settings))
    path = recipe_file(**settings)
    process = start(path)
    wait_for_step(process, 25)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    if status is None:
        assert process.returncode == -signal.SIGKILL
        assert not (FOLDER / "record.json").exists()
    else:
        assert (process.returncode, out) == (128 + number, "")
        record = read_record(FOLDER / "record.json")
        said = f"stopped by {number.name}; --resume goes on after step {record.optimizer_steps}"
        assert err.splitlines()[-1] == said
        assert record.status == status
        newest = CheckpointFolder(FOLDER / "checkpoints").newest()
        assert newest.state["step"] == record.optimizer_steps < 440
    process = start(path, "--resume")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.startswith("tiny (seed 0): completed\n")
    assert delta_bytes("tiny") == delta_bytes("whole")
    whole = Path("runs/whole-seed0/log.jsonl").read_text()
    assert (FOLDER / "log.jsonl").read_text() == whole


@pytest.mark.slow
def test_two_resumed_processes_equal_the_uninterrupted_two(recipe_file):
    settings = {"dropout": 0.3, "save_steps": 5, "per_device_train_batch_size": 4}
    settings["num_train_epochs"] = 8.0

    def finish(ranks):
        ended = [process.communicate(timeout=300) for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], ended

    finish(start_both(recipe_file(name="whole", **settings)))
    path = recipe_file(**settings)
    ranks = start_both(path)
    wait_for_step(ranks[0], 7)
    for process in ranks:
        process.kill()
    for process in ranks:
        process.communicate()
    finish(start_both(path, "--resume"))
    assert delta_bytes("tiny") == delta_bytes("whole")
    whole = Path("runs/whole-seed0/log.jsonl").read_text()
    assert (FOLDER / "log.jsonl").read_text() == whole
    assert read_record(FOLDER / "record.json").resumed_after_step >= 5
