import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small_store import adapter, indexed, info, summary, weights

from peftkit.contracts import Delta
from peftkit.errors import RegistryError
from peftkit.registry import Registry, default_root
from peftkit.registry import collect as collect_module
from peftkit.registry import versions as versions_module
from peftkit.registry.digests import FileDigest
from peftkit.registry.index import Index

RESTORE = "restore this version from a copy or save the delta again"


@pytest.fixture
def registry(tmp_path) -> Registry:
    return Registry(tmp_path / "deep" / "store")


def refusal(action, *arguments) -> list[str]:
    with pytest.raises(RegistryError) as caught:
        action(*arguments)
    assert len(caught.value.problems) == str(caught.value).count("\n") + 1
    return caught.value.problems


def blob(registry: Registry, path: Path) -> Path:
    """The blob behind a link, made writable."""
    target = path.resolve()
    assert target.parent == (registry.root / "blobs" / "sha256").resolve()
    target.chmod(0o644)
    return target


@pytest.mark.parametrize("delta", [weights(), adapter()])
def test_a_saved_delta_comes_back_whole(registry, delta):
    saved = registry.save("reviews", delta, info(delta.kind))
    found = registry.find("reviews")
    registry.verify(found)
    back = registry.read_delta(found)
    assert found == saved
    assert (found.version, found.path) == ("v1", registry.root / "deltas" / "reviews@v1")
    assert (back.kind, back.adapter_config) == (delta.kind, delta.adapter_config)
    assert back.tensors.keys() == delta.tensors.keys()
    assert all(torch.equal(back.tensors[name], t) for name, t in delta.tensors.items())


