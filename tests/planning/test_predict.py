"""What the planner says, held to what the meter of a real run measures."""

import math
from dataclasses import replace

import pytest
import torch
import yaml
from torch.nn import functional

from peftkit import experiment
from peftkit.errors import RunError, UsageError
from peftkit.experiment import run_experiment
from peftkit.memory import fake_step
from peftkit.memory.gpu_kernels import CUBLAS_WORKSPACES_BYTES, _GpuKernels
from peftkit.planning import of_run, predict
from peftkit.planning.setting import of_recipe, train_shape
from peftkit.recipe import from_resolved, load_recipe
from peftkit.training.loop import Trainer

METHODS = {
    "full": {"type": "full"},
    "top_layers": {"type": "top_layers", "num_layers": 1},
    "lora": {"type": "lora", "r": 4},
    "dora": {"type": "lora", "r": 4, "use_dora": True},
    "qlora": {"type": "qlora", "r": 4},
    "ia3": {"type": "peft", "peft_type": "IA3"},
}


def cases(*quick):
    """Every method with and without recomputation; those that are not `quick` are slow."""
    return [
        pytest.param(method, again, marks=[] if (method, again) in quick else pytest.mark.slow)
        for method in METHODS
        for again in (False, True)
    ]


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


@pytest.fixture
def recipe(tiny_recipe, workplace, base_of):
    """The tiny recipe on a base of some width, with changes of its training section."""

    def recipe(method, model_type="bert", **training):
        training = {**tiny_recipe["training"], "max_steps": 12, **training}
        content = {**tiny_recipe, "training": training, "method": method}
        content["base"] = {"name": str(base_of(model_type, width=64))}
        content["task"] = {**content["task"], "max_length": 64}
        return from_resolved(content)

    return recipe


def errors(record):
    """Phase → how far the prediction lies from the measurement, as a share of it."""
    assert record.predicted_allocated_bytes is not None
    return {
        phase: record.predicted_allocated_bytes[phase] / peaks.allocated_bytes - 1
        for phase, peaks in record.memory.items()
    }


@pytest.mark.parametrize(
    ("method", "recompute"),
    cases(*((method, False) for method in METHODS)),
)
def test_a_run_needs_what_was_predicted(recipe, method, recompute):
    record = run_experiment(recipe(METHODS[method], gradient_checkpointing=recompute))
    found = errors(record)
    assert found["train_step"] == pytest.approx(0, abs=0.01)
    assert found["eval"] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_other_architectures_need_what_was_predicted(recipe, model_type):
    found = errors(run_experiment(recipe(METHODS["lora"], model_type)))
    assert found["train_step"] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4},
        {"optimizer": "sgd"},
        {"optimizer": "adamw_8bit"},
        {"mixed_precision": "bf16"},
    ],
)
def test_settings_of_the_training_are_foreseen(recipe, changes):
    found = errors(run_experiment(recipe(METHODS["full"], **changes)))
    assert found["train_step"] == pytest.approx(0, abs=0.05)


def test_without_the_optimizers_state_the_prediction_is_wrong(recipe, monkeypatch):
    """The planted fault."""
    monkeypatch.setattr(fake_step, "_make_state", lambda job: None)
    found = errors(run_experiment(recipe(METHODS["full"])))
    assert abs(found["train_step"]) > 0.05


@pytest.mark.slow
def test_predicting_changes_nothing_of_the_run(recipe, monkeypatch):
    said = run_experiment(recipe(METHODS["lora"]))
    monkeypatch.setattr(experiment, "foresee", lambda *arguments: None)
    unsaid = run_experiment(recipe(METHODS["lora"]), on_exists="overwrite")
    assert said.history == unsaid.history
    assert unsaid.predicted_allocated_bytes is None


def test_a_prediction_that_fails_stops_no_run(recipe, monkeypatch):
    def failing(setting):
        raise NotImplementedError("an operation without a fake")

    monkeypatch.setattr(of_run, "predict", failing)
    record = run_experiment(recipe(METHODS["lora"]))
    assert (record.status, record.predicted_allocated_bytes) == ("completed", None)


