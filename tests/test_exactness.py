"""How the work is shared out changes nothing: batches, accumulation, processes, recomputation."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from exact_runs import METHODS, SIZES, STEPS, all_of, make_trainer, texts, trained

from peftkit.modeling.parameters import (
    checkpoint_activations,
    train_mode,
    trainable_parameters,
)
from peftkit.tasks.completions import IGNORED
from peftkit.training.optimizers import learning_rate_factor
from peftkit.training.signals import StopRequest

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def begin(base, out, words, processes):
    """Every rank of a run of `exact_runs.py`."""
    here = Path(__file__).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here)])
    ranks = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(here / "exact_runs.py"), str(base), str(out), *words]
        ranks.append(
            subprocess.Popen(
                command,
                env=environment | (own if processes > 1 else {}),
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return ranks


def results(base, out, *words):
    """By `rank-of-processes`, by method: what one process and two found."""
    for rank in begin(base, out, words, 2) + begin(base, out, words, 1):
        said = rank.communicate(timeout=500)[1]
        assert rank.returncode == 0, said[-3000:]
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*-of-*.json")}


@pytest.fixture
def base_for(base_of, language_model):
    """By the task that the base is for."""
    return {"classification": base_of("bert"), "sft": language_model}


@pytest.fixture(scope="module")
def quick(base_of, tmp_path_factory):
    """One process, this one, alone."""
    base, out = base_of("bert"), tmp_path_factory.mktemp("quick")
    one = all_of(base, out, "top_layers", part="quick", processes=1)
    return {"0-of-1": {"top_layers": one}}


@pytest.fixture(scope="module")
def whole(base_of, tmp_path_factory):
    return results(base_of("bert"), tmp_path_factory.mktemp("whole"), "whole", *METHODS)


@pytest.fixture(scope="module")
def sft(language_model, tmp_path_factory):
    """As `whole`, with prompts that are not learnt: a step's items are tokens."""
    return results(language_model, tmp_path_factory.mktemp("sft"), "whole", *METHODS)


@pytest.fixture(scope="module")
def quicksft(language_model, tmp_path_factory):
    base, out = language_model, tmp_path_factory.mktemp("quicksft")
    return {"0-of-1": {"lora": all_of(base, out, "lora", part="quick", processes=1)}}


WHOLE = [
    pytest.param(f"{task}-{method}", marks=pytest.mark.slow)
    for task in ("whole", "sft")
    for method in METHODS
]
TWO_PROCESSES = pytest.mark.parametrize("found", WHOLE, indirect=True)


@pytest.fixture(params=["quick-top_layers", "quicksft-lora", *WHOLE])
def found(request):
    """By `rank-of-processes`, what was found of one method."""
    part, _, name = request.param.partition("-")
    return {key: by_method[name] for key, by_method in request.getfixturevalue(part).items()}


def every_training(found):
    return {
        f"{sharing} on {key}": one
        for key, results in found.items()
        for sharing, one in results["trained"].items()
    }


def test_batch_size_accumulation_and_processes_change_no_loss(found):
    trainings = every_training(found)
    assert len(trainings) in (len(SIZES["quick"]), 4 + 3 + 3)
    expected = trainings["8x1 on 0-of-1"]["losses"]
    assert len(expected) == len(set(expected)) in STEPS.values()
    off = {
        name: max(abs(a - b) for a, b in zip(one["losses"], expected, strict=True))
        for name, one in trainings.items()
    }
    assert max(off.values()) <= 5e-6, off


def test_learning_rates_are_the_same_in_every_step_of_every_group(found):
    trainings = every_training(found)
    expected = trainings["8x1 on 0-of-1"]["rates"]
    assert len(expected) in STEPS.values()
    assert len({str(rates) for rates in expected}) == len(expected) - 1  # the first two: the peak
    assert all(one["rates"] == expected for one in trainings.values())


@TWO_PROCESSES
def test_processes_stay_bit_equal(found):
    first, second = found["0-of-2"], found["1-of-2"]
    assert first == second


@TWO_PROCESSES
def test_gradients_are_exchanged_once_a_step(found):
    counted = {name: one["exchanged"] for name, one in found["0-of-2"]["trained"].items()}
    assert "2x2" in counted
    for steps in counted.values():
        assert len(steps) in STEPS.values()
        assert all(buckets and len(set(buckets)) == len(buckets) for buckets in steps)


def test_evaluation_counts_each_example_once_whatever_the_batch_and_the_processes(found):
    alone = found["0-of-1"]["evaluated"]
    for count in {int(name.partition("/")[0]) for name in alone}:
        expected = alone[f"{count}/1"]  # one by one
        losses, items = (np.array(expected[key]) for key in ("losses", "items"))
        assert len(losses) == count
        assert abs(expected["loss"] - (losses * items).sum() / items.sum()) <= 1e-6
        for key, results in found.items():
            for name, values in results["evaluated"].items():
                if name.startswith(f"{count}/"):
                    assert values["items"] == expected["items"]
                    off = np.abs(np.subtract(values["losses"], losses)).max()
                    assert max(off, abs(values["loss"] - expected["loss"])) <= 1e-6, (key, name)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "sft"])
def test_an_example_too_many_in_one_batch_would_be_seen(base_for, tmp_path, monkeypatch, task):
    """The planted fault: each micro-batch is averaged by itself, as a plain Trainer does it."""
    from peftkit.training.loop import Trainer

    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "dropout": 0.0}
    right = trained(base_for[task], "lora", tmp_path / "right", **settings)["losses"]
    real = Trainer._backward

    def averaged(self, micro, batch, *, total, last):
        items = self.job.task.loss_items(batch["labels"])
        share = items * 4 if micro.counts else 1
        return real(self, micro, batch, total=share, last=last) * total / share

    monkeypatch.setattr(Trainer, "_backward", averaged)
    wrong = trained(base_for[task], "lora", tmp_path / "wrong", **settings)["losses"]
    assert max(abs(a - b) for a, b in zip(right, wrong, strict=True)) > 5e-6


