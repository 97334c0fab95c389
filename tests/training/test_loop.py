"""The loop: its arithmetic, its stops, and that a resumed run is the same run."""

import errno
import json
import math
import os
import signal
import warnings

import pytest
import torch
from torch.nn import functional

from peftkit.data.batching import plan_epoch
from peftkit.errors import Interrupted, NonFiniteError, ResumeError, RunError, SharedError
from peftkit.training import snapshots
from peftkit.training.non_finite import worded
from peftkit.training.signals import StopRequest


class Crash(BaseException):
    pass


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in rows(folder) if "loss" in row]


def crash_at(trainer, monkeypatch, step):
    """Die in step number `step`, counted from 1, before it changes anything."""
    real = trainer._step

    def dying(batches):
        if trainer.state.step + 1 == step:
            raise Crash
        return real(batches)

    monkeypatch.setattr(trainer, "_step", dying)


def signal_after(trainer, monkeypatch, stop, step, number=signal.SIGTERM):
    real = trainer._step

    def signalled(batches):
        result = real(batches)
        if trainer.state.step + 1 == step:
            stop._receive(number, None)
        return result

    monkeypatch.setattr(trainer, "_step", signalled)


# Arithmetic


def test_batch_size_and_accumulation_share_the_work_and_change_nothing(
    make_trainer, parameters_of, tmp_path
):
    results = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        folder = tmp_path / f"{size}x{accumulation}"
        trainer = make_trainer(
            folder,
            examples=53,  # the last step's 5 make micro-batches of different sizes
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            l1=1e-3,
            max_grad_norm=0.5,
            optimizer="sgd",
        )
        trainer.fit(StopRequest())
        results.append((torch.tensor(losses(folder)), parameters_of(trainer)))
    first_losses, first = results[0]
    assert len(first_losses) == 14
    for other_losses, other in results[1:]:
        assert (first_losses - other_losses).abs().max() <= 5e-6
        assert max((first[n] - other[n]).abs().max() for n in first) <= 5e-6


def test_launchers_accumulation_variable_changes_nothing(
    make_trainer, parameters_of, tmp_path, monkeypatch
):
    plain = make_trainer(tmp_path / "plain", optimizer="sgd", max_steps=3)
    plain.fit(StopRequest())
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    set_ = make_trainer(tmp_path / "set", optimizer="sgd", max_steps=3)
    set_.fit(StopRequest())
    expected, found = parameters_of(plain), parameters_of(set_)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_every_step_equals_a_plain_loop(make_trainer, toy, parameters_of, tmp_path):
    trainer = make_trainer(
        holdout=0,
        weight_decay=0.1,
        max_grad_norm=0.3,
        label_smoothing=0.1,
        l1=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=3.0,
    )
    trainer.fit(StopRequest())

    torch.manual_seed(0)
    model, task, train = toy.Model(), toy.Task(), toy.split(50)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / 3 if step < 3 else 1 - (step - 3) / 11
    )
    expected = []
    for epoch in range(2):
        for indices in plan_epoch(train.lengths, 8, seed=0, epoch=epoch):
            batch = task.collate([train.rows[i] for i in indices])
            labels = batch.pop("labels")
            loss = functional.cross_entropy(model(**batch).logits, labels, label_smoothing=0.1)
            optimizer.zero_grad()
            (loss + 1e-3 * sum(p.abs().sum() for p in matrices)).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()
            expected.append((loss.item(), norm.item(), rate))

    found = [(r["loss"], r["grad_norm"], r["learning_rate"]) for r in rows(tmp_path)]
    assert torch.tensor(found).shape == (14, 3)
    assert (torch.tensor(found) - torch.tensor(expected)).abs().max() <= 5e-6
    ours, plain = parameters_of(trainer), dict(model.named_parameters())
    assert max((ours[n] - plain[n]).abs().max() for n in plain) <= 5e-6