@pytest.mark.slow
def test_a_run_without_memory_is_told_what_would_have_fitted(recipe, monkeypatch):
    needed, real = {}, of_run._training_bytes

    def noted(setting, size, processes):
        needed[size] = real(setting, size, processes)
        return needed[size]

    monkeypatch.setattr(of_run, "_training_bytes", noted)
    monkeypatch.setattr(Trainer, "_step", no_memory)
    advice = []
    for size in (None, 3):
        room = needed[size] if size else 1
        monkeypatch.setattr(of_run, "_room_bytes", lambda device, room=room: room)
        with pytest.raises(RunError) as raised:
            run_experiment(
                recipe(METHODS["full"], per_device_train_batch_size=12), on_exists="overwrite"
            )
        advice.append(str(raised.value).rpartition("gradient_checkpointing: true")[2])
    assert list(needed) == [12, 6, 3]
    assert needed[12] > needed[6] > needed[3]
    assert advice == ["", "; the planner expects 3 examples to fit"]


def no_memory(*_):
    raise MemoryError


@pytest.mark.parametrize(("method", "recompute"), cases())
def test_a_deep_model_is_carried_on_from_two_short_ones(recipe, monkeypatch, method, recompute):
    setting = of_recipe(recipe(METHODS[method], gradient_checkpointing=recompute))
    setting.config.num_hidden_layers = 9
    whole = predict.predict(setting)
    monkeypatch.setattr(predict, "TRACED_DEPTH", 4)
    carried_on = predict.predict(setting)
    for phase, peak in whole.phases.items():
        assert carried_on.phases[phase].total_bytes == pytest.approx(peak.total_bytes, rel=0.002)
    assert sum(carried_on.peak.by_kind.values()) == carried_on.peak.total_bytes


def test_kinds_add_up_and_are_what_they_say(recipe):
    found = predict.predict(of_recipe(recipe(METHODS["full"])))
    step, load = found.phases["optimizer_step"].by_kind, found.phases["load"].by_kind
    weights = load["trainable_weights"]
    assert step["gradients"] == weights
    assert step["optimizer_state"] == pytest.approx(2 * weights, rel=0.01)
    assert found.phases["forward"].by_kind["activations"] > 0
    for peak in found.phases.values():
        assert sum(peak.by_kind.values()) == peak.total_bytes


def test_four_bit_weights_take_half_a_byte_and_their_constants(recipe):
    full = predict.predict(of_recipe(recipe(METHODS["lora"]))).phases["load"].by_kind
    packed = predict.predict(of_recipe(recipe(METHODS["qlora"]))).phases["load"].by_kind
    assert packed["base_weights"] < full["base_weights"] / 3
    # A byte for 64 weights, four for 64 * 256, and tables.
    assert 0 < packed["quantisation"] < packed["base_weights"] / 4


def activations(setting):
    return predict.predict(setting).phases["forward"].by_kind["activations"]


def test_a_gpus_attention_keeps_no_matrix_of_weights(recipe):
    """With dropout in attention a CPU has no fused kernel, a GPU has."""
    tiny = recipe(METHODS["full"], dropout=0.1)
    assert activations(of_recipe(tiny, on_gpu=True)) < 0.8 * activations(of_recipe(tiny))


@pytest.mark.parametrize("method", ["lora", pytest.param("qlora", marks=pytest.mark.slow)])
def test_on_a_gpu_only_16_bit_layers_copy_their_input(method, recipe, monkeypatch):
    """PEFT does not where its layer is in 4 bits and autocast is on, on CUDA alone."""
    tiny = of_recipe(recipe(METHODS[method], dropout=0.0), mixed_precision="bf16", on_gpu=True)
    found = activations(tiny)
    real = torch.set_autocast_enabled
    monkeypatch.setattr(
        torch, "set_autocast_enabled", lambda device, on: device == "cuda" or real(device, on)
    )
    assert (found < activations(tiny)) is (method == "qlora")


@pytest.mark.slow
def test_dropout_keeps_bytes_on_a_gpu(recipe):
    found = {
        (chance, on): activations(of_recipe(recipe(METHODS["full"], dropout=chance), on_gpu=on))
        for chance in (0.0, 0.1)
        for on in (False, True)
    }
    assert found[0.0, True] == found[0.0, False]
    with_dropout = found[0.1, True] - found[0.0, True]
    assert 0 < with_dropout < 0.5 * (found[0.1, False] - found[0.0, False])


