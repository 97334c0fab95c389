"""Speed of attaching and switching LoRA adapters: peftkit's shared base against PEFT.

Stands beside peftkit; drives `peftkit.registry.shared` and `peft.PeftModel` over the same files.

    python benchmarks/attach_speed.py --out benchmarks/results/attach_speed.json

A BERT of random weights, `--width` wide and `--depth` deep, two adapters over all linear layers.
Both arms run in one process, interleaved, and report the minimum of several rounds. Attaching
starts from files on disk and a live base that has an adapter of the same settings already; PEFT
reads the same files with `load_adapter`, also with `low_cpu_mem_usage`, and checks nothing, while
peftkit takes the SHA-256 of every byte; reading and verifying is timed a second time by itself.
Switching goes to and fro between two adapters. The first adapter of its settings is timed alone:
peftkit then builds the layers through PEFT.
"""

import argparse
import importlib.metadata
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast
from transformers.utils import logging

from peftkit.contracts import Delta
from peftkit.methods.lora import Lora, LoraConfig
from peftkit.modeling.config import described
from peftkit.modeling.identity import base_digest, tokenizer_digest
from peftkit.modeling.loading import ModelSpec, load_model
from peftkit.registry import DeltaInfo, Registry, RunSummary
from peftkit.registry.shared import SEQUENCE_CLASSIFICATION, SharedBase

LABELS = {"num_labels": 2}
NAMES = ("first", "second")


def make_base(folder: Path, *, width: int, depth: int) -> Path:
    """A BERT of random weights with a tokenizer of one word."""
    sizes = {
        "vocab_size": 30522,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        "pad_token_id": 0,
    }
    AutoModel.from_config(AutoConfig.for_model("bert", **sizes)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def store(registry: Registry, base: Path, name: str, *, r: int, seed: int) -> None:
    """An adapter drawn from `seed`."""
    torch.manual_seed(seed)
    method = Lora(LoraConfig(r=r))
    spec = ModelSpec(SEQUENCE_CLASSIFICATION, LABELS)
    model = method.prepare(load_model(base, spec, method.load_options()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    delta = method.delta(model)
    registry.save(name, delta, info_of(base, method, delta))


def info_of(base: Path, method: Lora, delta: Delta) -> DeltaInfo:
    """What a manifest needs; the run is none."""
    return DeltaInfo(
        kind=delta.kind,
        base_name=str(base),
        base_digest=base_digest(base),
        base_config=described(base),
        tokenizer_digest=tokenizer_digest(base),
        task={"type": "classification"},
        method=method.config.model_dump(),
        model={
            "auto_class": SEQUENCE_CLASSIFICATION,
            "config": LABELS,
            "dropout": None,
            "mixed_precision": "no",
            "frozen": True,
        },
        recipe={"base": {"name": str(base)}},
        recipe_digest=f"sha256:{'0' * 64}",
        run=RunSummary(record="none", seed=0, status="completed", metrics={}),
        stand_in=True,
    )


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def attach_round(shared: SharedBase, peft_model: Any, folder: Path) -> dict[str, float]:
    """Each arm attaches the second adapter once and lets go of it again."""
    registry = shared.registry
    times = {"peftkit": seconds(lambda: shared.attach("second"))}
    read = seconds(lambda: registry.read_delta(registry.find("second")))
    times["of_that_reading_and_verifying"] = read
    shared.detach("second")
    for arm, low in (("peft", False), ("peft_low_cpu_mem_usage", True)):
        times[arm] = seconds(
            lambda low=low: peft_model.load_adapter(folder, "second", low_cpu_mem_usage=low)
        )
        peft_model.delete_adapter("second")
    return times


def switch_round(shared: SharedBase, peft_model: Any) -> dict[str, float]:
    """Each arm switches to the second adapter and back; seconds for one switch."""

    def both(switch: Callable[[str], object]) -> None:
        switch("second")
        switch("first")

    return {
        "peftkit": seconds(lambda: both(shared.switch)) / 2,
        "peft": seconds(lambda: both(peft_model.set_adapter)) / 2,
    }


def best(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Milliseconds: the minimum of each arm."""
    return {arm: round(min(times[arm] for times in rounds) * 1e3, 4) for arm in rounds[0]}


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Both comparisons, in milliseconds."""
    base = make_base(root / "base", width=args.width, depth=args.depth)
    registry = Registry(root / "registry")
    for seed, name in enumerate(NAMES):
        store(registry, base, name, r=args.r, seed=seed)
    folders = {name: registry.find(name).path for name in NAMES}
    shared = SharedBase(base, registry)
    first = seconds(lambda: shared.attach("first"))
    plain = load_model(
        base, ModelSpec(SEQUENCE_CLASSIFICATION, LABELS), Lora(LoraConfig()).load_options()
    )
    peft_model = PeftModel.from_pretrained(plain, folders["first"], adapter_name="first").eval()
    attach = [attach_round(shared, peft_model, folders["second"]) for _ in range(args.rounds)]
    shared.attach("second")
    peft_model.load_adapter(folders["second"], "second")
    switch = [switch_round(shared, peft_model) for _ in range(10 * args.rounds)]
    check_equal(shared, peft_model)
    return {
        "first_attach_ms": round(first * 1e3, 1),
        "attach_ms": best(attach),
        "switch_ms": best(switch),
    }


def check_equal(shared: SharedBase, peft_model: Any) -> None:
    """Both arms must give the same logits, or the times compare nothing."""
    batch = {"input_ids": torch.arange(24).reshape(2, 12)}
    for name in NAMES:
        shared.switch(name)
        peft_model.set_adapter(name)
        with torch.no_grad():
            expected = peft_model(**batch).logits
        if not torch.equal(shared(batch), expected):
            raise RuntimeError(f"{name}: the arms answer differently")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as root:
        result = measure(Path(root), args)
    attach, switch = result["attach_ms"], result["switch_ms"]
    result |= {
        "attach_speedup": round(attach["peft"] / attach["peftkit"], 1),
        "switch_speedup": round(switch["peft"] / switch["peftkit"], 1),
        "setting": {k: v for k, v in vars(args).items() if k != "out"},
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft")},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