def test_workers_of_the_data_loader_change_no_bit(make_trainer, parameters_of, tmp_path):
    results = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        trainer = make_trainer(folder, dataloader_num_workers=workers, dropout=0.2, max_steps=9)
        trainer.fit(StopRequest())
        results.append((losses(folder), parameters_of(trainer)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][n], results[1][1][n]) for n in results[0][1])


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(2.0, None, 14), (0.5, None, 4), (1.5, None, 11), (2.0, 5, 5), (1.0, 100, 7)],
)
def test_epochs_may_be_fractions_and_max_steps_only_shortens(
    make_trainer, tmp_path, epochs, max_steps, expected
):
    state = make_trainer(num_train_epochs=epochs, max_steps=max_steps).fit(StopRequest())
    assert state.step == expected
    assert [r["step"] for r in rows(tmp_path) if "loss" in r] == list(range(1, expected + 1))
    assert rows(tmp_path)[-1]["step"] == expected
    assert "holdout_score" in rows(tmp_path)[-1]


def test_examples_and_tokens_are_those_of_the_timed_steps(make_trainer, toy):
    trainer = make_trainer(num_train_epochs=1.0)
    metered = trainer._metered(plan_epoch(toy.split(50).lengths, 8, seed=0, epoch=0), 0)
    trainer._metering_done = False
    state = trainer.fit(StopRequest())
    lengths = toy.split(50).lengths
    steps = plan_epoch(lengths, 8, seed=0, epoch=0)
    timed = [i for number, step in enumerate(steps) if number not in metered for i in step]
    assert (state.examples, state.tokens) == (len(timed), sum(lengths[i] for i in timed))
    assert state.metered_seconds > 0
    assert state.train_cpu_seconds > 0


def test_the_largest_step_that_runs_is_metered(make_trainer):
    trainer = make_trainer()
    lengths = trainer.job.train.lengths
    short, long = sorted(range(50), key=lengths.__getitem__)[:2], [lengths.index(max(lengths))] * 2
    assert trainer._metered([short, short, short, long, short], 0) == {0, 1, 3}
    assert trainer._metered([short, long, short], 0) == set()


# Stopping


def test_non_finite_loss_stops_before_the_step_and_names_the_examples(
    make_trainer, toy, parameters_of, tmp_path
):
    trainer = make_trainer(save_steps=1)
    steps = plan_epoch(toy.split(50).lengths, 8, seed=0, epoch=0)
    culprit = steps[3][1]
    before = {}
    collate, real_step = trainer.job.task.collate, trainer._step

    def poisoned(batch_rows):
        batch = collate(batch_rows)
        wanted = trainer.job.train.rows[culprit]
        for i, row in enumerate(batch_rows):
            if row is wanted:
                batch["attention_mask"][i] = 0
        return batch

    def watched(batches):
        before.update(parameters_of(trainer))
        return real_step(batches)

    trainer.job.task.collate, trainer._step = poisoned, watched
    with pytest.raises(NonFiniteError) as raised:
        trainer.fit(StopRequest())
    assert str(raised.value) == (
        f"step 4: loss nan, gradient norm nan; train rows {culprit}; "
        "lower training.learning_rate, or look at these examples"
    )
    after = parameters_of(trainer)
    assert all(torch.equal(before[n], after[n]) for n in before)
    checkpoint = trainer.checkpoints.newest()
    assert checkpoint.state["step"] == 3
    assert all(torch.equal(checkpoint.trained[n], after[n]) for n in after)


def test_non_finite_weight_blames_the_whole_step(make_trainer, toy):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.job.model.head.bias[0] = math.inf
    indices = sorted(plan_epoch(toy.split(50).lengths, 8, seed=0, epoch=0)[0])
    with pytest.raises(NonFiniteError) as raised:
        trainer.fit(StopRequest())
    assert str(raised.value) == (
        f"step 1: loss nan, gradient norm nan; train rows {', '.join(map(str, indices))}; "
        "lower training.learning_rate, or look at these examples"
    )


def test_examples_are_named_by_their_place_in_the_source():
    rows = [{"input_ids": [1], "source_row": place} for place in (3, 70, 800)]
    assert worded([0, 2], rows).startswith("rows 3, 800; ")


def test_non_finite_gradient_of_a_finite_loss_stops(make_trainer):
    trainer = make_trainer()
    trainer.job.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"^step 1: loss 1\.\d+, gradient norm (nan|inf); "):
        trainer.fit(StopRequest())


