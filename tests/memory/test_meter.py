import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peftkit.errors import RunError
from peftkit.memory import meter as meter_module
from peftkit.memory.meter import MemoryMeter, PhaseMemory

CPU = torch.device("cpu")
MIB = 2**20
WEIGHT = 8 * 8 * 4
"""Bytes of an 8 × 8 float32 weight."""
BATCH = 4 * 8 * 4


def allocated(meter: MemoryMeter, phase: str = "train_step") -> int | None:
    return meter.result()[phase].allocated_bytes


def peak_of(work, *roots) -> int | None:
    meter = MemoryMeter(CPU)
    with meter.phase("train_step"), meter.probe(roots):
        work()
    return allocated(meter)


def test_live_tensors_add_up():
    kept = []

    def work():
        kept.append(torch.zeros(1000))
        kept.append(torch.zeros(10, dtype=torch.float64))

    assert peak_of(work) == 4000 + 80


def test_a_view_is_not_counted_twice():
    def work():
        whole = torch.zeros(10, 100)
        parts = [whole[3:5], whole.t(), whole.view(-1), whole.detach()]
        assert len(parts) == 4

    assert peak_of(work) == 4000


def test_a_freed_tensor_is_subtracted():
    def work():
        first = torch.zeros(1000)
        view = first[:10]
        del first, view
        torch.zeros(1500)

    assert peak_of(work) == 6000


def test_a_storage_held_by_a_view_stays_counted():
    def work():
        first = torch.zeros(1000)
        view = first[:10]
        del first
        torch.zeros(1500)
        assert view.numel() == 10

    assert peak_of(work) == 4000 + 6000


def test_in_place_operations_add_nothing():
    def work():
        values = torch.zeros(1000)
        values.add_(1).mul_(2)
        values.zero_()

    assert peak_of(work) == 4000


def test_a_resized_storage_counts_at_its_new_size():
    def work():
        values = torch.zeros(10)
        values.resize_(1000)
        torch.zeros(100)

    assert peak_of(work) == 4000 + 400


def test_tensors_made_before_the_probe_count_once_an_operation_reads_them():
    before = torch.zeros(1000)
    assert peak_of(lambda: before.add_(1)) == 4000


def test_meta_tensors_weigh_nothing():
    assert peak_of(lambda: torch.zeros(1000, device="meta").add(1)) == 0


def test_parameters_buffers_and_gradients_are_counted_from_the_start():
    model = nn.Linear(8, 8, bias=False)
    model.register_buffer("scale", torch.zeros(16))
    model.weight.grad = torch.zeros(8, 8)
    assert peak_of(lambda: None, model) == WEIGHT + 64 + WEIGHT


def test_tied_weights_and_an_optimizer_of_the_same_model_count_once():
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    optimizer = torch.optim.SGD(first.parameters())
    assert peak_of(lambda: None, first, second, optimizer) == WEIGHT


def test_backward_counts_activations_and_gradients():
    model, batch = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh()), torch.ones(4, 8)

    def work():
        loss = model(batch).sum()
        loss.backward()

    # At the end of backward: weight, batch, loss and its gradient, gradient of the tanh input,
    # gradient of the weight. The tanh output is released by then.
    assert peak_of(work, model) == WEIGHT + BATCH + 4 + 4 + BATCH + WEIGHT


def test_frozen_parameters_keep_no_activations():
    model, batch = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh()), torch.ones(4, 8)
    model.requires_grad_(False)
    # At most the input and the output of tanh live beside the weight and the batch.
    assert peak_of(lambda: model(batch).sum(), model) == WEIGHT + BATCH + BATCH + BATCH


def test_frozen_parameters_beside_trained_ones_get_no_gradient():
    frozen, trained = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    frozen.requires_grad_(False)
    batch = torch.ones(4, 8)

    def work():
        loss = trained(frozen(batch)).sum()
        loss.backward()

    # Two weights, batch, hidden (saved for the gradient), loss and its gradient, one gradient.
    expected = 2 * WEIGHT + BATCH + BATCH + 4 + 4 + WEIGHT
    assert peak_of(work, frozen, trained) == expected