@pytest.mark.parametrize(
    ("model_type", "method", "dropout"),
    [("bert", "lora", 0.1), ("bert", "full", 0.1), ("llama", "lora", 0.0), ("gpt2", "full", 0.0)],
)
def test_what_a_gpu_recomputes_it_recomputes_with_its_own_kernels(
    recipe, monkeypatch, model_type, method, dropout
):
    asked = []
    real = _GpuKernels.__torch_function__

    def noted(self, func, types, args=(), kwargs=None):
        asked.append(func)
        return real(self, func, types, args, kwargs)

    monkeypatch.setattr(_GpuKernels, "__torch_function__", noted)
    attention = []
    for again in (False, True):
        tiny = recipe(METHODS[method], model_type, dropout=dropout, gradient_checkpointing=again)
        asked.clear()
        predict.predict(of_recipe(tiny, mixed_precision="bf16", on_gpu=True))
        attention.append(asked.count(functional.scaled_dot_product_attention))
    # Three blocks, forwards and in evaluation, and forwards once more in the backward pass.
    assert attention == [3 + 3, 3 + 3 + 3]


def test_a_gpu_counts_the_workspaces_of_cublas_but_for_loading(recipe):
    tiny = recipe(METHODS["full"], dropout=0.0)
    on_cpu, on_gpu = (predict.predict(of_recipe(tiny, on_gpu=on)).phases for on in (False, True))
    for phase, peak in on_gpu.items():
        more = 0 if phase == "load" else CUBLAS_WORKSPACES_BYTES
        rounding = peak.by_kind["rounding"]
        assert 0 < rounding < 0.1 * on_cpu[phase].total_bytes
        assert peak.total_bytes == on_cpu[phase].total_bytes + more + rounding
        assert sum(peak.by_kind.values()) == peak.total_bytes


@pytest.mark.parametrize(
    ("model_type", "limit"),
    [
        ("bert", 66),
        ("gpt2", 66),
        ("roberta", 65),
        ("llama", None),
        pytest.param("bart", 66, marks=pytest.mark.slow),
    ],
)
def test_an_example_longer_than_the_models_positions_is_refused(recipe, model_type, limit):
    tiny = recipe(METHODS["lora"], model_type)
    if limit is None:
        assert predict.predict(of_recipe(tiny, length=200)).peak.total_bytes
        return
    assert predict.predict(of_recipe(tiny, length=limit)).peak.total_bytes
    with pytest.raises(UsageError, match=f"positions for {limit}"):
        predict.predict(of_recipe(tiny, length=limit + 1))


def test_a_batch_without_padding_keeps_no_mask(recipe):
    padded = of_recipe(recipe(METHODS["full"], dropout=0.0), on_gpu=True)
    bare = replace(padded, train=replace(padded.train, padded=False))
    assert activations(bare) < activations(padded)


def test_the_largest_step_that_is_taken_counts(recipe, tiny_base):
    from transformers import AutoTokenizer

    from peftkit.planning.setting import build_task

    # Of one example a step, so that the longest is the largest.
    one_by_one = {"per_device_train_batch_size": 1}
    short = recipe(METHODS["full"], max_steps=1, **one_by_one)
    long = recipe(METHODS["full"], max_steps=96, **one_by_one)
    data = build_task(short).load(AutoTokenizer.from_pretrained(tiny_base), seed=0)
    one, all_of_them = (
        train_shape(data.train, each.training, seed=0, processes=1) for each in (short, long)
    )
    assert one.examples * one.tokens <= all_of_them.examples * all_of_them.tokens
    assert all_of_them.tokens == max(data.train.lengths)


@pytest.mark.slow
def test_a_model_of_70_billion_is_planned_from_its_config(tmp_path):
    import resource
    import time

    from transformers import AutoConfig

    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    AutoConfig.for_model("llama", **sizes, **heads).save_pretrained(tmp_path / "base")
    content = {
        "base": {"name": str(tmp_path / "base")},
        "task": {"type": "classification", "dataset": "none", "text_columns": ["text"]},
        "method": {"type": "qlora", "r": 16},
        "training": {"learning_rate": 1e-4, "per_device_train_batch_size": 1},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    started = time.process_time()
    recipe = load_recipe(tmp_path / "r.yaml")
    found = predict.predict(of_recipe(recipe, length=512, mixed_precision="bf16", on_gpu=True))
    assert time.process_time() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20
    billions = found.phases["load"].by_kind["base_weights"] / 1e9
    assert math.isclose(billions, 68.5 / 2 + 128256 * 8192 * 2 / 1e9, rel_tol=0.02)
    assert torch.empty(1).device.type == "cpu"