# Recomputed activations


@pytest.mark.parametrize("name", METHODS)
def test_recomputing_activations_changes_no_loss_and_loses_no_gradient(base_of, name):
    losses, gradients = [], []
    for recompute in (False, True):
        model = tiny_runs.prepare(base_of("bert"), tiny_runs.make_method(METHODS[name]))
        if recompute:
            inner = model.get_base_model() if hasattr(model, "get_base_model") else model
            checkpoint_activations(inner)
        train_mode(model)
        torch.manual_seed(3)  # dropout is on
        batch = tiny_runs.make_batch(base_of("bert"))
        labels = batch.pop("labels")
        loss = tiny_runs.make_task().loss(model(**batch), labels)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({n: p.grad for n, p in trainable_parameters(model).items()})
    assert abs(losses[0] - losses[1]) <= 1e-6
    assert [n for n, g in gradients[1].items() if g is None] == []
    off = [(gradients[0][n] - g).abs().max() for n, g in gradients[1].items()]
    assert max(off) <= 1e-6


# Precision

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NF4 = torch.uint8
PRECISION = {
    # method, precision: frozen base, quantised base, adapter, head
    ("full", "no"): (set(), set(), set(), {F32}),
    ("full", "bf16"): (set(), set(), set(), {F32}),
    ("full", "fp16"): (set(), set(), set(), {F32}),
    ("top_layers", "no"): ({F32}, set(), set(), {F32}),
    ("top_layers", "bf16"): ({BF16}, set(), set(), {F32}),
    ("top_layers", "fp16"): ({F16}, set(), set(), {F32}),
    ("lora", "no"): ({F32}, set(), {F32}, {F32}),
    ("lora", "bf16"): ({BF16}, set(), {F32}, {F32}),
    ("lora", "fp16"): ({F16}, set(), {F32}, {F32}),
    ("qlora", "no"): ({F32}, {NF4}, {F32}, {F32}),
    ("qlora", "bf16"): ({BF16}, {NF4}, {F32}, {F32}),
    ("qlora", "fp16"): ({F16}, {NF4}, {F32}, {F32}),
}


def parts(model):
    """Dtypes of the frozen base, of what is quantised, of the adapter and of the head."""
    named = list(model.named_parameters())
    floating = [(n, p) for n, p in named if p.is_floating_point()]
    return (
        {p.dtype for n, p in floating if not p.requires_grad},
        {p.dtype for n, p in named if not p.is_floating_point()},
        {p.dtype for n, p in floating if "lora_" in n},
        {p.dtype for n, p in floating if "classifier" in n and p.requires_grad},
    )


@pytest.mark.parametrize(("name", "precision"), PRECISION)
def test_precision_is_what_the_recipe_says(base_of, name, precision):
    method = tiny_runs.make_method(METHODS[name])
    model = tiny_runs.prepare(base_of("bert"), method, mixed_precision=precision)
    assert parts(model) == PRECISION[name, precision]
    trains = {p.dtype for p in trainable_parameters(model).values()}
    assert trains == {F32}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_optimizer_states_and_trained_parameters_stay_in_float32(
    base_of, tmp_path, name, precision
):
    trainer = make_trainer(base_of("bert"), name, tmp_path, mixed_precision=precision, max_steps=2)
    before = parts(trainer.job.model)
    trainer.fit(StopRequest())
    assert parts(trainer.job.model) == before == PRECISION[name, precision]
    states = trainer.optimizer.state_dict()["state"].values()
    assert len(states) == len(trainable_parameters(trainer.job.model))
    held = {v.dtype for state in states for k, v in state.items() if k.startswith("exp_avg")}
    assert held == {F32}


# Resumed


@pytest.mark.parametrize("name", METHODS)
def test_learning_rates_go_on_where_they_were_after_a_resume(base_of, tmp_path, name):
    settings = {"save_steps": 3, "warmup_steps": 4.0, "lr_scheduler_type": "cosine"}
    settings["per_device_train_batch_size"] = 8
    trainer = make_trainer(base_of("bert"), name, tmp_path, max_steps=5, **settings)
    peaks = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    rates = []

    def watch(trainer, last):
        real = trainer._step

        def watched(batches):
            if trainer.state.step == last:
                raise KeyboardInterrupt
            result = real(batches)
            now = [group["lr"] for group in trainer.optimizer.param_groups]
            rates.append((trainer.state.step, now))
            return result

        trainer._step = watched

    watch(trainer, 4)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(StopRequest())
    again = make_trainer(base_of("bert"), name, tmp_path, max_steps=5, **settings)
    watch(again, None)
    again.fit(StopRequest(), resume=True)
    assert [step for step, _ in rates] == [0, 1, 2, 3, 3, 4]
    for step, now in rates:
        factor = learning_rate_factor(again.config, step, 5)
        assert now == [peak * factor for peak in peaks]


def test_workers_that_collate_change_no_order(base_of, tmp_path):
    """With dropout: a worker must not draw from the random numbers either."""
    made = [
        trained(base_of("bert"), "lora", tmp_path / str(n), dataloader_num_workers=n, dropout=0.2)
        for n in (0, 2)
    ]
    assert made[0] == made[1]


def test_texts_are_ragged(base_of, language_model):
    assert len(set(texts(base_of("bert"), 53).lengths)) > 8
    labels = [row["labels"] for row in texts(language_model, 53).rows]
    assert len({sum(label != IGNORED for label in row) for row in labels}) > 8
