"""Fits, largest batches, other methods and shares, over a prediction that is known."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from peftkit.errors import MethodError, UsageError
from peftkit.memory.storage_tape import Peak
from peftkit.planning.answers import answers
from peftkit.planning.budget import GIB, GPU_RESERVE_BYTES, Budget, gib, gpu_budget, parse_size
from peftkit.planning.fitting import MAX_BATCH, cheapest_change, largest_batch
from peftkit.planning.predict import Prediction
from peftkit.planning.sentences import (
    sentence,
    sentence_of_all,
    sentence_of_all_without_budget,
    sentence_without_budget,
)
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
    evaluation: Shape = field(default_factory=lambda: Shape(1, 128))

    @property
    def method_section(self):
        return self.method.config

    @property
    def method_type(self):
        return self.method.config.type

    def with_batch(self, examples):
        return replace(self, train=Shape(examples, self.train.tokens))


def setting(kind="lora", **training):
    given = {"learning_rate": 1e-4, "per_device_train_batch_size": 32}
    given |= {"per_device_eval_batch_size": 1, **training}
    ranks = {"r": 16} if "lora" in kind else {}
    config = SimpleNamespace(type=kind, **ranks)
    return Setting(SimpleNamespace(config=config), TrainingConfig(**given))


def ask(wanted):
    """100 MiB an example, 10 with recomputation."""
    each = (10 if wanted.training.gradient_checkpointing else 100) * 2**20
    held = WEIGHTS[wanted.method_type]
    peak = Peak(held + each * wanted.train.examples, {"base_weights": held})
    scoring = Peak(held + 20 * 2**20 * wanted.evaluation.examples, {"base_weights": held})
    rest = {"load": Peak(held, {"base_weights": held}), "evaluation": scoring}
    rest["optimizer_step"] = rest["load"]
    phases = dict.fromkeys(("forward", "backward"), peak) | rest
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


def test_the_search_for_the_largest_batch_ends_somewhere():
    assert largest_batch(setting(), 10**6 * GIB, ask=ask) == MAX_BATCH


def budget(gibibytes):
    return Budget("budget", int(gibibytes * GIB))


def test_what_fits_is_said_with_what_is_spare_and_what_a_better_method_needs():
    found = answers("sst2", setting(), budget(8), ask=ask)
    assert (found.fits, found.largest_batch) == (True, 61)
    assert sentence(found) == (
        "LoRA r=16 with batch 32 fits in 8.0 GiB with 2.9 GiB to spare; "
        "full fine-tuning needs at least 8.1 GiB."
    )
    assert [choice.method for choice in found.methods] == ["full", "lora", "qlora", "top_layers"]
    assert [choice.fits for choice in found.methods] == [False, True, True, True]


def test_a_better_method_that_fits_as_well_is_mentioned():
    found = answers("sst2", setting("qlora"), budget(6), ask=ask)
    assert sentence(found).endswith("at least 8.0 GiB, LoRA r=16 fits as well.")
    tight = answers("sst2", setting("qlora"), budget(4.5), ask=ask)
    assert sentence(tight).endswith(
        "LoRA r=16 needs 5.1 GiB, or 3.6 GiB with batch 16 accumulated 2 times."
    )


def overrides(choice):
    return choice.change.overrides


def test_what_does_not_fit_is_made_to_fit_by_smaller_batches_first():
    found = answers("sst2", setting(), budget(4), ask=ask)
    lora = found.methods[1]
    assert (found.fits, lora.fits) == (False, False)
    assert overrides(lora) == [
        "training.per_device_train_batch_size=16",
        "training.gradient_accumulation_steps=2",
    ]
    assert sentence(found).startswith(
        "LoRA r=16 with batch 16 accumulated 2 times fits in 4.0 GiB with 0.4 GiB to spare"
    )


def test_the_effective_batch_stays():
    start = setting(gradient_accumulation_steps=3)
    change, _ = cheapest_change(start, ask(start), int(2.5 * GIB), ask)
    assert change.batch * change.gradient_accumulation_steps == 32 * 3
    assert change.batch == 4


def test_where_one_example_is_too_much_checkpointing_comes_on_top():
    def large(wanted):
        """An example takes 1 GiB, or a tenth with recomputation."""
        each = GIB // (10 if wanted.training.gradient_checkpointing else 1)
        held, activations = Peak(2 * GIB), each * wanted.train.examples
        peak = Peak(2 * GIB + activations, {"activations": activations})
        rest = {"load": held, "optimizer_step": held, "evaluation": held}
        return Prediction({"forward": peak, **rest}, block_bytes=0)

    change, _ = cheapest_change(setting(), large(setting()), int(2.9 * GIB), large)
    assert change.overrides == [
        "training.per_device_train_batch_size=8",
        "training.gradient_accumulation_steps=4",
        "training.gradient_checkpointing=true",
    ]
    none, least = cheapest_change(setting(), large(setting()), int(2.05 * GIB), large)
    assert (none, least) == (None, 2 * GIB + GIB // 10)


def test_where_evaluation_is_what_does_not_fit_its_batches_alone_are_made_smaller():
    large = replace(setting(per_device_eval_batch_size=512), evaluation=Shape(512, 128))
    found = answers("sst2", large, budget(6), ask=ask)
    assert overrides(found.methods[1]) == ["training.per_device_eval_batch_size=128"]


def test_accumulation_may_cost_a_constant():
    """What two micro-batches keep that one does not; the first guess is then too large."""

    def accumulating(wanted):
        more = wanted.training.gradient_accumulation_steps > 1
        held, each = Peak(2 * GIB), 100 * 2**20
        peak = Peak(2 * GIB + each * wanted.train.examples + more * GIB // 2)
        rest = {"load": held, "optimizer_step": held, "evaluation": held}
        return Prediction({"forward": peak, **rest}, block_bytes=0)

    room = 4 * GIB
    change, _ = cheapest_change(setting(), accumulating(setting()), room, accumulating)
    assert change.batch == 8
    assert change.peak_bytes <= room


def test_what_no_batch_changes_is_not_searched():
    asked = []
    change, least = cheapest_change(setting("full"), ask(setting("full")), GIB, asked.append)
    assert (change, least, asked) == (None, 8 * GIB, [])


def test_a_smaller_batch_takes_one_prediction():
    asked = []
    cheapest_change(
        setting(), ask(setting()), 4 * GIB, lambda wanted: asked.append(wanted) or ask(wanted)
    )
    assert [wanted.train.examples for wanted in asked] == [16]


def test_where_no_activations_are_kept_checkpointing_is_not_tried():
    asked = []

    def without(wanted):
        asked.append(wanted)
        held, peak = Peak(2 * GIB), Peak(3 * GIB + wanted.train.examples * 2**20)
        rest = {"load": held, "optimizer_step": held, "evaluation": held}
        return Prediction({"forward": peak, **rest}, block_bytes=0)

    change, least = cheapest_change(setting(), without(setting()), int(2.5 * GIB), without)
    assert (change, least) == (None, 3 * GIB + 2**20)
    assert not any(wanted.training.gradient_checkpointing for wanted in asked)


def test_an_optimizer_in_8_bits_is_the_last_resort_of_the_recipes_own_method():
    def with_state(wanted):
        state = 2 * GIB // (4 if wanted.training.optimizer == "adamw_8bit" else 1)
        held = WEIGHTS[wanted.method_type]
        peak = Peak(held + state)
        rest = {"load": Peak(held), "evaluation": Peak(held)}
        return Prediction({"forward": peak, "optimizer_step": peak, **rest}, block_bytes=0)

    found = answers("sst2", setting("full"), budget(9), ask=with_state)
    assert found.methods[0].advice == ["training.optimizer=adamw_8bit"]
    assert answers("sst2", setting("lora"), budget(9), ask=with_state).methods[0].change is None


def test_another_method_is_named_where_this_one_cannot_fit():
    found = answers("sst2", setting("full"), budget(6), ask=ask)
    assert found.recommended.advice == ["method={type: lora}"]
    assert sentence(found) == (
        "LoRA r=8 with batch 32 fits in 6.0 GiB with 0.9 GiB to spare; "
        "full fine-tuning needs at least 8.0 GiB."
    )


@pytest.mark.parametrize(("gibibytes", "add"), [(12, False), (4, True)])
def test_the_recipes_own_method_is_preferred_if_it_can_fit(gibibytes, add):
    found = answers("sst2", setting("lora"), budget(gibibytes), ask=ask)
    assert found.recommended.method == "lora"
    assert bool(found.recommended.advice) == add


def test_where_nothing_fits_it_says_what_each_method_needs():
    found = answers("sst2", setting("full"), budget(0.5), ask=ask)
    assert (found.largest_batch, found.recommended) == (0, None)
    assert sentence(found) == (
        "Nothing fits in 0.5 GiB, however small the batch: full fine-tuning needs at least 8.0 "
        "GiB, LoRA r=8 needs at least 2.0 GiB, QLoRA r=8 needs at least 1.0 GiB, top-layer "
        "freezing needs at least 3.0 GiB; take a smaller base, shorter examples or more memory."
    )


def test_a_method_that_cannot_be_planned_has_its_reason_and_no_number():
    def refusing(wanted):
        if wanted.method_type == "top_layers":
            raise MethodError("no single stack of blocks")
        return ask(wanted)

    last = answers("sst2", setting(), budget(4), ask=refusing).methods[-1]
    assert (last.peak_bytes, last.fits, last.reason) == (None, False, "no single stack of blocks")


def test_of_several_recipes_the_best_that_fits_is_named():
    def said(gibibytes, *kinds):
        found = [answers(f"a_{kind}", setting(kind), budget(gibibytes), ask=ask) for kind in kinds]
        return sentence_of_all(found)

    kinds = ("top_layers", "qlora", "lora", "full")
    assert said(6, *kinds).startswith(
        "2 of these 4 recipes fit as they stand; the best score is to be expected of a_lora: LoRA"
    )
    assert said(3, "full", "qlora").startswith("None of these recipes fits as it stands; the best")
    assert said(0.5, "full", "qlora").endswith("or more memory.")


@pytest.mark.parametrize(
    ("need", "words"),
    [
        (3, "LoRA r=16 with batch 32 needs 3.0 GiB, which t4 (14.6 GiB) and every larger GPU"),
        (14, "needs 14.0 GiB, which v100-16 (15.8 GiB) and every larger GPU known here has."),
        (500, "needs 500.0 GiB, more than the largest GPU known here, b200 (178.4 GiB), has."),
    ],
)
def test_without_a_budget_the_smallest_gpu_that_has_as_much_is_named(need, words):
    found = Prediction({"forward": Peak(need * GIB)}, block_bytes=0)
    assert words in sentence_without_budget(setting(), found)
    small = Prediction({"forward": Peak(GIB)}, block_bytes=0)
    of_all = sentence_of_all_without_budget(["a", "b"], [setting()] * 2, [small, found])
    assert of_all.startswith("Of these 2 recipes b needs the most: LoRA r=16")
    assert words in of_all


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
