"""The batch that fits: found before the first step, without a trace, the same on all processes."""

import weakref

import pytest
import torch

from peftkit.errors import Interrupted
from peftkit.training.batch_size import fitting_batch_size
from peftkit.training.signals import StopRequest


def nothing_left_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def nothing_left_for_torch():
    torch.empty(2**55)


def nothing_left_for_python():
    raise MemoryError


ERRORS = [nothing_left_on_a_gpu, nothing_left_for_torch, nothing_left_for_python]


@pytest.fixture
def limited(toy):
    """Counts its passes, has dropout, and no memory to train on more than `most` examples."""

    class Limited(toy.Model):
        def __init__(self, most, run_out=nothing_left_for_torch):
            super().__init__(0.3)
            self.register_buffer("passes", torch.zeros(()))
            self.most, self.run_out, self.sizes, self.left = most, run_out, [], []

        def forward(self, input_ids, attention_mask):
            alive = sum(tensor() is not None for tensor in self.left)
            self.sizes.append((*input_ids.shape, alive))
            outputs = super().forward(input_ids, attention_mask)
            self.passes += self.training
            if self.training and len(input_ids) > self.most:
                self.left.append(weakref.ref(outputs.logits))
                self.run_out()
            return outputs

    return Limited


def everything(trainer):
    """What training leaves but measurements: parameters, buffers, and the newest checkpoint."""
    found = trainer.checkpoints.newest()
    state = {k: v for k, v in found.state.items() if not k.endswith("seconds")}
    for key in ("meter", "micro_batch_size"):
        state.pop(key)
    tensors = {**trainer.job.model.state_dict(), **found.trained}
    return tensors, found.optimizer, found.rng, state


def assert_same(one, other):
    """Equal to the bit, however deep."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, yours in zip(one, other, strict=True):
            assert_same(mine, yours)
    else:
        assert one == other


@pytest.mark.parametrize(
    ("optimizer", "run_out"),
    [
        *(("adamw", error) for error in ERRORS),
        *((name, ERRORS[0]) for name in ("adagrad", "adamw_8bit")),
    ],
)
def test_a_found_batch_trains_to_the_bit_as_if_asked_for(
    make_trainer, tmp_path, limited, optimizer, run_out
):
    asked = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
    found = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    found |= {"auto_batch_size": True}
    results = []
    for number, (settings, most) in enumerate(((asked, 99), (found, 3))):
        torch.manual_seed(0)
        model = limited(most, run_out)
        folder = tmp_path / str(number)
        trainer = make_trainer(
            folder, model=model, optimizer=optimizer, holdout=0, max_steps=3, **settings
        )
        trainer.fit(StopRequest())
        results.append(((folder / "log.jsonl").read_text(), everything(trainer)))
    assert trainer.state.micro_batch_size == 2
    assert_same(*results)


def test_the_longest_examples_are_tried_and_what_failed_is_let_go(
    make_trainer, toy, limited, capfd
):
    model = limited(most=2)
    make_trainer(model=model, auto_batch_size=True, max_steps=1).fit(StopRequest())
    longest = max(toy.split(50).lengths)
    tried = [(8, longest, 0), (4, longest, 0), (2, longest, 0), (2, longest, 0)]
    assert model.sizes[:4] == tried
    lines = [line for line in capfd.readouterr().err.splitlines() if "auto" in line]
    assert lines == [
        "training.auto_batch_size: 8 examples at a time do not fit in memory; 4 from here on, "
        "with gradient_accumulation_steps 2",
        "training.auto_batch_size: 4 examples at a time do not fit in memory; 2 from here on, "
        "with gradient_accumulation_steps 4",
    ]


@pytest.mark.parametrize(("accumulation", "beside"), [(1, False), (2, True)])
def test_a_try_holds_what_a_step_holds(make_trainer, limited, accumulation, beside):
    model = limited(most=99)
    trainer = make_trainer(model=model, gradient_accumulation_steps=accumulation)
    seen, weight = [], model.head.weight

    def look(*_):
        state = trainer.optimizer.state.get(weight, {})
        seen.append((weight.grad is not None, "exp_avg" in state))

    model.register_forward_hook(look)
    assert fitting_batch_size(trainer.job, trainer.accelerator, trainer.optimizer) == 8
    assert seen == [(False, False), (beside, True)]
    assert weight.grad is None


@pytest.mark.parametrize(("size", "last"), [(8, 1), (6, 3), (7, 7)])
def test_what_cannot_be_halved_runs_out_of_memory_as_usual(make_trainer, limited, size, last):
    model = limited(most=0)
    trainer = make_trainer(model=model, auto_batch_size=True, per_device_train_batch_size=size)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        trainer.fit(StopRequest())
    assert trainer.meter.last_phase == "train_step"
    assert (trainer.state.step, trainer.state.micro_batch_size) == (0, last)
    assert [shape[0] for shape in model.sizes][-1] == last


def test_another_error_is_no_lack_of_memory(make_trainer, limited):
    def broken():
        raise RuntimeError("shapes do not match")

    trainer = make_trainer(model=limited(0, broken), auto_batch_size=True)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.fit(StopRequest())


def test_a_resumed_run_keeps_the_size_and_tries_nothing(make_trainer, tmp_path, limited):
    settings = {"auto_batch_size": True, "max_steps": 6}

    def trainer(folder, most):
        torch.manual_seed(0)
        return make_trainer(tmp_path / folder, model=limited(most), **settings)

    whole = trainer("whole", 2)
    whole.fit(StopRequest())
    stopped, stop = trainer("stopped", 2), StopRequest()
    real = stopped._step

    def stopping(batches):
        stop.number = 15 if stopped.state.step == 2 else None
        return real(batches)

    stopped._step = stopping
    with pytest.raises(Interrupted):
        stopped.fit(stop)
    resumed = trainer("stopped", 99)
    resumed.fit(StopRequest(), resume=True)
    assert resumed.state.micro_batch_size == 2
    assert {shape[0] for shape in resumed.job.model.sizes} == {2, 12}  # 12: the held-out part
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]


def test_all_halve_where_one_has_no_memory(make_trainer, limited, monkeypatch):
    trainer = make_trainer(model=limited(most=99), auto_batch_size=True)
    answers, own = iter([1.0, 1.0, 0.0]), []

    def reduce(failures, how):
        own.append((float(failures), how))
        return failures + next(answers)

    monkeypatch.setattr(trainer.accelerator, "reduce", reduce)
    assert fitting_batch_size(trainer.job, trainer.accelerator, trainer.optimizer) == 2
    assert own == [(0.0, "sum")] * 3
