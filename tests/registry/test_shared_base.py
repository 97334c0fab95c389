"""Many deltas on one base in memory answer as each would alone, and leave the base as it was."""

import copy
import sys
import threading
from contextlib import nullcontext

import pytest
import tiny_runs
import torch
from stored_deltas import LORA, QLORA, SECTIONS, store

from peftkit.contracts import Quantisation
from peftkit.errors import RegistryError
from peftkit.modeling.sharing import Held, LiveBase
from peftkit.registry.loading import load_delta
from peftkit.registry.mixing import LoraMixture
from peftkit.registry.shared import SharedBase
from peftkit.registry.store import Registry
from peftkit.registry.structures import Structure


@pytest.fixture(scope="module")
def registry(base_of, tmp_path_factory):
    """Every kind of delta over the tiny BERT in float32; `one` and `three` say their labels."""
    registry = Registry(tmp_path_factory.mktemp("registry"))
    for seed, (name, section) in enumerate(SECTIONS.items()):
        store(registry, base_of("bert"), name, section, seed=seed)
    store(registry, base_of("bert"), "one", LORA, labels=1, seed=50)
    store(registry, base_of("bert"), "one-other", LORA, labels=1, seed=52)
    store(registry, base_of("bert"), "three", SECTIONS["top_layers"], labels=3, seed=51)
    return registry


@pytest.fixture
def shared(base_of, registry):
    return SharedBase(base_of("bert"), registry)


@pytest.fixture(scope="module")
def alone(base_of, registry):
    """Name → logits of the delta on a base of its own, for a batch of `make_batch`."""

    def answer(name, batch, precision="no", where=registry):
        model = load_delta(name, registry=where).model
        return tiny_runs.logits_of(model, batch, mixed_precision=precision).float()

    return answer


def batch_of(base_of, model_type="bert", **options):
    return tiny_runs.make_batch(base_of(model_type), **({"seed": 99} | options))


def answers(shared, name, batch):
    with shared.using(name):
        return shared(batch)


def test_every_kind_of_delta_answers_as_it_does_alone(base_of, shared, alone):
    batch, digest = batch_of(base_of), shared.digest()
    names = [*SECTIONS, "one", "three"]
    expected = {name: alone(name, batch) for name in names}
    assert [shared.attach(name) for name in names] == [f"{name}@v1" for name in names]
    for name in [*names, *reversed(names)]:
        shared.switch(name)
        assert torch.equal(shared(batch), expected[name]), name
    assert shared.digest() == digest


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bert", "llama"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_other_precisions_and_bases(base_of, tmp_path, alone, model_type, precision):
    registry, batch = Registry(tmp_path), batch_of(base_of, model_type)
    held = Held({"no": torch.float32, "bf16": torch.bfloat16}[precision])
    names = ["full", "top_layers", "lora", "dora"]
    for name in names:
        store(registry, base_of(model_type), name, SECTIONS[name], precision=precision)
    shared = SharedBase(base_of(model_type), registry, held=held)
    for name in names:
        shared.attach(name)
    for name in [*names, *names]:
        expected = alone(name, batch, precision, registry)
        assert torch.equal(answers(shared, name, batch), expected), name


@pytest.mark.parametrize("section", [QLORA, QLORA | {"use_dora": True}])
def test_a_base_in_four_bits(base_of, tmp_path, alone, section):
    registry, batch = Registry(tmp_path), batch_of(base_of)
    for name, labels in (("two", 2), ("other", 2), ("one", 1)):
        store(registry, base_of("bert"), name, section, labels=labels, seed=len(name))
    shared = SharedBase(base_of("bert"), registry, held=Held(quantisation=Quantisation()))
    digest = shared.digest()
    for name in ["two", "other", "one"]:
        shared.attach(name)
    for name in ["two", "other", "one", "two"]:
        assert torch.equal(answers(shared, name, batch), alone(name, batch, where=registry))
    assert shared.digest() == digest


