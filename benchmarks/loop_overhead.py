"""What peftkit's loop costs beside a bare PyTorch loop, at BERT-base size on a CPU.

Stands beside peftkit; drives `peftkit.training.loop` and a loop that imports nothing of it.

    OMP_NUM_THREADS=1 python benchmarks/loop_overhead.py --out benchmarks/results/loop_overhead.json

Two models of 12 layers and width 768 with equal random weights, full fine-tuning in float32 with
equal AdamW. Both loops take the same batches in turn, step by step, each first every other time.
The bare step is forward, loss, backward, clipping, AdamW and `zero_grad` on a batch that is
collated already. peftkit's is all that its loop does from one step to the next, collating,
learning rate, counting, the look for NaN and for signals included; evaluation, checkpoints, and the
memory meter's first steps are not. A step is judged by the processor time of the process, which
other programs on the machine disturb less than wall time.

What the loop does beside the model hardly depends on the model's width, so the same is measured on
one of 12 layers and width 12, where it does not drown in the noise: `small_model`, of which the
difference in milliseconds is set beside a step at BERT-base size.
"""

import argparse
import importlib.metadata
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, BertConfig

from peftkit.contracts import ParameterGroup, Split
from peftkit.data.batching import plan_epoch
from peftkit.memory.meter import MemoryMeter
from peftkit.modeling.parameters import train_mode
from peftkit.tasks.classification import Classification
from peftkit.tasks.encoding import Padding
from peftkit.training.config import TrainingConfig
from peftkit.training.loop import Trainer
from peftkit.training.optimizers import build_optimizer
from peftkit.training.progress import Progress
from peftkit.training.signals import StopRequest
from peftkit.training.state import Job

LEARNING_RATE, BATCH, WARM_UP_STEPS = 1e-5, 8, 2
AIM = 0.03

SMALL = BertConfig(num_labels=2, hidden_size=12, intermediate_size=48)
SMALL_STEPS = 200

Step = Callable[[], object]


def examples(count: int, tokens: int) -> Split:
    """Random examples of one length, so that every step costs the same."""
    draw = random.Random(0)
    rows = [
        {"input_ids": [draw.randrange(1000, 30000) for _ in range(tokens)], "label": i % 2}
        for i in range(count)
    ]
    return Split("train", rows, "sha256:" + "0" * 64)


class TwoClasses(Classification):
    """Classification of rows that no tokenizer made."""

    def __init__(self) -> None:
        config = {"type": "classification", "dataset": "none", "text_columns": ["text"]}
        super().__init__(self.Config(**config))
        self._padding = Padding(token_id=0, type_id=0, side="right")


def settings(steps: int) -> TrainingConfig:
    """Constant rate, no warm-up: the bare loop has no schedule."""
    return TrainingConfig(
        learning_rate=LEARNING_RATE,
        num_train_epochs=1.0,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="constant",
        warmup_steps=0.0,
    )


class OwnLoop(Trainer):
    """peftkit's loop, one step at a time."""

    def steps(self, progress: Progress) -> Iterator[None]:
        """The body of the loop's epoch, without the memory meter of a run's first steps."""
        stop, state = StopRequest(), self.state
        plan = plan_epoch(self.job.train.lengths, self.batch_size, seed=0, epoch=0)
        train_mode(self.model)
        with stop.deferred():
            for _, batches in self._batches(plan, start=0):
                result = self._timed_step(batches, metered=False)
                state.step += 1
                progress.step()
                if state.step % self.config.logging_steps == 0:
                    progress.report(self._row(result))
                self._stop_if_asked(stop)
                yield


