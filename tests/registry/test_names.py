import json
from pathlib import Path

import pytest

from peftkit.contracts import Quantisation
from peftkit.errors import RegistryError
from peftkit.registry.manifest import (
    DeltaInfo,
    RunSummary,
    decode_info,
    encode_info,
)
from peftkit.registry.names import (
    Reference,
    check_name,
    name_problem,
    parse_reference,
    version_number,
)
from peftkit.registry.versions import Version, parse_version

ALLOWED = (
    "expected 1 to 63 characters of a-z, 0-9, '.', '_' and '-', "
    "the first a letter or a digit, such as 'reviews-lora'"
)
PATH = Path("store/deltas/reviews@v1/manifest.json")


def info(**changes: object) -> DeltaInfo:
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
    return DeltaInfo(**values | changes)


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
    + [(n, "Windows cannot keep a folder of that name") for n in ("con", "nul.txt", "com1", "a.")],
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
        ("reviews@v12", Reference("reviews", version="v12")),
        ("reviews@best", Reference("reviews", tag="best")),
        (f"reviews@sha256:{'a' * 64}", Reference("reviews", digest=f"sha256:{'a' * 64}")),
    ],
)
def test_references_are_read(text, reference):
    assert parse_reference(text) == reference


@pytest.mark.parametrize(
    "version",
    ["", "v0", "v01", "V1", "v1\n", "v1@v2", "v1/..", "v²", "sha256:ab", "sha256:" + "A" * 64],
)
def test_unreadable_versions_are_refused(version):
    with pytest.raises(RegistryError) as caught:
        parse_reference(f"reviews@{version}")
    assert str(caught.value) == (
        f"reference {f'reviews@{version}'!r}: version {version!r} is unreadable; expected "
        "'reviews', 'reviews@latest', 'reviews@v1', a tag or 'reviews@sha256:' and 64 hex digits"
    )


@pytest.mark.parametrize(
    ("entry", "version"),
    [
        ("a@v10", Version("a", 10)),
        ("a@v01", None),
        ("a@v0", None),
        ("A@v1", None),
        ("a", None),
        ("a@best", None),
        ("a@v1@v2", None),
    ],
)
def test_entries_are_versions_only_when_they_are_written_so(entry, version):
    assert parse_version(entry) == version
    assert version_number("v10") == 10


def test_versions_sort_by_name_and_number():
    assert sorted([Version("b", 1), Version("a", 10), Version("a", 9)]) == [
        Version("a", 9),
        Version("a", 10),
        Version("b", 1),
    ]


@pytest.mark.parametrize("quantisation", [None, Quantisation("nf4", False, "bfloat16")])
def test_info_reads_back_equal(quantisation):
    written = info(quantisation=quantisation)
    assert decode_info(encode_info(written), PATH) == written


def test_fields_that_do_not_fit_are_all_named():
    payload = json.loads(encode_info(info()))
    del payload["base_name"]
    payload["seed"] = 3
    with pytest.raises(RegistryError) as caught:
        decode_info(json.dumps(payload).encode(), PATH)
    assert caught.value.problems == [
        f"{PATH}: base_name: Field required",
        f"{PATH}: seed: Extra inputs are not permitted",
    ]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"[" * 100_000, "maximum recursion depth exceeded while decoding a JSON array"),
        (b"\xff{}", "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_what_is_no_info_is_refused_on_one_line(data, reason):
    with pytest.raises(RegistryError) as caught:
        decode_info(data, PATH)
    assert str(caught.value).startswith(f"{PATH}: damaged info, not readable as JSON ({reason}")
    assert len(caught.value.problems) == str(caught.value).count("\n") + 1 == 1


def test_a_newer_schema_is_refused_clearly():
    data = encode_info(info()).replace(b'"schema_version": 1', b'"schema_version": 2')
    with pytest.raises(RegistryError) as caught:
        decode_info(data, PATH)
    assert str(caught.value) == (
        f"{PATH}: a delta of schema 2, this peftkit reads up to 1; upgrade peftkit"
    )


def test_paths_in_the_info_become_text():
    data = encode_info(info(recipe={"output_dir": Path("runs")}))
    assert decode_info(data, PATH).recipe == {"output_dir": "runs"}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), "Out of range float values are not JSON compliant"),
        ({1, 2}, "expected str, bytes or os.PathLike object, not set"),
    ],
)
def test_info_that_json_cannot_hold_is_refused(value, reason):
    with pytest.raises(RegistryError) as caught:
        encode_info(info(recipe={"x": value}))
    assert str(caught.value).startswith(f"delta: info holds what JSON cannot ({reason}")


def test_info_too_large_to_be_read_again_is_refused():
    with pytest.raises(RegistryError, match=r"^delta: info of \d+ bytes, at most 4194304$"):
        encode_info(info(recipe={"x": "y" * (4 << 20)}))
