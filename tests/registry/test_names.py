import hashlib
import json
from pathlib import Path

import pytest

from peftkit.contracts import Quantisation
from peftkit.errors import RegistryError
from peftkit.registry.manifest import (
    DeltaInfo,
    Manifest,
    RunSummary,
    decode_manifest,
    encode_manifest,
)
from peftkit.registry.names import (
    Reference,
    check_name,
    contained,
    name_problem,
    parse_reference,
    version_number,
    versions,
)
from peftkit.registry.tensors import FileDigest

ALLOWED = (
    "expected 1 to 63 characters of a-z, 0-9, '.', '_' and '-', "
    "the first a letter or a digit, such as 'reviews-lora'"
)
PATH = Path("store/reviews/v1/manifest.json")


def manifest(**info: object) -> Manifest:
    digest = "sha256:" + "0" * 64
    values = {
        "kind": "weights",
        "base_name": "org/base",
        "base_digest": digest,
        "tokenizer_digest": digest,
        "task": {"type": "classification"},
        "method": {"type": "full", "learning_rate": 1e-4},
        "labels": ["schlecht", "gut ✓"],
        "model": {"auto_class": "AutoModelForSequenceClassification"},
        "recipe": {},
        "recipe_digest": digest,
        "run": RunSummary(record="r", seed=1, status="finished", metrics={"f1": None}),
        "stand_in": False,
        "created": "2026-11-01T10:00:00+00:00",
    }
    files = {"weights.safetensors": FileDigest.of(b"x")}
    return Manifest(name="reviews", version="v1", info=DeltaInfo(**values | info), files=files)


@pytest.mark.parametrize("name", ["a", "0", "reviews-lora", "a.b_c-d", "vase", "v1-lora", "x" * 63])
def test_good_names_are_accepted(name):
    check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "reviews\n",
        "../up",
        "/abs",
        "a/b",
        "a\\b",
        ".hidden",
        "-x",
        "a\0b",
        "é",
        "x" * 64,
        ".",
        "..",
        "C:",
        "a b",
        "~",
        ".staging-1",
        "a@v1",
    ],
)
def test_names_outside_the_grammar_are_refused(name):
    assert name_problem(name) == ALLOWED


def test_the_message_of_a_bad_name_stays_on_one_short_line():
    with pytest.raises(RegistryError) as caught:
        check_name("a\n" * 1000)
    shown = repr("a\n" * 40 + "…")
    assert str(caught.value) == f"delta name {shown}: {ALLOWED}"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("latest", "it would read as a version"), ("v1", "it would read as a version")]
    + [(n, "Windows cannot keep a folder of that name") for n in ("con", "nul.txt", "com1", "a.")]
    + [(n, "kept free for the files of an OCI layout") for n in ("blobs", "index.json")],
)
def test_names_that_clash_are_refused(name, reason):
    with pytest.raises(RegistryError) as caught:
        check_name(name)
    assert (
        str(caught.value) == f"delta name '{name}': {reason}; take another, such as 'reviews-lora'"
    )


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("reviews", Reference("reviews")),
        ("reviews@latest", Reference("reviews")),
        ("reviews@v12", Reference("reviews", "v12")),
    ],
)
def test_references_are_read(text, reference):
    assert parse_reference(text) == reference


@pytest.mark.parametrize("version", ["", "v0", "v01", "1", "V1", "v1\n", "v1@v2", "v1/..", "v²"])
def test_unreadable_versions_are_refused(version):
    with pytest.raises(RegistryError) as caught:
        parse_reference(f"reviews@{version}")
    assert str(caught.value) == (
        f"reference {f'reviews@{version}'!r}: version {version!r} is unreadable; "
        "expected 'reviews', 'reviews@latest' or 'reviews@v1'"
    )


def test_versions_sort_by_number_and_ignore_the_rest(tmp_path):
    for entry in ("v10", "v9", "v01", "v0", ".staging-a", "notes"):
        (tmp_path / entry).mkdir()
    assert versions(tmp_path) == ["v9", "v10"]
    assert versions(tmp_path / "absent") == []
    assert version_number("v10") == 10