def test_state_made_in_the_first_step_is_counted():
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    model.weight.grad = torch.ones(8, 8)
    assert peak_of(optimizer.step, model, optimizer) == WEIGHT + WEIGHT + WEIGHT


def test_state_made_earlier_is_counted_from_the_start():
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.ones(8, 8)
    optimizer.step()
    optimizer.zero_grad()
    step_counter = 4
    assert peak_of(lambda: None, model, optimizer) == 3 * WEIGHT + step_counter


def test_gradients_set_to_none_are_subtracted():
    model = nn.Linear(8, 8, bias=False)
    model.weight.grad = torch.ones(8, 8)

    def work():
        model.zero_grad()
        torch.zeros(8, 8)

    assert peak_of(work, model) == WEIGHT + WEIGHT


def test_sparse_gradients_count_indices_and_values():
    table = nn.Embedding(100, 4, sparse=True)
    table.weight.grad = torch.sparse_coo_tensor(
        [[1, 2]], torch.ones(2, 4), (100, 4), check_invariants=True
    )
    indices, values = 2 * 8, 2 * 4 * 4
    assert peak_of(lambda: None, table) == 100 * 4 * 4 + indices + values


def test_a_probe_changes_no_bit_of_training():
    def trained(probing) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
        for _ in range(3):
            with probing([layer, optimizer]):
                optimizer.zero_grad()
                layer(torch.randn(2, 5, 16)).square().mean().backward()
                optimizer.step()
        return [p.detach() for p in layer.parameters()]

    meter = MemoryMeter(CPU)
    with meter.phase("train_step"):
        probed = trained(meter.probe)
    plain = trained(lambda roots: nullcontext())
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))
    assert allocated(meter) > 0


