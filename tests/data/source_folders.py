"""Folders of models and data sets to be found, and the message where none is."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from peftkit.data.sources import locate
from peftkit.errors import SourceError


def make_model(folder, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    save_file({"weight": np.arange(6, dtype=np.float32)}, folder / name)
    return folder


def make_data(folder, rows=({"text": "a", "label": 0},), split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def refusal(*arguments, **options):
    with pytest.raises(SourceError) as error:
        locate(*arguments, **options)
    return str(error.value)
