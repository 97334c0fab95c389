"""The verb `plan`: what a person reads, and wrong words."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from peftkit.cli import main
from peftkit.recipe import load_recipe


@pytest.fixture
def recipe_file(tiny_recipe, workplace, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    return str(path)


def test_a_plan_says_phases_kinds_and_one_sentence(recipe_file, capsys):
    assert main(["plan", recipe_file, "--budget", "64GiB"]) == 0
    out = capsys.readouterr().out
    for phase in ("load", "forward", "backward", "optimizer step", "evaluation"):
        assert f"\n{phase} " in out
    *_, largest, last = out.splitlines()
    assert largest == "largest batch at this length: at least 4096"
    assert last.startswith("Full fine-tuning with batch 8 fits in 64.0 GiB with ")


@pytest.mark.slow
def test_several_recipes_end_with_one_sentence_over_all(recipe_file, capsys):
    assert main(["plan", recipe_file, recipe_file, "--budget", "64GiB"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("2 of these 2 recipes fit as they stand; the best score is to be")
    assert main(["plan", recipe_file, recipe_file]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Of these 2 recipes tiny needs the most: Full fine-tuning with batch 8")


@pytest.fixture
def planned(recipe_file, capsys):
    """The plan of the tiny recipe as JSON."""

    def planned(*words):
        assert main(["plan", recipe_file, *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)[0]

    return planned


LARGE = ["training.per_device_train_batch_size=512", "--budget", "40MiB"]
"""Some methods fit with smaller batches only."""


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("{type: full}", marks=pytest.mark.slow),
        pytest.param("{type: top_layers, num_layers: 1}", marks=pytest.mark.slow),
        pytest.param(
            '{type: qlora, r: 2, target_modules: ".*(query|value)", use_rslora: true}',
            marks=pytest.mark.slow,
        ),
    ],
)
def test_everything_that_is_advised_is_a_recipe(planned, recipe_file, method):
    own = f"method={method}"
    found = planned(own, *LARGE)["answers"]
    assert any(choice["change"] for choice in found["methods"])
    for choice in found["methods"]:
        change = choice["change"]
        advice = choice["overrides"] + (change["overrides"] if change else [])
        recipe = load_recipe(Path(recipe_file), [own, *advice])
        training = recipe.training
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
        assert recipe.method.type == choice["method"]
        assert not change or batch == 512


@pytest.mark.slow
def test_a_changed_recipe_needs_what_was_promised(planned, recipe_file, capsys):
    (full, *_) = planned(*LARGE)["answers"]["methods"]
    advice = full["change"]["overrides"]
    assert planned(*advice)["peak_bytes"] == full["change"]["peak_bytes"] <= 40 * 2**20
    assert main(["plan", recipe_file, *LARGE]) == 0
    assert f"add: {shlex.join(advice)}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_method_that_cannot_be_planned_is_a_row_with_its_reason(recipe_file, tmp_path, capsys):
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    config = {"model_type": "t5", "vocab_size": 32, "decoder_start_token_id": 0, **sizes}
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps(config))
    assert main(["plan", recipe_file, f"base.name={tmp_path / 't5'}", "--budget", "64GiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith("top-layer freezing"))
    assert "  not possible  " in row
    assert "  'method={type: lora}'" in "".join(lines)


@pytest.mark.slow
def test_a_plan_as_json_has_every_figure(recipe_file, capsys):
    assert main(["plan", recipe_file, "--gpu", "l4", "--length", "32", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["recipe"], found["tokens"], found["mixed_precision"]) == ("tiny", 32, "bf16")
    assert found["peak_bytes"] == max(p["total_bytes"] for p in found["phases"].values())
    assert found["answers"]["fits"]
    assert found["answers"]["sentence"]


def test_a_folder_with_nothing_but_a_config_is_enough(recipe_file, tiny_base, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    assert main(["plan", recipe_file, f"base.name={bare}"]) == 0
    assert "add --budget 24GiB or --gpu l4" in capsys.readouterr().err


def test_several_processes_share_the_state(recipe_file, capsys):
    peaks = []
    for words in ([], ["--processes", "4", "--sharding", "zero3"]):
        assert main(["plan", recipe_file, "method={type: full}", "--json", *words]) == 0
        peaks.append(json.loads(capsys.readouterr().out)[0]["phases"]["optimizer_step"])
    one, four = (peak["by_kind"]["optimizer_state"] for peak in peaks)
    assert four == -(-one // 4)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--budget", "24"], "--budget '24': expected a number with a unit, such as 24GiB or 16GB"),
        (["--budget", ""], "--budget '': expected a number with a unit"),
        (
            ["--gpu", "l4", "--budget", "24GiB"],
            "--budget '24GiB': more than the 22.0 GiB that l4 has",
        ),
        (["--length", "67"], "67 tokens an example: a base of type 'bert' has positions for 66"),
        (["--gpu", "h1000"], "--gpu 'h1000': unknown; did you mean 'h100'?"),
        (["--mixed-precision", "fp8"], "--mixed-precision 'fp8': expected one of no, bf16, fp16"),
        (["--sharding", "fsdp3"], "--sharding 'fsdp3': expected one of ddp, zero2, zero3, fsdp"),
        (["training.optimiser=sgd"], "training.optimiser"),
    ],
)
def test_wrong_words_are_refused_in_one_line(recipe_file, capsys, words, line):
    assert main(["plan", recipe_file, *words]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "nonesuch"},
        {"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3},
        {"model_type": "llama", "hidden_size": "wide"},
        {"model_type": "gpt2", "n_embd": 100, "n_head": 3, "pad_token_id": 0},
        {"model_type": "bert", "vocab_size": 0},
        {"model_type": "bert", "hidden_act": "nonesuch"},
    ],
)
def test_a_base_whose_config_cannot_be_built_is_named(recipe_file, tmp_path, capsys, config):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    assert main(["plan", recipe_file, f"base.name={tmp_path / 'odd'}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'odd'}: " in line
    assert "config.json" in line
    assert "unexpected" not in line


def test_a_budget_alone_says_that_it_is_planned_as_on_a_cpu(recipe_file, capsys):
    assert main(["plan", recipe_file, "--budget", "64GiB"]) == 0
    (header, *_) = capsys.readouterr().out.splitlines()
    assert header.endswith("as on a CPU in float32; --gpu NAME plans for a GPU")


def test_sharding_over_one_process_is_said_to_change_nothing(recipe_file, capsys):
    assert main(["plan", recipe_file, "--sharding", "fsdp"]) == 0
    said = capsys.readouterr().err
    assert "--sharding fsdp shares nothing out over one process; add --processes 2 or more" in said
