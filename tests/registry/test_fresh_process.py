"""What was trained comes back in another process: heads, tokens, whole modules, tied weights.

Tensors are drawn at random instead of trained. All deltas are stored first; one new process loads
them all and writes down their logits.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from peftkit.errors import RegistryError
from peftkit.modeling.loading import ModelSpec, load_model
from peftkit.modeling.parameters import trainable_parameters
from peftkit.registry import Registry
from peftkit.registry.loading import load_delta

pytestmark = pytest.mark.slow

LORA = {"type": "lora", "r": 2}
CAUSAL = "AutoModelForCausalLM"
CASES = {
    "head-bert": ("bert", LORA, tiny_runs.AUTO_CLASS),
    "head-roberta": ("roberta", LORA, tiny_runs.AUTO_CLASS),
    "head-llama": ("llama", {"type": "top_layers", "num_layers": 1}, tiny_runs.AUTO_CLASS),
    "tokens": ("bert", LORA | {"trainable_token_indices": [4, 5]}, tiny_runs.AUTO_CLASS),
    "pooler": ("bert", LORA | {"modules_to_save": ["pooler"]}, tiny_runs.AUTO_CLASS),
    "embeddings": ("bert", LORA | {"modules_to_save": ["word_embeddings"]}, tiny_runs.AUTO_CLASS),
    "full": ("bert", {"type": "full"}, tiny_runs.AUTO_CLASS),
    "tied-full": ("gpt2", {"type": "full"}, CAUSAL),
    "tied-lora": ("gpt2", LORA, CAUSAL),
    "tied-tokens": ("gpt2", LORA | {"trainable_token_indices": [4, 5]}, CAUSAL),
    "tied-embeddings": ("gpt2", LORA | {"modules_to_save": ["wte"]}, CAUSAL),
    "untied-full": ("untied", {"type": "full"}, CAUSAL),
    "untied-lora": ("untied", LORA, CAUSAL),
    "untied-embeddings": ("untied", LORA | {"modules_to_save": ["embed_tokens"]}, CAUSAL),
    "untied-tokens": ("untied", LORA | {"trainable_token_indices": [4, 5]}, CAUSAL),
}
READER = """
import sys
from pathlib import Path
import tiny_runs
from safetensors.torch import load_file, save_file
from peftkit.registry import Registry
from peftkit.registry.loading import load_delta
from peftkit.registry.loading import load_delta
place, found = Path(sys.argv[1]), {}
for name in sys.argv[2:]:
    model = load_delta(name, registry=Registry(place / "registry")).model
    found[name] = tiny_runs.logits_of(model, load_file(place / f"{name}.inputs"))
save_file(found, place / "found")
"""


def with_head_of_its_own(folder: Path, source: Path) -> Path:
    """A language model whose head is not tied to its embeddings, in a base's files.

    Its logits are near one: the last bit of a larger one is more than 1e-6 where another process
    lays its tensors at other addresses.
    """
    shutil.copytree(source, folder)
    torch.manual_seed(3)
    options = {"tie_word_embeddings": False, "initializer_range": 0.1}
    config = AutoConfig.from_pretrained(source, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def stored(registry, folder, name, section, auto_class) -> tuple[dict, torch.Tensor, set[str]]:
    """Save a delta; its inputs, its logits, and the trained parameters that it lost."""
    method = tiny_runs.make_method(section)
    config = tiny_runs.LABELS if auto_class != CAUSAL else {"pad_token_id": 0}
    torch.manual_seed(len(name))
    model = load_model(folder, ModelSpec(auto_class, config), method.load_options())
    model = method.prepare(model)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    delta = method.delta(model)
    held = list(delta.tensors.values())
    lost = {
        name
        for name, p in trainable_parameters(model).items()
        if not any(p.shape == t.shape and torch.equal(p, t) for t in held)
    }
    info = tiny_runs.info_for(folder, method, delta)
    told = info.model | {"auto_class": auto_class, "config": config}
    registry.save(name, delta, info.model_copy(update={"model": told}), base=folder)
    batch = tiny_runs.make_batch(folder, seed=99)
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    return inputs, tiny_runs.logits_of(model, inputs), lost


@pytest.fixture(scope="module")
def results(base_of, tmp_path_factory):
    """Name → (logits when stored, logits in the new process, lost parameters)."""
    place, expected, lost = tmp_path_factory.mktemp("fresh"), {}, {}
    bases = {"untied": with_head_of_its_own(place / "base", base_of("llama"))}
    for name, (architecture, section, auto_class) in CASES.items():
        registry = Registry(place / "registry")
        folder = bases.get(architecture) or base_of(architecture)
        inputs, expected[name], lost[name] = stored(registry, folder, name, section, auto_class)
        save_file(inputs, place / f"{name}.inputs")
    (place / "reader.py").write_text(READER)
    command = [sys.executable, str(place / "reader.py"), str(place), *CASES]
    paths = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run(command, env=paths, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(place / "found")
    return {name: (expected[name], found[name], lost[name]) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_same_in_another_process(name, results):
    expected, found, lost = results[name]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert lost == set()


def test_a_head_that_is_left_out_is_seen(base_of, tmp_path, monkeypatch):
    """The planted fault: a delta without one of the trained parameters."""
    real = tiny_runs.make_method

    def make_method(section):
        method = real(section)
        take = method.delta

        def delta(model):
            found = take(model)
            del found.tensors[next(name for name in found.tensors if "classifier.weight" in name)]
            return found

        method.delta = delta
        return method

    monkeypatch.setattr(tiny_runs, "make_method", make_method)
    registry = Registry(tmp_path)
    _, _, lost = stored(registry, base_of("bert"), "head", LORA, tiny_runs.AUTO_CLASS)
    assert [name.rpartition(".")[2] for name in lost] == ["weight"]
    with pytest.raises(RegistryError, match="is missing"):
        load_delta("head", registry=registry)