def test_the_newest_version_is_meant_unless_another_is_named(registry):
    for value in range(1, 12):
        registry.save("reviews", weights(value), info())
    registry.save("again", weights(), info())
    assert registry.find("reviews").version == "v11"
    assert registry.find("reviews@latest").version == "v11"
    second = registry.find("reviews@v2")
    assert registry.read_delta(second).tensors["head.weight"][0, 0] == 2
    assert registry.find(f"reviews@{second.digest}") == second
    listing = [(row["name"], row["version"]) for row in registry.ls().rows]
    assert listing == [("again", "v1"), *(("reviews", f"v{n}") for n in range(1, 12))]
    assert set(indexed(registry)) == {f"{name}@{version}" for name, version in listing}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_alone_opens_a_stored_adapter(registry, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    base = BertForSequenceClassification(config)
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    lora = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    trained = get_peft_model(base, lora).eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = trained(ids).logits
    trained.save_pretrained(tmp_path / "peft")
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    tensors = get_peft_model_state_dict(trained, save_embedding_layers=False)
    stored = registry.save("lora", Delta("adapter", tensors, settings), info("adapter"))
    fresh = BertForSequenceClassification(config)
    fresh.load_state_dict(start)
    with torch.no_grad():
        logits = PeftModel.from_pretrained(fresh, stored.path).eval()(ids).logits
    assert torch.equal(logits, expected)
    for name in stored.files:
        assert (stored.path / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


@pytest.mark.parametrize("delta", [weights(float("nan")), Delta("weights", {})])
def test_a_delta_not_worth_keeping_touches_no_disk(registry, delta):
    refusal(registry.save, "reviews", delta, info())
    assert not registry.root.exists()


def test_info_of_another_kind_is_refused(registry):
    assert refusal(registry.save, "reviews", adapter(), info()) == [
        "reviews: info says kind 'weights', delta is 'adapter'"
    ]


def test_unknown_names_and_versions_get_the_nearest_one(registry):
    root = registry.root
    assert refusal(registry.find, "reviews") == [
        f"{root}: no delta 'reviews'; the registry is empty"
    ]
    registry.save("reviews", weights(), info())
    assert refusal(registry.find, "review") == [
        f"{root}: no delta 'review'; did you mean 'reviews'? Choices: reviews"
    ]
    assert refusal(registry.find, "reviews@v2") == [
        f"{root}: 'reviews' has no version or tag 'v2'; did you mean 'v1'? Choices: v1"
    ]
    digest = "sha256:" + "1" * 64
    assert refusal(registry.find, f"reviews@{digest}") == [
        f"{root}: 'reviews' has no version of digest {digest}"
    ]
    assert refusal(registry.find, "../reviews")[0].startswith("delta name '../reviews': expected")
    assert refusal(registry.save, "../reviews", weights(), info())[0].startswith("delta name")


def test_equal_bytes_are_stored_once(registry):
    registry.save("reviews", adapter(1), info("adapter"))
    before = set(registry.blobs.folder.iterdir())
    registry.save("other", adapter(1), info("adapter").model_copy(update={"base_name": "b"}))
    assert len(set(registry.blobs.folder.iterdir()) - before) == 2  # an info and a manifest
    assert all(not path.stat().st_mode & 0o222 for path in before)


def test_storing_the_same_bytes_again_mends_a_damaged_blob(registry):
    stored = registry.save("reviews", weights(), info())
    path = blob(registry, stored.path / "weights.safetensors")
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    refusal(registry.verify, stored)
    registry.save("other", weights(), info())
    registry.verify(stored)


def test_all_damage_is_reported_at_once(registry):
    stored = registry.save("reviews", adapter(), info("adapter"))
    config, tensors = (stored.path / name for name in sorted(stored.files))
    tensors_blob = blob(registry, tensors)
    whole = tensors_blob.read_bytes()
    tensors_blob.write_bytes(whole + b"\0")
    config_blob = blob(registry, config)
    config_blob.unlink()
    stray = stored.path / "README.md"
    stray.write_bytes(b"hi")
    found = [
        f"{stray}: stray; remove it",
        f"reviews@v1 {config.name}: {config_blob.absolute()}: missing, expected "
        f"{stored.files[config.name]}; {RESTORE}",
        f"reviews@v1 {tensors.name}: {tensors_blob.absolute()}: changed, expected "
        f"{FileDigest.of(whole)}, found {FileDigest.of(whole + bytes(1))}; {RESTORE}",
    ]
    assert refusal(registry.verify, stored) == found
    assert refusal(registry.read_delta, stored) == found


def test_links_and_folders_swapped_between_versions_are_refused(registry):
    first = registry.save("reviews", weights(1), info())
    second = registry.save("reviews", weights(2), info())
    names = "weights.safetensors", "oci-manifest.json"
    one, two = first.path / names[0], second.path / names[0]
    aside = first.path.with_name(".aside")
    for a, b in ((one, two), (first.path, second.path)):
        a.rename(aside)
        b.rename(a)
        aside.rename(b)
        for reference in ("reviews@v1", "reviews@v2"):
            assert len(refusal(registry.verify, registry.find(reference))) >= 1
        a.rename(aside)
        b.rename(a)
        aside.rename(b)
    registry.verify(first)


def test_a_version_replaced_by_a_link_is_refused(registry):
    stored = registry.save("reviews", weights(), info())
    away = registry.root.parent / "away"
    stored.path.rename(away)
    stored.path.symlink_to(away)
    assert "expected a link to a blob" in refusal(registry.find, "reviews")[0]
    assert len(registry.ls().problems) == 0  # the row was made when it was whole
    (registry.root / "cache.sqlite").unlink()
    assert "expected a link to a blob" in registry.ls().problems[0]


def test_ls_survives_and_names_what_is_damaged(registry):
    good = registry.save("reviews", weights(), info())
    bad = registry.save("reviews", weights(2), info().model_copy(update={"base_name": "other"}))
    (registry.root / "cache.sqlite").unlink()
    blob(registry, bad.path / "manifest.json").write_bytes(b"{")
    (registry.versions.folder / "Bad Name").mkdir()
    (registry.versions.folder / "reviews@v03").mkdir()
    listing = registry.ls()
    assert [row["version"] for row in listing.rows] == [good.version]
    assert len(listing.problems) == 3
    assert "Bad Name: not a version such as 'name@v1'; remove it" in listing.problems[0]
    assert "reviews@v03: not a version" in listing.problems[1]
    assert "changed, expected sha256:" in listing.problems[2]
    assert "changed" in refusal(registry.find, "reviews")[0]
    assert registry.save("reviews", weights(), info()).version == "v3"


def test_an_absent_store_is_empty_and_stays_absent(registry):
    assert registry.ls().rows == []
    assert not registry.root.parent.exists()


def test_a_store_that_cannot_be_listed_says_so(registry, monkeypatch):
    def deny(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", deny)
    assert refusal(registry.ls) == [
        f"{registry.root}/deltas: cannot be listed (Permission denied); "
        "make it writable or point PEFTKIT_REGISTRY at a folder that is"
    ]


def test_a_file_in_the_stores_place_is_refused(registry):
    registry.root.parent.mkdir(parents=True)
    registry.root.write_text("")
    (line,) = refusal(registry.save, "reviews", weights(), info())
    assert line.startswith(f"{registry.root}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"imageLayoutVersion": "1.0.0", "vnd.peftkit.store": 2}', "upgrade peftkit"),
        ('{"imageLayoutVersion": "2.0.0"}', "upgrade peftkit"),
        ("{}", "not the marker of an OCI layout"),
        ("[" * 100_000, "not the marker of an OCI layout"),
    ],
)
def test_a_store_of_a_newer_schema_is_refused_by_every_verb(registry, content, said):
    registry.save("reviews", weights(), info())
    (registry.root / "oci-layout").write_text(content)
    actions = [
        (registry.save, "reviews", weights(), info()),
        (registry.find, "reviews"),
        (registry.ls,),
        (registry.rm, "reviews"),
        (registry.tag, "reviews", "best"),
        (registry.gc,),
    ]
    for action, *arguments in actions:
        assert said in refusal(action, *arguments)[0]


def test_tags_name_versions_until_they_are_moved_or_taken_away(registry):
    registry.save("reviews", weights(1), info())
    registry.save("reviews", weights(2), info())
    registry.tag("reviews@v1", "best")
    assert registry.find("reviews@best").version == "v1"
    assert indexed(registry) == ["reviews@v1", "reviews@v2", "reviews@best"]
    assert refusal(registry.tag, "reviews@v2", "best") == [
        "reviews@best: means v1 already; move it with --force, or take another tag"
    ]
    registry.tag("reviews@v2", "best", move=True)
    assert registry.find("reviews@best").version == "v2"
    assert [row["tags"] for row in registry.ls().rows] == [[], ["best"]]
    assert refusal(registry.untag, "reviews", "bets") == [
        f"{registry.root}: no tag 'reviews@bets'; did you mean 'best'? Choices: best"
    ]
    registry.untag("reviews", "best")
    assert indexed(registry) == ["reviews@v1", "reviews@v2"]
    for bad in ("v3", "latest", "../up", "A"):
        assert refusal(registry.tag, "reviews", bad)[0].startswith(f"tag {bad!r}: ")


def test_a_removed_number_is_never_used_again(registry):
    registry.save("reviews", weights(1), info())
    second = registry.save("reviews", weights(2), info())
    registry.tag("reviews@v2", "best")
    assert registry.rm("reviews@best") == ["reviews@v2", "reviews@best"]
    assert not second.path.exists()
    assert indexed(registry) == ["reviews@v1"]
    assert "did you mean 'v1'" in refusal(registry.find, "reviews@v2")[0]
    assert registry.save("reviews", weights(3), info()).version == "v3"
    assert registry.rm("reviews") == ["reviews@v1", "reviews@v3"]
    assert registry.save("reviews", weights(4), info()).version == "v4"
    assert summary(registry) == {"reviews@v4": 4.0}


def test_gc_frees_what_no_version_needs_and_nothing_else(registry):
    registry.save("reviews", weights(1), info())
    registry.save("reviews", weights(2), info())
    registry.rm("reviews@v2")
    would = registry.gc(dry_run=True)
    assert len(would.blobs) == 2  # the info is the same as the first version's
    found = registry.gc()
    assert (found.blobs, found.freed_bytes) == (would.blobs, would.freed_bytes)
    assert registry.gc().blobs == []
    assert summary(registry) == {"reviews@v1": 1.0}


def test_gc_spares_a_save_in_work_and_clears_one_that_died(registry):
    registry.save("reviews", weights(1), info())
    data = b"half-finished"
    digest = FileDigest.of(data)
    staged = registry.versions.stage({"weights.safetensors": digest.sha256})
    registry.blobs.put({digest: data})
    assert registry.gc().blobs == []
    dead = staged.with_name(staged.name.replace(f"-{os.getpid()}-", "-999999999-"))
    staged.rename(dead)
    assert registry.gc(dry_run=True).leftovers == [dead]
    found = registry.gc()
    assert (found.leftovers, found.blobs) == ([dead], [digest.sha256])
    assert not dead.exists()
    assert summary(registry) == {"reviews@v1": 1.0}


def test_a_blob_that_gc_set_aside_before_it_was_killed_is_found(registry):
    stored = registry.save("reviews", weights(1), info())
    for path in list(registry.blobs.folder.iterdir()):
        path.rename(path.with_name(f".gc-{path.name}"))
    registry.verify(registry.find("reviews"))
    assert registry.gc().blobs == []
    registry.verify(stored)


def test_a_save_that_gc_overtakes_is_whole(registry):
    registry.save("reviews", weights(1), info())
    registry.rm("reviews@v1")
    real = registry.versions.publish

    def publish(staging, name, **options):
        # Between the look at the blobs and the publishing, a gc that had seen no links deletes.
        for path in registry.blobs.folder.iterdir():
            path.unlink()
        return real(staging, name, **options)

    registry.versions.publish = publish
    registry.verify(registry.save("reviews", weights(1), info()))


def test_the_cache_and_the_folders_are_made_anew_from_the_layout(registry):
    for value in (1, 2, 3):
        registry.save("reviews", weights(value), info())
    registry.tag("reviews@v2", "best")
    registry.rm("reviews@v1")
    for name in ("deltas", "tags"):
        shutil.rmtree(registry.root / name)
    (registry.root / "cache.sqlite").write_bytes(b"no database" * 100)
    fresh = Registry(registry.root)
    assert fresh.find("reviews").version == "v3"
    assert summary(fresh) == {"reviews@v2": 2.0, "reviews@v3": 3.0}
    assert fresh.find("reviews@best").version == "v2"


def test_a_lost_index_is_written_again_with_the_next_change(registry):
    registry.save("reviews", weights(1), info())
    (registry.root / "index.json").unlink()
    assert summary(registry) == {"reviews@v1": 1.0}
    registry.save("reviews", weights(2), info())
    assert indexed(registry) == ["reviews@v1", "reviews@v2"]


def test_a_number_taken_meanwhile_is_never_overwritten(registry, monkeypatch):
    registry.save("reviews", weights(1), info())
    registry.save("reviews", weights(2), info())
    real = versions_module.Versions._newest_used
    monkeypatch.setattr(Index, "newest_number", lambda self, name: (0, True))
    stale = [0]  # what a listing showed before the others published
    monkeypatch.setattr(
        versions_module.Versions,
        "_newest_used",
        lambda self, name: stale.pop() if stale else real(self, name),
    )
    assert registry.save("reviews", weights(3), info()).version == "v3"
    assert stale == []
    assert summary(registry) == {"reviews@v1": 1.0, "reviews@v2": 2.0, "reviews@v3": 3.0}


def test_a_removed_number_is_not_used_again_whatever_the_cache_says(registry, monkeypatch):
    for value in (1, 2, 3):
        registry.save("reviews", weights(value), info())
    registry.rm("reviews@v3")
    assert registry.index.newest_number("reviews") == (2, True)
    assert registry.save("reviews", weights(4), info()).version == "v4"


def test_a_cache_that_is_behind_is_not_asked_for_the_newest(registry, tmp_path):
    registry.save("reviews", weights(1), info())
    shutil.copy(registry.root / "cache.sqlite", tmp_path)
    registry.save("reviews", weights(2), info())
    shutil.copy(tmp_path / "cache.sqlite", registry.root)
    assert registry.index.newest_number("reviews") == (2, False)
    assert registry.save("reviews", weights(3), info()).version == "v3"


def test_a_save_that_never_gets_a_number_gives_up(registry, monkeypatch):
    registry.save("reviews", weights(1), info())
    monkeypatch.setattr(versions_module, "MAX_ATTEMPTS", 3)

    def taken(source, target):
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "rename", taken)
    assert (
        "other writers took 3 numbers; save it again"
        in refusal(registry.save, "reviews", weights(2), info())[0]
    )
    assert summary(registry) == {"reviews@v1": 1.0}
    assert list(registry.versions.staged()) == []


def test_concurrent_saves_are_all_kept_and_readers_see_whole_versions(registry):
    def save(value):
        registry.save("reviews", weights(value), info())
        return len(summary(registry))

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(save, range(32)))
    assert sorted(summary(registry).values()) == list(range(32))
    assert max(seen) <= 32