def own_steps(model, task: Classification, train: Split, folder: Path) -> tuple[Step, OwnLoop]:
    """One step of peftkit's loop at each call."""
    config = settings(len(train.rows) // BATCH)
    job = Job(
        model=model,
        groups=[ParameterGroup(list(model.parameters()), LEARNING_RATE)],
        task=task,
        train=train,
        holdout=None,
        config=config,
        seed=0,
        folder=folder,
    )
    accelerator = Accelerator(cpu=True)
    loop = OwnLoop(job, accelerator, MemoryMeter(accelerator.device))
    progress = Progress(
        folder / "log.jsonl",
        job.trackers,
        total_steps=loop.total_steps,
        resumed_after=None,
        visible=True,
    )
    running = loop.steps(progress)
    return lambda: next(running), loop


def bare_steps(model, task: Classification, train: Split) -> Step:
    """One step of a loop without peftkit at each call, over the same batches."""
    parameters = list(model.parameters())
    groups = [ParameterGroup(parameters, LEARNING_RATE)]
    optimizer = build_optimizer(settings(1), groups)
    plan = plan_epoch(train.lengths, BATCH, seed=0, epoch=0)
    batches = iter([task.collate([train.rows[i] for i in step]) for step in plan])
    model.train()

    def step() -> None:
        batch = next(batches)
        labels = batch.pop("labels")
        cross_entropy(model(**batch).logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Step) -> tuple[float, float]:
    """Processor seconds and wall seconds."""
    wall, busy = time.perf_counter(), time.process_time()
    step()
    return time.process_time() - busy, time.perf_counter() - wall


def measure(steps: int, tokens: int, folder: Path, config: BertConfig) -> dict[str, Any]:
    """Both loops in turn; what peftkit's step takes over the bare one."""
    torch.manual_seed(0)
    bare_model = AutoModelForSequenceClassification.from_config(config)
    own_model = deepcopy(bare_model)
    task, train = TwoClasses(), examples(BATCH * (steps + WARM_UP_STEPS), tokens)
    own, loop = own_steps(own_model, task, train, folder)
    arms = {"bare": bare_steps(bare_model, task, train), "peftkit": own}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for number in range(steps + WARM_UP_STEPS):
        for name in sorted(arms, reverse=bool(number % 2)):
            # Dropout draws the same masks in both.
            torch.manual_seed(number)
            seconds[name].append(timed(arms[name]))
        print(f"{number + 1}: {[round(s[-1][0], 4) for s in seconds.values()]}", file=sys.stderr)
    kept = {name: found[WARM_UP_STEPS:] for name, found in seconds.items()}
    equal = all(
        torch.equal(one, other)
        for one, other in zip(bare_model.parameters(), own_model.parameters(), strict=True)
    )
    return {"steps": loop.state.step - WARM_UP_STEPS, "equal_weights": equal, **summary(kept)}


def summary(seconds: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Minimum and median of each arm, and peftkit's over the bare one's, less 1."""
    found: dict[str, Any] = {"aim": AIM}
    for place, clock in enumerate(("cpu", "wall")):
        arms = {name: [pair[place] for pair in pairs] for name, pairs in seconds.items()}
        ratios = [own / bare for own, bare in zip(arms["peftkit"], arms["bare"], strict=True)]
        found[f"{clock}_seconds_a_step"] = {
            name: {"minimum": round(min(all_), 5), "median": round(median(all_), 5)}
            for name, all_ in arms.items()
        }
        found[f"{clock}_overhead"] = {
            "of_minima": round(min(arms["peftkit"]) / min(arms["bare"]) - 1, 4),
            "of_medians": round(median(arms["peftkit"]) / median(arms["bare"]) - 1, 4),
            "median_of_pairs": round(median(ratios) - 1, 4),
        }
    return found


def beside(small: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The small model's figures, and what peftkit adds there as a share of the large one's step."""
    medians = {name: one["median"] for name, one in small["cpu_seconds_a_step"].items()}
    more = medians["peftkit"] - medians["bare"]
    share = more / base["cpu_seconds_a_step"]["bare"]["median"]
    figures = {"added_milliseconds": round(1000 * more, 2), "of_a_base_step": round(share, 5)}
    return {**figures, **small}


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        small = measure(SMALL_STEPS, args.tokens, Path(folder), SMALL)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.steps, args.tokens, Path(folder), BertConfig(num_labels=2))
    result["small_model"] = beside(small, result)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    shape = {"batch_size": BATCH, "tokens": args.tokens, "threads": torch.get_num_threads()}
    text = json.dumps({"settings": {**shape, **versions}, **result}, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