@pytest.fixture
def saved_model(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=500,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    return tmp_path


def test_loading_counts_every_parameter(saved_model, monkeypatch):
    from transformers import BertForSequenceClassification

    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    meter = MemoryMeter(CPU)
    with meter.phase("load"):
        model = BertForSequenceClassification.from_pretrained(saved_model, dtype=torch.bfloat16)
    parameters = sum(p.nbytes for p in model.parameters())
    # While a tensor is cast its float32 source lives beside it; the vocabulary is the largest.
    assert parameters <= allocated(meter, "load") <= parameters + 2 * 500 * 32 * 4
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def test_loading_restores_the_environment_that_it_found(monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "0")
    with MemoryMeter(CPU).phase("load"):
        assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "1"
    assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "0"


def test_a_probe_while_loading_adds_what_the_count_could_not_see():
    model = nn.Linear(8, 8, bias=False)
    meter = MemoryMeter(CPU)
    with meter.phase("load"):
        kept = torch.zeros(100)
        with meter.probe([model]):
            pass
    assert allocated(meter, "load") == kept.nbytes + WEIGHT


def test_nf4_layers_count_packed_and_dequantised_weights():
    import bitsandbytes as bnb

    weights = 64 * 64
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    layer.support_avx512bf16_for_cpu = False
    batch = torch.ones(2, 64, requires_grad=True)
    packed = weights // 2
    # 64 weights share a scale of one byte; the scales share one float, an offset and a table.
    scales = weights // 64 + 4 + 4 + 256 * 4
    assert peak_of(lambda: None, layer) == packed
    # Backward: batch and its gradient, loss and its gradient, the weight dequantised.
    peak = peak_of(lambda: layer(batch).sum().backward(), layer)
    assert peak == packed + scales + 2 * batch.nbytes + 4 + 4 + 4 * weights


def test_entering_a_phase_again_keeps_the_higher_peak():
    meter = MemoryMeter(CPU)
    for count in (1000, 3000, 2000):
        with meter.phase("eval"), meter.probe([]):
            torch.zeros(count)
    assert allocated(meter, "eval") == 12000


def test_several_probes_of_one_phase_keep_the_highest_peak():
    meter = MemoryMeter(CPU)
    with meter.phase("train_step"):
        for count in (3000, 1000):
            with meter.probe([]):
                torch.zeros(count)
    assert allocated(meter) == 12000


def test_phases_do_not_mix():
    meter = MemoryMeter(CPU)
    with meter.phase("train_step"), meter.probe([]):
        torch.zeros(3000)
    with meter.phase("eval"), meter.probe([]):
        torch.zeros(1000)
    assert allocated(meter, "eval") == 4000


def test_a_phase_without_a_probe_has_no_allocated_peak():
    meter = MemoryMeter(CPU)
    with meter.phase("eval"):
        torch.zeros(1000)
    assert allocated(meter, "eval") is None


def test_a_phase_that_fails_is_still_measured():
    meter = MemoryMeter(CPU)

    def fail():
        with meter.phase("train_step"), meter.probe([]):
            torch.zeros(1000)
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert allocated(meter) == 4000
    with meter.phase("eval"):
        pass
    assert set(meter.result()) == {"train_step", "eval"}


def test_overhead_grows_by_the_time_inside_probes(monkeypatch):
    ticks = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr(meter_module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    meter = MemoryMeter(CPU)
    with meter.phase("train_step"):
        for _ in range(2):
            with meter.probe([]):
                pass
    assert meter.overhead_seconds == 3.5


def test_misuse_is_refused():
    meter = MemoryMeter(CPU)
    with meter.phase("load"), pytest.raises(RunError) as nested, meter.phase("eval"):
        pass
    assert str(nested.value) == "memory phase 'eval': 'load' is open; leave that one first"
    with pytest.raises(RunError) as unknown, meter.phase("evaluation"):
        pass
    assert str(unknown.value) == (
        "memory phase 'evaluation': unknown; did you mean 'eval'? Choices: eval, load, train_step"
    )
    with pytest.raises(RunError) as outside, meter.probe([]):
        pass
    assert str(outside.value) == "memory probe: no phase is open; enter one with phase(…) first"
    with (
        meter.phase("eval"),
        meter.probe([]),
        pytest.raises(RunError) as twice,
        meter.probe([]),
    ):
        pass
    assert str(twice.value) == "memory probe: another probe is open; leave it first"


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel cannot reset the mark here"
)
def test_the_resident_peak_belongs_to_its_phase():
    meter = MemoryMeter(CPU)
    with meter.phase("train_step"):
        torch.ones(64 * MIB, dtype=torch.uint8)
    with meter.phase("eval"):
        pass
    peaks = meter.result()
    difference = peaks["train_step"].resident_bytes - peaks["eval"].resident_bytes
    assert 56 * MIB < difference < 80 * MIB


def test_a_mark_that_cannot_be_reset_is_used_only_where_it_tells(monkeypatch):
    marks = iter([100, 300, 300, 300, 300, 300, 300, 400, 400, 400])
    monkeypatch.setattr(meter_module, "_reset_high_water", lambda: False)
    monkeypatch.setattr(meter_module, "_high_water_bytes", lambda: next(marks))
    meter = MemoryMeter(CPU)
    seen = []
    for phase in ("load", "train_step", "load", "eval", "load"):
        with meter.phase(phase):
            pass
        seen.append(meter.result()[phase].resident_bytes)
    # It rose in load; train_step is unknown; load still holds the mark; eval raised it, after
    # which a second look at load cannot tell.
    assert seen == [300, None, 300, 400, None]


def test_without_proc_the_lifetime_peak_is_the_fallback(monkeypatch, tmp_path):
    monkeypatch.setattr(meter_module, "PROC", tmp_path / "absent")
    assert meter_module._reset_high_water() is False
    assert meter_module._proc_high_water() is None
    assert meter_module._high_water_bytes() > 10 * MIB


def test_cuda_reads_the_allocator_and_counts_nothing_itself(monkeypatch):
    resets = []
    peaks = iter([(500, 900), (300, 950)])
    now = {}

    def reset(device):
        resets.append(device)
        now["allocated"], now["reserved"] = next(peaks)

    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: now["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: now["reserved"])
    meter = MemoryMeter(torch.device("cuda", 1))
    for _ in range(2):
        with meter.phase("load"), meter.probe([nn.Linear(8, 8)]):
            assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
    resident = meter.result()["load"].resident_bytes
    assert meter.result() == {"load": PhaseMemory(500, 950, resident)}
    assert resets == [torch.device("cuda", 1)] * 2
    assert meter.overhead_seconds == 0.0