def test_the_plain_base_answers_with_hidden_states(base_of, shared):
    from transformers import AutoModel

    batch = batch_of(base_of)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        expected = AutoModel.from_pretrained(base_of("bert"))(**inputs).last_hidden_state
    shared.attach("full")
    shared.switch("full")
    shared.switch(None)
    assert torch.equal(shared(batch), expected)


def addresses(model):
    return {name: p.data_ptr() for name, p in model.named_parameters()}


def unshared(shared, name):
    """Parameters of an attached delta's model that lie neither in the base nor in its slots."""
    shared.switch(name)
    structure = shared._attached[f"{name}@v1"].structure
    own = {slot.data_ptr() for slot in structure.slots.values()}
    known = shared._base.pointers() | own
    return [n for n, pointer in addresses(structure.model).items() if pointer not in known]


def test_no_delta_has_a_copy_of_the_base(shared):
    for name in ["full", "top_layers", "lora", "dora", "one", "three"]:
        shared.attach(name)
        strange = unshared(shared, name)
        assert [n for n in strange if ".original_module." not in n] == [], name


def test_a_base_that_is_copied_is_noticed(shared, monkeypatch):
    monkeypatch.setattr("peftkit.modeling.sharing.shared_copy", lambda m, _=None: copy.deepcopy(m))
    shared.attach("lora")
    assert len(unshared(shared, "lora")) > 20


def test_another_class_shares_the_base_too(base_of):
    base = LiveBase(base_of("bert"), Held())
    first = base.model(tiny_runs.AUTO_CLASS, {})
    other = base.model("AutoModelForQuestionAnswering", {})
    assert addresses(other.bert).items() <= addresses(first.bert).items()
    assert len(addresses(other.bert)) > 20


CYCLE = ["full", "top_layers", "lora", "dora", "one", "three"]


def cycle(shared, batch, count):
    for _ in range(count):
        for name in CYCLE:
            shared.attach(name)
            shared.switch(name)
            shared(batch)
        shared.switch(None)
        for name in CYCLE:
            shared.detach(name)


@pytest.mark.slow
def test_the_base_is_the_same_to_the_last_bit_after_100_cycles(base_of, shared):
    digest, batch = shared.digest(), batch_of(base_of, size=1)
    before = answers(shared, None, batch)
    cycle(shared, batch, 100)
    assert shared.digest() == digest
    assert torch.equal(shared(batch), before)


def test_adding_and_subtracting_would_be_noticed(base_of, shared, monkeypatch):
    base, added = shared._base._tensors, {}

    def place(self, owner, tensors):
        for name, tensor in zip(self.slots, tensors, strict=True):
            own = base.get(name.removeprefix("bert."))
            if own is not None and owner not in added:
                own.data.add_((tensor - own).bfloat16())
        added[owner] = dict(zip(self.slots, tensors, strict=True))

    def clear(self, owner):
        for name, tensor in added.pop(owner).items():
            own = base.get(name.removeprefix("bert."))
            if own is not None:
                own.data.sub_((tensor - own).bfloat16())

    monkeypatch.setattr(Structure, "place", place)
    monkeypatch.setattr(Structure, "clear", clear)
    digest = shared.digest()
    cycle(shared, batch_of(base_of, size=1), 1)
    assert shared.digest() != digest


@pytest.mark.parametrize("stop_at", [0, 7, 20])
@pytest.mark.parametrize("names", [("lora", "lora-other"), ("full", "full-other")])
def test_an_exception_in_the_middle_of_a_switch_leaves_nothing_behind(
    base_of, shared, alone, names, stop_at
):
    batch, digest = batch_of(base_of), shared.digest()
    for name in names:
        shared.attach(name)
    shared.switch(names[0])
    tensors = shared._attached[f"{names[1]}@v1"].tensors
    kept, tensors[stop_at] = tensors[stop_at], "no tensor"
    with pytest.raises(TypeError):
        shared.switch(names[1])
    tensors[stop_at] = kept
    assert shared.active == f"{names[0]}@v1"
    assert torch.equal(shared(batch), alone(names[0], batch))
    assert torch.equal(answers(shared, names[1], batch), alone(names[1], batch))
    assert shared.digest() == digest


