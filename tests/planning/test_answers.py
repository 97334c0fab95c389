"""Fits, largest batches, other methods and shares, over a prediction that is known."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from peftkit.errors import UsageError
from peftkit.memory.storage_tape import Peak
from peftkit.planning.answers import answers, largest_batch
from peftkit.planning.budget import GIB, GPU_RESERVE_BYTES, Budget, gib, gpu_budget, parse_size
from peftkit.planning.predict import Prediction
from peftkit.planning.setting import Shape
from peftkit.planning.sharding import GATHERED_BLOCKS, sharded
from peftkit.training.config import TrainingConfig

WEIGHTS = {"full": 8 * GIB, "lora": 2 * GIB, "qlora": GIB, "top_layers": 3 * GIB}


@dataclass(frozen=True)
class Setting:
    """Stands for a real one: so much an example, and a weight by method."""

    method: object
    training: TrainingConfig
    train: Shape = field(default_factory=lambda: Shape(32, 128))
    evaluation: Shape = field(default_factory=lambda: Shape(0, 128))

    @property
    def method_section(self):
        return self.method.config

    @property
    def method_type(self):
        return self.method.config.type

    def with_batch(self, examples):
        return replace(self, train=Shape(examples, self.train.tokens))


def setting(kind="lora", **training):
    given = {"learning_rate": 1e-4, "per_device_train_batch_size": 32, **training}
    config = SimpleNamespace(type=kind, r=16)
    return Setting(SimpleNamespace(config=config), TrainingConfig(**given))


def ask(wanted):
    """100 MiB an example, 10 with recomputation."""
    each = (10 if wanted.training.gradient_checkpointing else 100) * 2**20
    held = WEIGHTS[wanted.method_type]
    peak = Peak(held + each * wanted.train.examples, {"base_weights": held})
    scoring = Peak(held + 20 * 2**20 * wanted.evaluation.examples, {"base_weights": held})
    rest = {"load": Peak(held, {"base_weights": held}), "evaluation": scoring}
    phases = dict.fromkeys(("forward", "backward", "optimizer_step"), peak) | rest
    return Prediction(phases, block_bytes=2**20)


def test_the_largest_batch_fits_and_one_more_does_not():
    room = 5 * GIB
    batch = largest_batch(setting(), room, ask=ask)
    assert ask(setting().with_batch(batch)).peak.total_bytes <= room
    assert ask(setting().with_batch(batch + 1)).peak.total_bytes > room
    assert largest_batch(setting(), GIB, ask=ask) == 0


@pytest.mark.parametrize("own", [1, 8, 32, 200])
@pytest.mark.parametrize("room", [3 * GIB, 4 * GIB, 12 * GIB])
def test_a_bent_line_gives_a_batch_that_fits_and_nearly_the_largest(own, room):
    """From 20 examples on, another moment is the highest."""

    def bent(wanted):
        examples = wanted.train.examples
        peak = Peak(2 * GIB + max(30 * examples, 90 * examples - 1200) * 2**20)
        return Prediction({"forward": peak}, block_bytes=0)

    def fits(batch):
        return bent(start.with_batch(batch)).training_bytes <= room

    start = setting().with_batch(own)
    true = max(batch for batch in range(1, 400) if fits(batch))
    assert 0.98 * true - 1 <= largest_batch(start, room, ask=bent) <= true


def test_on_a_straight_line_the_largest_batch_takes_two_predictions_beside_the_recipes_own():
    asked = []
    largest_batch(setting(), 8 * GIB, ask=lambda wanted: asked.append(wanted) or ask(wanted))
    assert {wanted.train.examples for wanted in asked} == {1, 32, 61}


def test_what_fits_is_said_with_what_is_spare():
    found = answers("sst2", setting(), Budget("budget", 8 * GIB), ask=ask)
    assert found.fits
    assert found.sentence == (
        "sst2: lora with batch 32 needs 5.1 GiB and fits in 8.0 GiB, with 2.9 GiB to spare; "
        "a batch of 61 would, too."
    )
    assert [option.change for option in found.methods] == [
        "method.type=full",
        "method.type=lora",
        "method.type=qlora",
        "method.type=top_layers",
    ]
    assert [option.fits for option in found.methods] == [False, True, True, True]


def test_what_does_not_fit_is_made_to_fit_first_by_what_changes_no_result():
    found = answers("sst2", setting(), Budget("budget", 4 * GIB), ask=ask)
    assert not found.fits
    assert found.ways[0].change == "training.gradient_checkpointing=true"
    assert found.ways[1].change == (
        "training.per_device_train_batch_size=16 training.gradient_accumulation_steps=2"
    )
    assert found.sentence.endswith(
        "over 4.0 GiB; with training.gradient_checkpointing=true it needs 2.3 GiB and fits."
    )


def test_where_evaluation_is_what_does_not_fit_its_batches_are_made_smaller():
    large = replace(setting(), evaluation=Shape(512, 128))
    found = answers("sst2", large, Budget("budget", 6 * GIB), ask=ask)
    assert (found.fits, found.largest_batch) == (False, largest_batch(setting(), 6 * GIB, ask=ask))
    assert [way.change for way in found.ways] == ["training.per_device_eval_batch_size=32"]
    tight = answers("sst2", large, Budget("budget", 4 * GIB), ask=ask)
    assert tight.ways[0].change == (
        "training.per_device_eval_batch_size=20 training.gradient_checkpointing=true"
    )


def test_another_method_is_named_where_this_one_cannot_fit():
    found = answers("sst2", setting("full"), Budget("budget", 6 * GIB), ask=ask)
    assert found.ways == []
    assert "with method.type=lora it needs 5.1 GiB and fits." in found.sentence


def test_where_nothing_fits_it_says_so():
    found = answers("sst2", setting("full"), Budget("budget", GIB // 2), ask=ask)
    assert found.largest_batch == 0
    assert found.sentence.endswith("nothing that was tried fits: take a smaller base.")


def test_a_gpu_keeps_some_memory_for_itself():
    card = gpu_budget("L4")
    assert card.usable_bytes == card.total_bytes - GPU_RESERVE_BYTES
    with pytest.raises(UsageError) as caught:
        gpu_budget("h1000")
    assert "did you mean 'h100'" in str(caught.value)
    assert "a100-40, a100-80" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GiB", 24 * GIB), ("16 GB", 16 * 10**9), ("0.5TiB", 512 * GIB), ("900MiB", 900 * 2**20)],
)
def test_sizes_are_read_as_written(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "24 gigs", ""])
def test_a_budget_without_a_unit_is_refused(text):
    with pytest.raises(UsageError, match="expected a number with a unit, such as 24GiB or 16GB"):
        parse_size(text)


def test_sizes_are_shown_for_people():
    assert (gib(3 * GIB), gib(50 * 2**20)) == ("3.0 GiB", "50 MiB")


KINDS = {
    "base_weights": 800,
    "trainable_weights": 80,
    "gradients": 80,
    "optimizer_state": 160,
    "activations": 400,
}


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("ddp", sum(KINDS.values()) + 80),
        ("zero2", 800 + 80 + 20 + 40 + 400),
        ("zero3", 200 + 20 + 20 + 40 + 400 + GATHERED_BLOCKS * 10),
        ("fsdp", 200 + 20 + 20 + 40 + 400 + GATHERED_BLOCKS * 10),
    ],
)
def test_kinds_are_shared_out_by_the_rule_of_each_strategy(how, expected):
    load = Peak(880, {"base_weights": 800, "trainable_weights": 80})
    found = Prediction({"load": load, "backward": Peak(sum(KINDS.values()), KINDS)}, 10)
    assert sharded(found, how, 4).phases["backward"].total_bytes == expected
    assert sharded(found, how, 1) is found
