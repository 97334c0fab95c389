import warnings
from typing import get_args

import pytest
import torch

from peftkit.contracts import ParameterGroup
from peftkit.training.config import OptimizerName, TrainingConfig
from peftkit.training.optimizers import (
    build_optimizer,
    learning_rate_factor,
    set_learning_rates,
)

CLASSES = {
    "adamw": "AdamW",
    "adam": "Adam",
    "adagrad": "Adagrad",
    "sgd": "SGD",
    "rmsprop": "RMSprop",
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
}


def config(**values):
    return TrainingConfig(**{"learning_rate": 1e-2, **values})


def network():
    """A matrix large enough for 8-bit states, a bias, a norm and a tensor of three dimensions."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv1d(1, 2, 3, padding=1), torch.nn.Linear(128, 64), torch.nn.LayerNorm(64)
    )


def groups(model, rate=1e-2):
    return [ParameterGroup(list(model.parameters()), rate)]


def step_once(optimizer, model):
    model(torch.ones(2, 1, 128)).pow(2).mean().backward()
    with warnings.catch_warnings():
        # bitsandbytes says on a CPU that its paged optimizers are the plain ones there.
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        optimizer.step()
    optimizer.zero_grad()


def test_every_name_of_the_recipe_is_covered_here():
    assert set(CLASSES) == set(get_args(OptimizerName))


@pytest.mark.parametrize("name", CLASSES)
def test_each_optimizer_is_the_one_named_and_steps_on_a_cpu(name):
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = build_optimizer(config(optimizer=name), groups(model))
    for _ in range(3):
        step_once(optimizer, model)
    assert type(optimizer).__name__ == CLASSES[name]
    for key, value in model.state_dict().items():
        assert torch.isfinite(value).all()
        assert not torch.equal(value, before[key]), key


def test_8bit_states_take_a_byte():
    model = network()
    optimizer = build_optimizer(config(optimizer="adamw_8bit"), groups(model))
    step_once(optimizer, model)
    assert optimizer.state[model[1].weight]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", CLASSES)
def test_weight_decay_is_for_parameters_of_two_or_more_dimensions_only(name):
    model = network()
    optimizer = build_optimizer(config(optimizer=name, weight_decay=0.25), groups(model))
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert len(decays) == len(list(model.parameters())) == 6
    for key, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.25 if parameter.ndim >= 2 else 0.0), key


def test_only_the_decayed_parameters_shrink_without_a_gradient():
    model = network()
    optimizer = build_optimizer(config(weight_decay=0.5), groups(model, rate=0.1))
    before = {key: value.clone() for key, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        shrink = 1 - 0.1 * 0.5 if parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(parameter, before[key] * shrink)


def test_settings_of_the_recipe_reach_the_optimizer():
    model = network()
    values = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "momentum": 0.7}
    for name in ("adamw", "adam", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"):
        group = build_optimizer(config(optimizer=name, **values), groups(model)).param_groups[0]
        assert tuple(group["betas"]) == (0.8, 0.95)
        assert group["eps"] == 1e-6
    for name in ("sgd", "rmsprop"):
        group = build_optimizer(config(optimizer=name, **values), groups(model)).param_groups[0]
        assert group["momentum"] == 0.7


@pytest.mark.parametrize("name", CLASSES)
def test_each_group_keeps_its_own_rate_scaled_by_the_schedule(name):
    model = network()
    low, high = list(model[1].parameters()), list(model[2].parameters())
    given = [ParameterGroup(low, 1e-3), ParameterGroup(high, 4e-3)]
    optimizer = build_optimizer(config(optimizer=name), given)
    for factor in (0.5, 0.25, 0.0, 1.0):
        set_learning_rates(optimizer, factor)
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        assert {rates[id(p)] for p in low} == {1e-3 * factor}
        assert {rates[id(p)] for p in high} == {4e-3 * factor}


def test_a_rate_of_zero_moves_nothing():
    model = network()
    optimizer = build_optimizer(config(weight_decay=0.5), groups(model))
    before = {key: value.clone() for key, value in model.named_parameters()}
    set_learning_rates(optimizer, 0.0)
    step_once(optimizer, model)
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())


def factors(total, **values):
    made = config(**values)
    return [learning_rate_factor(made, step, total) for step in range(total)]


def test_linear_reaches_the_peak_after_warm_up_and_falls_evenly_towards_zero():
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert factors(8, lr_scheduler_type="linear", warmup_steps=4) == expected


def test_cosine_is_half_at_the_middle_after_warm_up():
    found = factors(10, lr_scheduler_type="cosine", warmup_steps=2)
    assert found[:3] == [0.5, 1.0, 1.0]
    assert found[6] == pytest.approx(0.5, abs=1e-12)
    assert found[4] == pytest.approx(0.8535533905932737, abs=1e-12)
    assert found[8] == pytest.approx(0.1464466094067263, abs=1e-12)
    made = config(lr_scheduler_type="cosine", warmup_steps=2)
    assert learning_rate_factor(made, 10, 10) == pytest.approx(0.0, abs=1e-12)


def test_constant_stays_at_the_peak():
    assert factors(5, lr_scheduler_type="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_no_warm_up_starts_at_the_peak():
    assert factors(4, lr_scheduler_type="linear", warmup_steps=0) == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [
        (0.5, 8, 4),
        (0.06, 50, 3),
        (0.07, 100, 7),
        (0.29, 100, 29),
        (0.01, 10, 1),
        (0.061, 50, 4),
        (0.0, 10, 0),
        (1, 10, 1),
        (3, 10, 3),
    ],
)
def test_warm_up_is_a_fraction_below_one_and_steps_from_one_on(warmup, total, steps):
    found = factors(total, lr_scheduler_type="constant", warmup_steps=warmup)
    assert found == [(i + 1) / steps if i < steps else 1.0 for i in range(total)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_rates_stay_within_zero_and_the_peak_for_any_length(schedule):
    for total in (1, 2, 3, 10, 97):
        for warmup in (0, 0.06, 0.5, 0.999, 1, total, 2 * total):
            found = factors(total, lr_scheduler_type=schedule, warmup_steps=warmup)
            assert all(0.0 < factor <= 1.0 for factor in found), (total, warmup)
