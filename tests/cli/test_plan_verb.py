"""The verb `plan`: what a person reads, and wrong words."""

import json

import pytest
import yaml

from peftkit.cli import main


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
    assert out.splitlines()[-1].startswith("tiny: full with batch ")
    assert " and fits in 64.0 GiB, with " in out.splitlines()[-1]


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
