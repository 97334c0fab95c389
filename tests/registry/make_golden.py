"""Writes `golden/schema-N`: a base, deltas of both kinds as exported archives, and their logits.

Run when a schema is released: `PYTHONPATH=tests python tests/registry/make_golden.py`. The files of
an older schema are never written again; `test_golden.py` reads them as they are.
"""

import json
import os
import runpy
import tempfile
from pathlib import Path

import tiny_runs

from peftkit.registry import Registry
from peftkit.registry.archive import export_archive
from peftkit.registry.manifest import SCHEMA_VERSION

save_base = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))["save_base"]
GOLDEN = Path(__file__).with_name("golden")
BASE = "golden/tiny"
SECTIONS = {
    "lora": {"type": "lora", "r": 2, "modules_to_save": ["pooler"]},
    "full": {"type": "full"},
}


def write(folder: Path) -> None:
    base = save_base(folder / "models" / BASE, depth=1, width=8, spread=0.2)
    os.environ["PEFTKIT_MIRROR"] = str(folder)
    batch = tiny_runs.make_batch(base, size=4, seed=99)
    logits = {}
    with tempfile.TemporaryDirectory() as place:
        registry = Registry(Path(place))
        for name, section in SECTIONS.items():
            method = tiny_runs.make_method(section)
            model = tiny_runs.prepare(base, method)
            tiny_runs.train(model, method, base)
            delta, found = method.delta(model), tiny_runs.logits_of(model, batch)
            if delta.adapter_config:  # PEFT writes down where the base lay
                delta.adapter_config["base_model_name_or_path"] = BASE
            info = tiny_runs.info_for(base, method, delta)
            named = {"base_name": BASE, "recipe": {"base": {"name": BASE}}}
            registry.save(name, delta, info.model_copy(update=named), base=base)
            export_archive(registry, [name], folder / f"{name}.tar")
            logits[name] = found.tolist()
    inputs = {key: tensor.tolist() for key, tensor in batch.items() if key != "labels"}
    (folder / "logits.json").write_text(json.dumps({"inputs": inputs, "logits": logits}) + "\n")


if __name__ == "__main__":
    write(GOLDEN / f"schema-{SCHEMA_VERSION}")
