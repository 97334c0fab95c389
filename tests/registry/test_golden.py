"""Deltas of every released schema load, and answer as they did when they were stored."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import tiny_runs
import torch

from peftkit.errors import RegistryError
from peftkit.registry import Registry, bit_delta
from peftkit.registry.archive import import_archive
from peftkit.registry.digests import FileDigest
from peftkit.registry.layout import encode_index, index_line
from peftkit.registry.loading import load_delta
from peftkit.registry.manifest import SCHEMA_VERSION
from peftkit.registry.shared import SharedBase

GOLDEN = Path(__file__).with_name("golden")
SCHEMAS = sorted(GOLDEN.glob("schema-*"))
NAMES = ("full", "lora")


@pytest.fixture(params=SCHEMAS, ids=lambda folder: folder.name)
def golden(request, monkeypatch):
    monkeypatch.setenv("PEFTKIT_MIRROR", str(request.param))
    return request.param


def expected(golden: Path, name: str) -> tuple[dict, torch.Tensor]:
    stored = json.loads((golden / "logits.json").read_text())
    inputs = {key: torch.tensor(rows) for key, rows in stored["inputs"].items()}
    return inputs, torch.tensor(stored["logits"][name])


def test_every_schema_has_its_golden_deltas():
    assert [folder.name for folder in SCHEMAS] == [
        f"schema-{number}" for number in range(1, SCHEMA_VERSION + 1)
    ]
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 200_000


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_delta_answers_as_it_did(golden, name, tmp_path):
    registry = Registry(tmp_path)
    import_archive(registry, golden / f"{name}.tar")
    inputs, logits = expected(golden, name)
    found = tiny_runs.logits_of(load_delta(name, registry=registry).model, inputs)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-6)
    shared = SharedBase("golden/tiny", registry)
    with shared.using(shared.attach(name)):
        torch.testing.assert_close(shared(inputs), logits, rtol=0, atol=1e-6)


def test_golden_deltas_answer_differently(golden):
    assert (expected(golden, "full")[1] - expected(golden, "lora")[1]).abs().max() > 1e-2


def no_sign(monkeypatch):
    """Read the differences of a release that folds its numbers in another way."""
    real = bit_delta._joined
    monkeypatch.setattr(bit_delta, "_joined", lambda planes, width, base: real(planes, width, None))


def other_names(monkeypatch):
    """A release that calls the file of its tensors otherwise."""
    names = frozenset({"tensors.safetensors"})
    monkeypatch.setattr("peftkit.registry.layout._KNOWN_FILES", names)


@pytest.mark.parametrize("plant", [no_sign, other_names])
def test_a_release_that_reads_them_otherwise_is_found_out(golden, plant, tmp_path, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(RegistryError):
        test_a_golden_delta_answers_as_it_did(golden, "full", tmp_path)


def rewritten(source: Path, target: Path, **changes: object) -> Path:
    """The archive with another info, all its digests made to fit."""
    with tarfile.open(source) as archive:
        found = {m.name: archive.extractfile(m).read() for m in archive.getmembers()}
    (line,) = json.loads(found["index.json"])["manifests"]
    manifest = json.loads(found[blob(line)])
    about = {**json.loads(found.pop(blob(manifest["config"]))), **changes}
    info = json.dumps(about).encode()
    manifest["config"] |= {"digest": f"sha256:{FileDigest.of(info).sha256}", "size": len(info)}
    document = json.dumps(manifest).encode()
    found[blob(manifest["config"])] = info
    found[f"blobs/sha256/{FileDigest.of(document).sha256}"] = document
    found["index.json"] = encode_index([index_line("full@v1", FileDigest.of(document))])
    with tarfile.open(target, "w") as archive:
        for name, data in found.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return target


def blob(descriptor: dict) -> str:
    return f"blobs/sha256/{descriptor['digest'].removeprefix('sha256:')}"


def test_a_delta_of_a_newer_schema_is_refused_clearly(golden, tmp_path):
    source = rewritten(golden / "full.tar", tmp_path / "new.tar", schema_version=2, later="x")
    registry = Registry(tmp_path / "registry")
    with pytest.raises(RegistryError) as caught:
        import_archive(registry, source)
    assert str(caught.value) == (
        f"{registry.root / 'full'}: a delta of schema 2, this peftkit reads up to 1; "
        "upgrade peftkit"
    )
    assert not registry.root.exists()


def test_a_stored_delta_of_a_newer_schema_is_refused_clearly(golden, tmp_path):
    source = rewritten(golden / "full.tar", tmp_path / "new.tar", schema_version=2, later="x")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "store", filter="data")
    registry = Registry(tmp_path / "store")
    with pytest.raises(RegistryError, match="reads up to 1; upgrade peftkit"):
        registry.find("full")
    assert "reads up to 1; upgrade peftkit" in registry.ls().problems[0]


def test_an_archive_is_a_store_as_it_is(golden, tmp_path):
    with tarfile.open(golden / "lora.tar") as archive:
        archive.extractall(tmp_path / "store", filter="data")
    assert load_delta("lora", registry=Registry(tmp_path / "store")).stored.version == "v1"
    shutil.rmtree(tmp_path / "store" / "deltas")
    assert Registry(tmp_path / "store").find("lora").version == "v1"