def test_early_stopping_counts_evaluations_without_improvement(make_trainer, toy):
    task = toy.Task(script=[0.5, 0.7, 0.7, 0.6, 0.9])
    state = make_trainer(
        task=task, eval_steps=2, early_stopping_patience=2, num_train_epochs=3.0
    ).fit(StopRequest())
    assert (state.step, state.best_step, task.evaluations) == (8, 4, 4)


def test_patience_goes_on_counting_after_a_resume(make_trainer, toy, monkeypatch):
    settings = {"eval_steps": 2, "save_steps": 2, "early_stopping_patience": 2}
    settings["num_train_epochs"] = 3.0
    cut = make_trainer(task=toy.Task(script=[0.5, 0.7, 0.7]), **settings)
    crash_at(cut, monkeypatch, 8)
    with pytest.raises(Crash):
        cut.fit(StopRequest())
    again = make_trainer(task=toy.Task(script=[0.6, 0.9, 0.1, 0.1, 0.1]), **settings)
    state = again.fit(StopRequest(), resume=True)
    assert (state.step, state.best_step) == (8, 4)


def test_the_metric_of_the_recipe_picks_the_best(make_trainer, toy):
    task = toy.Task(script=[0.9] + [0.1] * 6)
    state = make_trainer(task=task, eval_steps=2, metric_for_best_model="loss").fit(StopRequest())
    lowest = min(state.history, key=lambda row: row["holdout"]["loss"])["step"]
    assert state.best_step == lowest != 2


def test_the_recipe_may_say_that_less_is_better(make_trainer, toy):
    task = toy.Task(script=[0.5, 0.3, 0.4, 0.2, 0.6, 0.7, 0.8])
    state = make_trainer(task=task, eval_steps=2, greater_is_better=False).fit(StopRequest())
    assert state.best_step == 8


def test_a_signal_stops_after_the_step_with_a_checkpoint(make_trainer, monkeypatch):
    trainer, stop = make_trainer(), StopRequest()
    signal_after(trainer, monkeypatch, stop, 3)
    with pytest.raises(Interrupted, match="stopped") as raised:
        trainer.fit(stop)
    assert str(raised.value) == "stopped by SIGTERM; --resume goes on after step 3"
    assert raised.value.status == "terminated"
    assert trainer.state.step == 3
    assert trainer.checkpoints.newest().state["step"] == 3


def test_a_signal_after_the_last_step_is_not_forgotten(make_trainer, monkeypatch):
    trainer, stop = make_trainer(), StopRequest()

    def asked_last():
        if trainer.state.step == trainer.total_steps:
            stop._receive(signal.SIGTERM, None)
        return False

    monkeypatch.setattr(trainer, "_out_of_patience", asked_last)
    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM$"):
        trainer.fit(stop)
    assert trainer.checkpoints.newest().state["step"] == trainer.total_steps


# The best checkpoint

NAN = math.nan


