"""A stranger's package, installed by pip from a temporary folder, trains like a built-in method."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
METHOD = '''
"""Trains the head alone, in a package of its own."""

from typing import Literal

from peftkit.contracts import LoadOptions, ParameterGroup
from peftkit.modeling.deltas import weights_delta
from peftkit.modeling.parameters import freeze, head_modules, trainable_parameters, unfreeze
from peftkit.schema import Section


class HeadOnlyConfig(Section):
    type: Literal["head_only"] = "head_only"
    rate_factor: float = 1.0


class HeadOnly:
    Config = HeadOnlyConfig

    def __init__(self, config):
        self.config = config

    def load_options(self):
        return LoadOptions()

    def prepare(self, model):
        freeze(model)
        for name in head_modules(model):
            unfreeze(model.get_submodule(name))
        return model

    def parameter_groups(self, model, learning_rate):
        members = list(trainable_parameters(model).values())
        return [ParameterGroup(members, learning_rate * self.config.rate_factor)]

    def delta(self, model):
        return weights_delta(model)
'''
WHEEL = {
    "head_only.py": METHOD,
    "head_only-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: head-only\nVersion: 1.0\n",
    "head_only-1.0.dist-info/WHEEL": (
        "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    ),
    "head_only-1.0.dist-info/entry_points.txt": (
        "[peftkit.methods]\nhead_only = head_only:HeadOnly\nbroken = head_only:Missing\n"
    ),
}


def install(folder):
    """The wheel, by pip, into a folder for PYTHONPATH."""
    wheel, site = folder / "head_only-1.0-py3-none-any.whl", folder / "site"
    record = "head_only-1.0.dist-info/RECORD"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {**WHEEL, record: "".join(f"{n},,\n" for n in WHEEL)}.items():
            archive.writestr(name, content)
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    return site


@pytest.mark.slow
def test_an_installed_method_trains_and_the_broken_one_beside_it_is_named(tmp_path, tiny_recipe):
    site = install(tmp_path)
    recipe = {**tiny_recipe, "method": {"type": "head_only", "rate_factor": 2.0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "PEFTKIT_REGISTRY": str(tmp_path / "registry"),
    }

    def run(*words):
        command = [sys.executable, str(ROOT / "peftkit" / words[0]), *words[1:]]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    done = run("run.py", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "runs" / "tiny-seed0" / "record.json").read_text())
    assert record["status"] == "completed"
    assert record["trainable_parameters"] == 2 * 16 + 2

    refused = run("run.py", "recipe.yaml", "method.type=broken", "--overwrite")
    assert refused.returncode == 2
    assert "recipe.yaml" in refused.stderr or "override" in refused.stderr
    assert "(head-only): cannot be imported: AttributeError" in refused.stderr