MIXED = ["lora", "lora-other", "full", None, "dora", "lora", "prefix", "rslora", "three"]


def row_by_row(shared, batch, deltas):
    found = []
    for row, name in enumerate(deltas):
        with shared.using(name):
            found += shared({key: tensor[row : row + 1] for key, tensor in batch.items()})
    return found


def differences(one, other):
    return [float((a - b).abs().max()) for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize(
    "deltas",
    [
        MIXED,
        ["lora", "lora-other", "lora-other", "lora"],
        ["lora", "saved", "saved", "saved-other"],
        ["full", "top_layers", "full", "lora"],
        ["one", "one", "one", "one-other"],
        ["dora", "dora", "dora-other", "lora"],
        ["lora-own-biases", "lora-own-biases-other", "lora-own-biases"],
        ["lora-tokens", "lora-tokens-other", "lora-tokens", "lora-biases"],
        ["lora-embeddings", None, "ia3", "vera"],
    ],
)
def test_each_row_answers_with_its_own_delta(base_of, shared, deltas):
    batch = batch_of(base_of, size=len(deltas))
    for name in {name for name in deltas if name}:
        shared.attach(name)
    found = shared(batch, deltas=deltas)
    expected = row_by_row(shared, batch, deltas)
    assert max(differences(found, expected)) <= 1e-6
    assert isinstance(found, list) == (len({row.shape for row in expected}) > 1)


@pytest.mark.parametrize("labels", ["lora", "one"])
def test_plain_lora_goes_through_one_forward(base_of, shared, monkeypatch, labels):
    deltas = [labels, f"{labels}-other", labels, f"{labels}-other"]
    batch, calls = batch_of(base_of, size=4), []
    for name in deltas:
        shared.attach(name)
    forward = LoraMixture.__call__
    monkeypatch.setattr(
        LoraMixture, "__call__", lambda *args: (calls.append(args[1]), forward(*args))[1]
    )
    found = shared(batch, deltas=deltas)
    assert calls == [[f"{name}@v1" for name in deltas]]
    shared.detach(f"{labels}-other")
    shared.attach(f"{labels}-other")
    assert torch.equal(shared(batch, deltas=deltas), found)


def test_an_answer_of_another_delta_is_no_rounding(base_of, shared):
    batch = batch_of(base_of, size=3)
    for name in ["lora", "lora-other", "full"]:
        shared.attach(name)
    found = shared(batch, deltas=["lora", "lora-other", "full"])
    wrong = row_by_row(shared, batch, ["lora-other", "full", "lora"])
    assert min(differences(found, wrong)) > 1e-4


def test_a_row_needs_a_delta(base_of, shared):
    shared.attach("lora")
    with pytest.raises(RegistryError, match="2 for a batch of 8 rows; give one a row"):
        shared(batch_of(base_of), deltas=["lora", None])
    with pytest.raises(
        RegistryError, match=r"'dora': no such delta is attached; did you .*lora@v1"
    ):
        shared(batch_of(base_of), deltas=["lora"] * 7 + ["dora"])


def wrong_answers(shared, batches, expected):
    """How many calls of four threads, each switching to its own delta, answer with another's."""
    wrong = []

    def work(name):
        for _ in range(25):
            for index, batch in enumerate(batches):
                shared.switch(name)
                if not torch.equal(shared(batch), expected[name][index]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(wrong)


@pytest.fixture
def eager_threads():
    """Threads that change places as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("locked", [True, False])
def test_threads_get_the_answers_of_their_own_delta(base_of, shared, eager_threads, locked):
    names = ["lora", "lora-other", "full", "full-other"]
    batches = [batch_of(base_of, size=2), batch_of(base_of, seed=5, size=2)]
    expected = {}
    for name in names:
        shared.attach(name)
        shared.switch(name)
        expected[name] = [shared(batch) for batch in batches]
    if not locked:
        shared._lock = nullcontext()
    assert (wrong_answers(shared, batches, expected) == 0) == locked