@pytest.mark.parametrize("goal", ["elsewhere", "store/other", "store/name"])
def test_a_linked_folder_is_not_contained(tmp_path, goal):
    (tmp_path / "store/other").mkdir(parents=True)
    (tmp_path / "store/name").symlink_to(tmp_path / goal)
    with pytest.raises(RegistryError) as caught:
        contained(tmp_path / "store", "name")
    assert str(caught.value) == (
        f"{tmp_path}/store/name: is a symbolic link; put the real folder in its place or remove it"
    )


def test_a_linked_root_is_fine(tmp_path):
    (tmp_path / "real/name").mkdir(parents=True)
    (tmp_path / "store").symlink_to("real")
    assert contained(tmp_path / "store", "name") == tmp_path / "store/name"


@pytest.mark.parametrize("quantisation", [None, Quantisation("nf4", False, "bfloat16")])
def test_a_manifest_reads_back_equal(quantisation):
    written = manifest(quantisation=quantisation)
    assert decode_manifest(encode_manifest(written), PATH) == written


def test_fields_that_do_not_fit_are_all_named():
    payload = json.loads(encode_manifest(manifest()))
    del payload["digest"], payload["version"]
    payload["info"]["seed"] = 3
    body = json.dumps(payload, indent=2, ensure_ascii=False) + "\n"
    payload["digest"] = f"sha256:{hashlib.sha256(body.encode()).hexdigest()}"
    sealed = json.dumps(payload, indent=2, ensure_ascii=False) + "\n"
    with pytest.raises(RegistryError) as caught:
        decode_manifest(sealed.encode(), PATH)
    assert caught.value.problems == [
        f"{PATH}: version: Field required",
        f"{PATH}: info.seed: Extra inputs are not permitted",
    ]


def test_every_flipped_bit_of_a_manifest_is_refused():
    data = encode_manifest(manifest())
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        with pytest.raises(RegistryError):
            decode_manifest(bytes(changed), PATH)


def test_a_changed_manifest_is_named_with_both_digests():
    data = encode_manifest(manifest())
    spaced = data.replace(b'"v1"', b' "v1"')
    with pytest.raises(RegistryError) as caught:
        decode_manifest(spaced, PATH)
    assert str(caught.value) == (
        f"{PATH}: damaged manifest, expected {FileDigest.of(data)}, found {FileDigest.of(spaced)}"
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"[]", "pop expected at most 1 argument, got 2"),
        (b'{"a": 1e999}', "Out of range float values are not JSON compliant"),
        (b"[" * 100_000, "maximum recursion depth exceeded while decoding a JSON array"),
    ],
)
def test_what_is_no_manifest_is_refused_on_one_line(data, reason):
    with pytest.raises(RegistryError) as caught:
        decode_manifest(data, PATH)
    assert str(caught.value).startswith(f"{PATH}: damaged manifest, not readable as JSON ({reason}")
    assert len(caught.value.problems) == str(caught.value).count("\n") + 1 == 1


def test_a_newer_schema_is_refused_clearly():
    data = encode_manifest(manifest()).replace(b'"schema_version": 1', b'"schema_version": 2')
    with pytest.raises(RegistryError) as caught:
        decode_manifest(data, PATH)
    assert str(caught.value) == (
        f"{PATH}: manifest of schema 2, this peftkit reads up to 1; upgrade peftkit"
    )


def test_paths_in_the_info_become_text():
    data = encode_manifest(manifest(recipe={"output_dir": Path("runs")}))
    assert decode_manifest(data, PATH).info.recipe == {"output_dir": "runs"}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), "Out of range float values are not JSON compliant"),
        ({1, 2}, "expected str, bytes or os.PathLike object, not set"),
    ],
)
def test_info_that_json_cannot_hold_is_refused(value, reason):
    with pytest.raises(RegistryError) as caught:
        encode_manifest(manifest(recipe={"x": value}))
    assert str(caught.value).startswith(f"reviews: info holds what JSON cannot ({reason}")


def test_info_too_large_to_be_read_again_is_refused():
    with pytest.raises(RegistryError, match=r"^reviews: info of \d+ bytes, at most 4194304$"):
        encode_manifest(manifest(recipe={"x": "y" * (4 << 20)}))
