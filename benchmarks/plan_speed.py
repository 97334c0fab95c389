"""How long `peftkit plan` takes for Llamas that exist as a config alone, and in how much memory.

    python benchmarks/plan_speed.py --out benchmarks/results/plan_speed.json

Each plan is a command of its own, as a person would give it, of `recipes/lora_sst2.yaml` with
another base. With `answers` it has an H100's memory as its budget. The aims are in `AIMS`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "lora_sst2.yaml"
LLAMAS = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
COMMON = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
KINDS = {"plan": "--mixed-precision=bf16", "answers": "--gpu=h100"}
AIMS = {"8B": {"seconds": 10}, "70B": {"seconds": 60, "memory_bytes": 4 * 2**30}}


def run(arguments: list[str]) -> dict[str, float]:
    """Seconds and most memory of one plan, from its start to its end."""
    started = time.perf_counter()
    child = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "peftkit", "plan", *arguments],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit(f"peftkit plan {' '.join(arguments)} failed")
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "memory_bytes": used.ru_maxrss * 1024,
    }


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    plans: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as work:
        for name, sizes in LLAMAS.items():
            folder = Path(work) / name
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(COMMON | sizes))
        for name, kind in product(LLAMAS, KINDS):
            words = [str(RECIPE), f"base={{name: {Path(work) / name}}}", KINDS[kind]]
            rounds = [run(words) for _ in range(args.rounds)]
            plan = f"{name} {kind}"
            plans[plan] = {
                "best": min(rounds, key=lambda found: found["seconds"]),
                "seconds": [found["seconds"] for found in rounds],
            }
            print(plan, plans[plan], file=sys.stderr)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    text = json.dumps({"aims": AIMS, "versions": versions, "plans": plans}, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
