"""When the Hub is asked, what its cache gives in its place, and how its data sets are read."""

import socket
import time
from pathlib import Path

import pytest
from source_folders import make_model, refusal

from peftkit.data import hub
from peftkit.data.hub import hub_reachable
from peftkit.data.sources import Located, locate, read_splits
from peftkit.errors import DataError, SourceError

pytestmark = pytest.mark.usefixtures("sealed")


@pytest.fixture
def deaf_hub(monkeypatch):
    """An endpoint that refuses connections."""
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", f"http://{address}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return address


@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_a_hub_that_does_not_answer_costs_no_retries(deaf_hub, kind):
    start = time.monotonic()
    assert f"  Hub: {deaf_hub} does not answer; local cache: " in refusal(kind, "org/x")
    assert time.monotonic() - start < 3


def test_a_slow_name_lookup_is_cut_off(deaf_hub, monkeypatch):
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.1)

    def look_up(*_, **__):
        time.sleep(3)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", look_up)
    start = time.monotonic()
    assert not hub_reachable()
    assert time.monotonic() - start < 2


def test_a_listening_hub_is_reachable_unless_offline_is_wanted(monkeypatch, deaf_hub):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_reachable()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub_reachable()


def test_a_proxy_is_probed_in_place_of_the_hub(monkeypatch, deaf_hub):
    monkeypatch.delenv("no_proxy")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("http_proxy", f"127.0.0.1:{server.getsockname()[1]}")
        assert hub_reachable()


def cache_model(tmp_path, commit="c" * 40):
    repository = tmp_path / "hub/models--org--x"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    return make_model(repository / "snapshots" / commit)


def test_a_cached_model_is_used_offline_with_its_commit(tmp_path):
    folder = cache_model(tmp_path)
    assert locate("models", "org/x") == Located(folder, "hub", "org/x", None, "c" * 40)
    assert locate("models", "org/x", revision="c" * 40).path == folder
    assert "local cache: no whole snapshot" in refusal("models", "org/x", revision="v2")


def test_a_cached_config_alone_is_not_the_model(tmp_path):
    (cache_model(tmp_path) / "model.safetensors").unlink()
    expected = "local cache: a snapshot without config.json or *.safetensors"
    assert expected in refusal("models", "org/x")


def test_a_damaged_cached_model_stops_the_search(tmp_path):
    path = cache_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal("models", "org/x").startswith(f"{path}: damaged or incomplete safetensors: ")


def test_an_answering_hub_is_asked_for_the_revision(tmp_path, monkeypatch):
    import huggingface_hub

    folder, asked = make_model(tmp_path / ("d" * 40)), {}
    monkeypatch.setattr(hub, "_hub_obstacle", lambda: None)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **o: asked.update(o, name=name) or folder
    )
    found = locate("models", "org/x", revision="v1")
    assert found == Located(folder, "hub", "org/x", None, "d" * 40)
    assert (asked["name"], asked["revision"], asked["local_files_only"]) == ("org/x", "v1", False)


def test_a_refusing_hub_gives_its_reason(monkeypatch):
    from huggingface_hub import HfApi

    def refuse(self, name, **_):
        raise RuntimeError(f"404\n\nno {name}")

    monkeypatch.setattr(hub, "_hub_obstacle", lambda: None)
    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    assert "  Hub: RuntimeError: 404 no org/x; local cache: " in refusal("datasets", "org/x")


def cache_dataset(tmp_path, commit="c" * 40):
    """What `load_dataset` leaves behind for a Hub name."""
    import datasets

    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    folder = tmp_path / "cache/org___x/default/0.0.0" / commit
    saved = tmp_path / "saved"
    datasets.DatasetDict(train=rows).save_to_disk(saved)
    folder.mkdir(parents=True)
    (saved / "train/data-00000-of-00001.arrow").rename(folder / "x-train.arrow")
    splits = datasets.SplitDict()
    splits.add(datasets.SplitInfo("train", num_examples=2, dataset_name="x"))
    info = datasets.DatasetInfo(
        features=rows.features, splits=splits, config_name="default", dataset_name="x"
    )
    info.write_to_directory(folder)
    return folder


def test_a_cached_data_set_is_read_offline(tmp_path):
    folder = cache_dataset(tmp_path)
    located = locate("datasets", "org/x")
    assert located == Located(folder, "hub", "org/x", None, "c" * 40)
    assert read_splits(located, ["train"])["train"]["text"][:] == ["a", "b"]
    with pytest.raises(DataError) as error:
        read_splits(located, ["test"])
    assert str(error.value) == (
        f"data set 'org/x' ({folder}): no split 'test'; splits that exist: train"
    )


def test_another_revision_than_the_cached_one_is_not_used(tmp_path):
    cache_dataset(tmp_path)
    assert locate("datasets", "org/x", revision="c" * 40).origin == "hub"
    message = refusal("datasets", "org/x", revision="d" * 40)
    assert f"local cache: holds revision {'c' * 40}, not {'d' * 40}" in message


def test_a_data_set_of_the_hub_is_loaded_at_its_commit(monkeypatch):
    import datasets

    def load(name, config, *, revision):
        if revision != "abc":
            raise ValueError("other\nrevision")
        return datasets.DatasetDict(train=datasets.Dataset.from_list([{"name": name + config}]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    located = Located(Path("hub:org/x"), "hub", "org/x", "-c", "abc")
    assert read_splits(located, ["train"])["train"][0] == {"name": "org/x-c"}
    with pytest.raises(SourceError) as error:
        read_splits(Located(Path("hub:org/x"), "hub", "org/x", "-c", "def"), ["train"])
    assert str(error.value) == "data set 'org/x' of the Hub: ValueError: other revision"