def test_the_root_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("PEFTKIT_REGISTRY", raising=False)
    assert default_root() == Path("registry")
    monkeypatch.setenv("PEFTKIT_REGISTRY", "/srv/deltas")
    assert default_root() == Path("/srv/deltas")


def test_stored_deltas_are_values(registry):
    stored = registry.save("reviews", weights(), info())
    with pytest.raises(dataclasses.FrozenInstanceError):
        stored.version = "v2"


def test_listing_and_finding_import_no_tensor_library(registry):
    registry.save("reviews", weights(), info())
    code = (
        "import sys; from pathlib import Path; from peftkit.registry import Registry\n"
        f"registry = Registry(Path({str(registry.root)!r}))\n"
        "registry.verify(registry.find('reviews')); assert len(registry.ls().rows) == 1\n"
        "heavy = {'torch', 'numpy', 'transformers', 'peft', 'safetensors', 'datasets'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_a_leftover_that_stays_is_not_called_removed(registry, monkeypatch):
    registry.save("reviews", weights(1), info())
    registry.versions.stage({}).rename(registry.versions.staging / ".staging-other-1-0")
    os.utime(registry.versions.staging / ".staging-other-1-0", (0, 0))
    monkeypatch.setattr(collect_module, "discard", lambda path: None)
    assert refusal(registry.gc) == [
        f"{registry.root}: not all was removed (a leftover cannot be removed); "
        "check the disk, then try again"
    ]
