"""The digest of a base depends on its tensors and on nothing else."""

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers.models
from safetensors.torch import save_file

from peftkit.errors import SourceError
from peftkit.modeling import identity
from peftkit.modeling.identity import base_digest, tokenizer_digest


def tensors():
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(4, 6),
        "a.bias": torch.randn(4),
        "b.weight": torch.randn(3, 4).bfloat16(),
        "b.empty": torch.zeros(0),
    }


def digest_of(folder, *shards, metadata=None):
    folder.mkdir()
    for index, shard in enumerate(shards):
        save_file(shard, folder / f"model-{index}.safetensors", metadata=metadata)
    return base_digest(folder)


def test_the_digest_is_a_sha256(tmp_path):
    name, _, digits = digest_of(tmp_path / "a", tensors()).partition(":")
    assert name == "sha256"
    assert len(bytes.fromhex(digits)) == 32


def test_sharding_order_metadata_and_place_do_not_matter(tmp_path):
    whole = tensors()
    names = list(whole)
    expected = digest_of(tmp_path / "one", whole)
    first = {name: whole[name] for name in names[:2]}
    second = {name: whole[name] for name in names[2:]}
    assert digest_of(tmp_path / "two", first, second) == expected
    assert digest_of(tmp_path / "swapped", second, first) == expected
    backwards = {name: whole[name] for name in reversed(names)}
    assert digest_of(tmp_path / "back", backwards, metadata={"format": "pt"}) == expected


def test_order_of_bytes_in_the_file_does_not_matter(tmp_path):
    values = {"x": struct.pack("<2f", 1, 2), "y": struct.pack("<f", 3)}
    digests = set()
    for order in (["x", "y"], ["y", "x"]):
        folder = tmp_path / "".join(order)
        folder.mkdir()
        header, body = {}, b""
        for name in order:
            start, body = len(body), body + values[name]
            shape = [len(values[name]) // 4]
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, len(body)]}
        text = json.dumps(header).encode()
        data = struct.pack("<Q", len(text)) + text + body
        (folder / "model.safetensors").write_bytes(data)
        digests.add(base_digest(folder))
    assert len(digests) == 1


def flip_lowest_bit(values):
    raw = values["a.weight"].view(torch.int32)
    raw[2, 3] ^= 1
    return values


CHANGES = {
    "bit": flip_lowest_bit,
    "name": lambda t: {("a.w" if k == "a.weight" else k): v for k, v in t.items()},
    "dtype": lambda t: t | {"b.weight": t["b.weight"].view(torch.float16)},
    "shape": lambda t: t | {"a.weight": t["a.weight"].reshape(6, 4)},
    "rank": lambda t: t | {"a.bias": t["a.bias"].reshape(1, 4)},
    "missing": lambda t: {k: v for k, v in t.items() if k != "a.bias"},
    "extra": lambda t: t | {"c": torch.zeros(0)},
    "swapped": lambda t: t | {"a.weight": t["a.weight"].roll(1, 0)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_a_tensor_changes_the_digest(tmp_path, change):
    expected = digest_of(tmp_path / "before", tensors())
    assert digest_of(tmp_path / "after", CHANGES[change](tensors())) != expected


def test_the_bytes_of_two_tensors_cannot_be_exchanged(tmp_path):
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    assert digest_of(tmp_path / "1", {"a": a, "b": b}) != digest_of(
        tmp_path / "2", {"a": b, "b": a}
    )


def test_a_long_tensor_is_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("peftkit.modeling.identity._CHUNK_BYTES", 7)
    changed = tensors()
    changed["a.weight"][-1, -1] += 1
    assert digest_of(tmp_path / "1", tensors()) != digest_of(tmp_path / "2", changed)
    monkeypatch.undo()
    assert base_digest(tmp_path / "2") == digest_of(tmp_path / "3", changed)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    with pytest.raises(SourceError) as caught:
        digest_of(tmp_path / "a", tensors(), {"a.bias": torch.zeros(4)})
    assert str(caught.value) == (
        f"{tmp_path}/a/model-1.safetensors: tensor 'a.bias' is in another file of the folder too"
    )


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(SourceError) as caught:
        base_digest(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no *.safetensors file to take the base's digest from"
    )


def entry(offsets=(0, 4), dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def file_of(header, body=b"\0" * 4):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\0",
        b"\xff" * 8 + b"{}",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 100) + b"{",
        file_of([]),
        file_of({"x": 1}),
        file_of({"x": {"dtype": "F32"}}),
        file_of({"x": entry(offsets=(0,))}),
        file_of({"x": entry(offsets=("0", "4"))}),
        file_of({"x": entry(offsets=(-1000, 4))}),
        file_of({"x": entry()}) [:-2],
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_clear_error(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(SourceError) as caught:
        base_digest(tmp_path)
    [line] = caught.value.problems
    assert line.startswith(f"{path}: ")


def test_the_tokenizer_has_a_digest_of_its_own(tmp_path, base_of):
    copy = tmp_path / "copy"
    shutil.copytree(base_of("bert"), copy)
    expected = tokenizer_digest(base_of("bert"))
    (copy / "README.md").write_text("words")
    assert tokenizer_digest(copy) == expected
    path = copy / "tokenizer.json"
    path.write_text(path.read_text().replace('"film"', '"movie"'))
    changed = tokenizer_digest(copy)
    assert changed != expected
    (copy / "tokenizer.json").rename(copy / "vocab.json")
    assert tokenizer_digest(copy) not in {changed, expected}


@pytest.mark.parametrize(
    "name", ["spm.model", "sentencepiece.bpe.model", "bpe.codes", "source.spm", "dict.txt"]
)
def test_every_file_that_a_tokenizer_reads_is_in_its_digest(tmp_path, name):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    digests = {tokenizer_digest(tmp_path)}
    for content in ("one", "other"):
        (tmp_path / name).write_text(content)
        digests.add(tokenizer_digest(tmp_path))
    assert len(digests) == 3


def test_the_files_of_all_tokenizers_of_transformers_are_known():
    folder = Path(transformers.models.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in folder.rglob("tokenization_*.py")]
    blocks = re.findall(r"^VOCAB_FILES_NAMES\s*=\s*\{([^}]*)\}", "\n".join(sources), re.MULTILINE)
    found = {name for block in blocks for name in re.findall(r":\s*\"([^\"]+)\"", block)}
    assert "tokenizer.json" in found
    assert found <= set(identity.TOKENIZER_FILES)
