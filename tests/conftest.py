"""Tiny bases and data on disk, so that no test needs the network or the real model."""

import json
import os
from pathlib import Path

import pytest
from made_recipe import made_recipe

# Before any library reads them: no Hub, no progress bars of a pool of threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ONE_WORKER = ("test_exactness.py", "test_sharded.py")
"""Files whose fixtures train for minutes: two workers would each do all of it."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """For `--dist loadgroup`, whose own grouping by a mark does nothing under pytest 9.2."""
    if config.option.dist != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class OneWorkerForSome(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if file.endswith(ONE_WORKER) else nodeid

    return OneWorkerForSome(config, log)


WORDS = ["a", "the", "film", "plot", "was", "is", "not", "never", "and", "but"]
WORDS += ["good", "warm", "great", "bright", "bad", "dull", "awful", "slow"]
POSITIVE = {"good", "warm", "great", "bright"}


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)


def save_base(
    folder: Path,
    *,
    model_type: str = "bert",
    depth: int = 3,
    seed: int = 0,
    width: int = 16,
    spread: float = 0.02,
) -> Path:
    """A base without a head, with its tokenizer; weights drawn with standard deviation `spread`.

    A larger `spread` makes the logits depend on the text, and so on the weights inside.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 4 + len(WORDS),
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 66,
        "pad_token_id": 0,
        "initializer_range": spread,
    }
    if model_type == "llama":
        sizes |= {"num_key_value_heads": 2}
    if model_type == "gpt2":
        sizes |= {"bos_token_id": 2, "eos_token_id": 3}
    AutoModel.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def sentences(count: int, seed: int) -> list[dict]:
    """Rows of 3 to 12 words; the label says whether the positive words outnumber the others."""
    import random

    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(3, 12))
        label = int(2 * sum(word in POSITIVE for word in words) > len(words) // 2)
        rows.append({"sentence": " ".join(words), "label": label})
    return rows


def save_data(folder: Path, *, train: int = 96, validation: int = 33) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate({"train": train, "validation": validation}.items()):
        lines = [json.dumps(row) for row in sentences(count, seed)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def fresh_accelerate_state():
    """Accelerate keeps the first process's settings; after the test they are forgotten."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def base_of(tmp_path_factory):
    """Bases of any type and size, each made once; their logits depend on the text."""
    made: dict[tuple, Path] = {}

    def get(model_type: str, *, depth: int = 3, seed: int = 0, width: int = 16) -> Path:
        key = (model_type, depth, seed, width)
        if key not in made:
            made[key] = save_base(
                tmp_path_factory.mktemp("base"),
                model_type=model_type,
                depth=depth,
                seed=seed,
                width=width,
                spread=0.2,
            )
        return made[key]

    return get


@pytest.fixture(scope="session")
def language_model(base_of, tmp_path_factory) -> Path:
    """A tiny Llama with its head, whose tokenizer has an eos token."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder, base = tmp_path_factory.mktemp("language-model"), base_of("llama")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(base)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base, eos_token="[SEP]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tiny_recipe(tiny_base, tiny_data):
    """`made_recipe` of the tiny base and data."""
    return made_recipe(tiny_base, tiny_data)


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty current folder with a registry of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFTKIT_REGISTRY", str(tmp_path / "registry"))
    return tmp_path