@pytest.mark.parametrize("crash", [None, 8])
@pytest.mark.parametrize(
    ("metric", "script", "best"),
    [
        ("score", [0.1, 0.5, 0.5, 0.2, 0.5, 0.4, 0.1], 4),
        ("score", [0.9, 0.5, 0.5, 0.2, 0.5, 0.4, 0.1], 2),
        ("score", [NAN, 0.1, NAN, 0.3, NAN, 0.3, 0.2], 8),
        ("score", [-5.0, -4.0, -3.0, -2.0, -1.5, -1.2, -1.0], 14),
        ("score", [NAN] * 7, None),
        ("mse", [3.0, 2.0, 1.0, NAN, 1.0, 1.5, 2.0], 6),
    ],
)
def test_what_is_kept_is_the_first_argbest(
    make_trainer, toy, parameters_of, monkeypatch, metric, script, best, crash
):
    seen = {}

    class Scripted(toy.Task):
        metric_names = [metric]

        def metrics(self, columns):
            step = trainer.state.step
            seen[step] = parameters_of(trainer)
            return {metric: script[step // 2 - 1]}

    trainer = make_trainer(task=Scripted(), eval_steps=2, save_steps=3, dropout=0.3)
    if crash:
        crash_at(trainer, monkeypatch, crash)
        with pytest.raises(Crash):
            trainer.fit(StopRequest())
        trainer = make_trainer(task=Scripted(), eval_steps=2, save_steps=3, dropout=0.3)
    state = trainer.fit(StopRequest(), resume=crash is not None)
    assert state.best_step == best
    kept, expected = parameters_of(trainer), seen[best or 14]
    assert all(torch.equal(kept[n], expected[n]) for n in expected)


# Resuming


@pytest.mark.parametrize(
    ("crash", "optimizer"),
    [(1, "adamw"), (5, "adamw"), (6, "adamw"), (7, "sgd"), (12, "adamw"), (14, "adamw")],
)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    make_trainer, tmp_path, monkeypatch, parameters_of, crash, optimizer
):
    settings = {
        "dropout": 0.2,
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 3,
        "save_steps": 4,
        "eval_steps": 3,
        "num_train_epochs": 2.5,
        "optimizer": optimizer,
    }
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.fit(StopRequest())
    cut = make_trainer(tmp_path / "cut", **settings)
    crash_at(cut, monkeypatch, crash)
    with pytest.raises(Crash):
        cut.fit(StopRequest())
    torch.manual_seed(1)  # the experiment seeds before it makes the trainer
    resumed = make_trainer(tmp_path / "cut", **settings)
    resumed.fit(StopRequest(), resume=True)

    assert (tmp_path / "cut/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()
    assert resumed.state.history == whole.state.history
    before, after = whole.checkpoints.newest(), resumed.checkpoints.newest()
    assert before.state["step"] == after.state["step"] == 15
    for kind in ("trained", "optimizer", "rng"):
        (expected_file,) = (tmp_path / "whole/checkpoints/step-00000015").glob(f"{kind}.*")
        found_file = tmp_path / "cut/checkpoints/step-00000015" / expected_file.name
        assert found_file.read_bytes() == expected_file.read_bytes()
    expected, found = parameters_of(whole), parameters_of(resumed)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_resumed_after_a_signal_equals_the_uninterrupted_run(
    make_trainer, tmp_path, monkeypatch, parameters_of
):
    whole = make_trainer(tmp_path / "whole", dropout=0.2)
    whole.fit(StopRequest())
    for step in (1, 5, 8):  # three times, and an epoch's first step is among them
        stop = StopRequest()
        cut = make_trainer(tmp_path / "cut", dropout=0.2)
        signal_after(cut, monkeypatch, stop, step)
        with pytest.raises(Interrupted):
            cut.fit(stop, resume=True)
    cut = make_trainer(tmp_path / "cut", dropout=0.2)
    cut.fit(StopRequest(), resume=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    expected, found = parameters_of(whole), parameters_of(cut)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_resume_after_a_damaged_checkpoint_writes_it_again(
    make_trainer, tmp_path, monkeypatch, parameters_of
):
    whole = make_trainer(tmp_path / "whole", dropout=0.2, save_steps=3)
    whole.fit(StopRequest())
    cut = make_trainer(tmp_path / "cut", dropout=0.2, save_steps=3)
    crash_at(cut, monkeypatch, 8)
    with pytest.raises(Crash):
        cut.fit(StopRequest())
    folder = tmp_path / "cut/checkpoints"
    (folder / "step-00000006/state.json").unlink()
    (folder / "best-00000014").mkdir()
    (folder / ".staging-0123").mkdir()
    again = make_trainer(tmp_path / "cut", dropout=0.2, save_steps=3)
    with pytest.warns(UserWarning, match=r"^checkpoint step-00000006 is skipped: "):
        again.fit(StopRequest(), resume=True)
    assert again.checkpoints.newest().state["step"] == 14
    assert not (folder / ".staging-0123").exists()
    expected, found = parameters_of(whole), parameters_of(again)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def advice(trainer):
    return (
        f"{trainer.checkpoints.folder}: --resume-weights-only begins anew with its weights, "
        "--overwrite without them"
    )


def test_resume_with_another_number_of_processes_is_refused(make_trainer, monkeypatch):
    trainer = make_trainer(num_train_epochs=1.0)
    trainer.fit(StopRequest())
    trainer = make_trainer(num_train_epochs=1.0)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    with pytest.raises(RunError) as raised:
        trainer.fit(StopRequest(), resume=True)
    assert raised.value.problems == ["--resume: processes: then 1, now 2", advice(trainer)]


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_find_other_checkpoints_do_not_go_on(make_trainer, monkeypatch, damaged):
    trainer = make_trainer(num_train_epochs=1.0)
    trainer.fit(StopRequest())
    folder = trainer.checkpoints.folder
    if damaged:
        for file in folder.glob("step-*/state.json"):
            file.write_text("{")
    monkeypatch.setattr(snapshots, "gather_object", lambda own: [*own, "none"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ResumeError) as raised:
            make_trainer(num_train_epochs=1.0).fit(StopRequest(), resume=True)
    own = f"{folder}: no checkpoint is whole; start again with --overwrite" if damaged else "step 7"
    assert raised.value.problems == [
        f"{folder}: the processes do not find the same checkpoint: rank 0: {own}; rank 1: none; "
        "it must be one folder that all of them see"
    ]


def test_resume_under_other_conditions_is_refused_with_each_of_them(make_trainer):
    then = {"base": "one", "precision": "bf16", "data": "x", "recipe": {"training": {"l1": 0.0}}}
    now = {"base": "two", "precision": "no", "data": "x", "recipe": {"training": {"l1": 0.1}}}
    make_trainer(conditions=then).fit(StopRequest())
    trainer = make_trainer(conditions=now)
    with pytest.raises(RunError) as raised:
        trainer.fit(StopRequest(), resume=True)
    assert raised.value.problems == [
        '--resume: base: then "one", now "two"',
        '--resume: precision: then "bf16", now "no"',
        "--resume: recipe.training.l1: then 0.0, now 0.1",
        advice(trainer),
    ]


def test_begun_with_the_weights_alone_everything_else_is_new(
    make_trainer, tmp_path, monkeypatch, parameters_of
):
    cut = make_trainer(save_steps=2, conditions={"recipe": "old"})
    crash_at(cut, monkeypatch, 6)
    with pytest.raises(Crash):
        cut.fit(StopRequest())
    kept = cut.checkpoints.newest().trained

    def begun(**settings):
        return make_trainer(dropout=0.2, conditions={"recipe": "new"}, **settings)

    trainer = begun()
    trainer.snapshots.begin_with_weights()
    found = parameters_of(trainer)
    assert all(torch.equal(found[n], kept[n]) for n in kept)
    state = trainer.fit(StopRequest(), resume=True)
    assert (state.step, state.resumed_after, state.weights_from_step) == (14, None, 4)
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(range(1, 15))
    assert [row["step"] for row in state.history] == [7, 14]
    # The same as a training whose model had these weights from the first.
    fresh = make_trainer(tmp_path / "fresh", dropout=0.2)
    fresh.job.model.load_state_dict(kept)
    fresh.fit(StopRequest())
    assert rows(tmp_path) == rows(tmp_path / "fresh")


def test_a_training_begun_with_weights_is_resumed_as_any_other(
    make_trainer, tmp_path, monkeypatch, parameters_of
):
    results = []
    for crash in (None, 1, 5):
        folder = tmp_path / str(crash)
        make_trainer(folder, max_steps=2).fit(StopRequest())
        trainer = make_trainer(folder, dropout=0.2, save_steps=3, conditions={"recipe": "new"})
        trainer.snapshots.begin_with_weights()
        if crash:
            crash_at(trainer, monkeypatch, crash)
            with pytest.raises(Crash):
                trainer.fit(StopRequest(), resume=True)
            trainer = make_trainer(folder, dropout=0.2, save_steps=3, conditions={"recipe": "new"})
        state = trainer.fit(StopRequest(), resume=True)
        assert (state.weights_from_step, state.step) == (2, 14)
        results.append((rows(folder), [p.tolist() for p in parameters_of(trainer).values()]))
    assert results[0] == results[1] == results[2]


def test_weights_of_another_model_are_refused_and_kept(make_trainer, toy):
    make_trainer(num_train_epochs=1.0).fit(StopRequest())
    other = toy.Model()
    other.embedding.requires_grad_(False)
    trainer = make_trainer(model=other)
    with pytest.raises(RunError, match="trained parameters differ"):
        trainer.snapshots.begin_with_weights()
    assert trainer.checkpoints.newest().state["step"] == 7


def test_a_full_disk_ends_the_run_with_the_checkpoint_before(
    make_trainer, tmp_path, monkeypatch, parameters_of
):
    whole = make_trainer(tmp_path / "whole", dropout=0.2, save_steps=2)
    whole.fit(StopRequest())
    cut = make_trainer(tmp_path / "cut", dropout=0.2, save_steps=2)
    real = os.fsync

    def full(descriptor):
        if cut.state.step >= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SharedError) as raised:
        cut.fit(StopRequest())
    assert str(raised.value) == (
        f"{tmp_path}/cut/checkpoints/step-00000004: the checkpoint cannot be written: No space "
        "left on device; once that is mended, --resume goes on from step-00000002"
    )
    monkeypatch.setattr(os, "fsync", real)
    again = make_trainer(tmp_path / "cut", dropout=0.2, save_steps=2)
    again.fit(StopRequest(), resume=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    expected, found = parameters_of(whole), parameters_of(again)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_a_resumed_run_keeps_what_it_measured_before(make_trainer, monkeypatch):
    settings = {"save_steps": 2, "eval_steps": 2}
    cut = make_trainer(**settings)
    crash_at(cut, monkeypatch, 12)
    with pytest.raises(Crash):
        cut.fit(StopRequest())
    peak = cut.meter.result()["train_step"].allocated_bytes
    resumed = make_trainer(**settings)
    monkeypatch.setattr(resumed, "_metered", lambda *_: set())
    state = resumed.fit(StopRequest(), resume=True)
    assert resumed.meter.result()["train_step"].allocated_bytes == peak > 0
    assert resumed.meter.overhead_seconds > cut.meter.overhead_seconds * 0.9
    assert state.resumed_after == 10


def scaler(scale):
    """What scales the loss in fp16 on a GPU; torch's works on a CPU too."""
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)


def test_resume_takes_up_the_loss_scale(make_trainer, toy, tmp_path, monkeypatch, parameters_of):
    class Loud(toy.Task):
        """With so great a loss that float32 overflows as the scale grows, and steps are skipped."""

        def loss(self, *arguments, **settings):
            return 16 * super().loss(*arguments, **settings)

    def trainer(name):
        settings = {"save_steps": 4, "num_train_epochs": 5.0}
        return make_trainer(tmp_path / name, task=Loud(), scaler=scaler(2.0**120), **settings)

    whole = trainer("whole")
    whole.fit(StopRequest())
    cut = trainer("cut")
    crash_at(cut, monkeypatch, 10)
    with pytest.raises(Crash):
        cut.fit(StopRequest())
    resumed = trainer("cut")
    resumed.fit(StopRequest(), resume=True)
    assert (tmp_path / "cut/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()
    expected, found = parameters_of(whole), parameters_of(resumed)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_a_gradient_that_no_loss_scale_cures_stops_the_run(make_trainer, toy):
    class Sick(toy.Model):
        def forward(self, input_ids, attention_mask):
            outputs = super().forward(input_ids, attention_mask)
            nothing = self.head.weight.sum() * 0.0
            outputs.logits = outputs.logits + torch.sqrt(nothing * nothing)  # 0, its gradient NaN
            return outputs

    trainer = make_trainer(model=Sick(), scaler=scaler(2.0**6), num_train_epochs=5.0)
    with pytest.raises(NonFiniteError, match=r"^step 7: loss .*, gradient norm nan; train rows"):
        trainer.fit(StopRequest())


def test_dropout_is_on_again_after_an_evaluation(make_trainer, monkeypatch):
    trainer, modes = make_trainer(eval_steps=1, max_steps=3), []
    real = trainer._step

    def watched(batches):
        modes.append(trainer.job.model.training)
        return real(batches)

    monkeypatch.setattr(trainer, "_step", watched)
    trainer.fit(StopRequest())
    assert modes == [True, True, True]
