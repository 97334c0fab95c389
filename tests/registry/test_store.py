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

from peftkit import staging
from peftkit.contracts import Delta
from peftkit.errors import RegistryError
from peftkit.registry import DeltaInfo, Registry, RunSummary, default_root, store
from peftkit.registry.tensors import FileDigest

RESTORE = "restore this version from a copy or save the delta again"
DIGEST = "sha256:" + "0" * 64


def info(kind="weights") -> DeltaInfo:
    return DeltaInfo(
        kind=kind,
        base_name="org/base",
        base_digest=DIGEST,
        tokenizer_digest=DIGEST,
        task={"type": "classification"},
        method={"type": "full"},
        labels=["bad", "good"],
        model={"auto_class": "AutoModelForSequenceClassification"},
        recipe={"name": "r"},
        recipe_digest=DIGEST,
        run=RunSummary(record="runs/r", seed=1, status="finished", metrics={"f1": 0.5}),
        stand_in=False,
    )


def weights(value: float = 1.0) -> Delta:
    return Delta("weights", {"head.weight": torch.full((2, 3), value)})


def adapter(value: float = 1.0) -> Delta:
    return Delta("adapter", {"q.lora_A": torch.full((2,), value)}, {"peft_type": "LORA", "r": 2})


@pytest.fixture
def registry(tmp_path) -> Registry:
    return Registry(tmp_path / "deep" / "store")


def refusal(action, *arguments) -> list[str]:
    with pytest.raises(RegistryError) as caught:
        action(*arguments)
    assert len(caught.value.problems) == str(caught.value).count("\n") + 1
    return caught.value.problems


def summary(registry: Registry) -> dict[str, float]:
    """First value of every version, read with verification; the store has no problem."""
    scan = registry.scan()
    assert scan.problems == []
    values = {}
    for stored in scan.deltas:
        tensors = registry.read_delta(stored).tensors
        values[f"{stored.name}@{stored.version}"] = next(iter(tensors.values())).flatten()[0].item()
    return values


@pytest.mark.parametrize("delta", [weights(), adapter()])
def test_a_saved_delta_comes_back_whole(registry, delta):
    saved = registry.save("reviews", delta, info(delta.kind))
    found = registry.find("reviews")
    registry.verify(found)
    back = registry.read_delta(found)
    assert found == saved
    assert (found.version, found.path) == ("v1", registry.root / "reviews" / "v1")
    assert (back.kind, back.adapter_config) == (delta.kind, delta.adapter_config)
    assert back.tensors.keys() == delta.tensors.keys()
    assert all(torch.equal(back.tensors[name], t) for name, t in delta.tensors.items())


def test_the_newest_version_is_meant_unless_another_is_named(registry):
    for value in range(1, 12):
        registry.save("reviews", weights(value), info())
    registry.save("again", weights(), info())
    assert registry.find("reviews").version == "v11"
    assert registry.find("reviews@latest").version == "v11"
    assert registry.read_delta(registry.find("reviews@v2")).tensors["head.weight"][0, 0] == 2
    listing = [(stored.name, stored.version) for stored in registry.ls()]
    assert listing == [("again", "v1"), *(("reviews", f"v{n}") for n in range(1, 12))]


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
    (root / "emptied").mkdir()
    (root / "notes.txt").write_text("")
    assert refusal(registry.find, "review") == [
        f"{root}: no delta 'review'; did you mean 'reviews'? Choices: reviews"
    ]
    assert refusal(registry.find, "reviews@v2") == [
        f"{root}/reviews: no version 'v2'; did you mean 'v1'? Choices: v1"
    ]
    assert refusal(registry.find, "../reviews")[0].startswith("delta name '../reviews': expected")
    assert refusal(registry.save, "../reviews", weights(), info())[0].startswith("delta name")


@pytest.mark.parametrize("delta", [weights(), adapter()])
def test_every_flipped_bit_of_every_file_is_refused(registry, delta):
    stored = registry.save("reviews", delta, info(delta.kind))
    for path in sorted(stored.path.iterdir()):
        whole = path.read_bytes()
        for place in range(0, len(whole), 5):
            changed = bytearray(whole)
            changed[place] ^= 1 << place % 8
            path.write_bytes(changed)
            line = f"{path}: changed, expected {FileDigest.of(whole)}, "
            line += f"found {FileDigest.of(bytes(changed))}; {RESTORE}"
            assert refusal(registry.verify, stored) == [line]
            assert refusal(registry.read_delta, stored) == [line]
            if path.name == "manifest.json":
                refusal(registry.find, "reviews")
        path.write_bytes(whole)
    registry.verify(registry.find("reviews"))


def test_all_damage_is_reported_at_once(registry):
    stored = registry.save("reviews", adapter(), info("adapter"))
    config, tensors = (stored.path / name for name in sorted(stored.files))
    config.unlink()
    whole = tensors.read_bytes()
    tensors.write_bytes(whole + b"\0")
    stray = stored.path / "README.md"
    stray.write_bytes(b"hi")
    found = [
        f"{stray}: stray, expected no such file, found {FileDigest.of(b'hi')}; remove it",
        f"{config}: missing, expected {stored.files[config.name]}; {RESTORE}",
        f"{tensors}: changed, expected {FileDigest.of(whole)}, "
        f"found {FileDigest.of(whole + bytes(1))}; {RESTORE}",
    ]
    assert refusal(registry.verify, stored) == found
    assert refusal(registry.read_delta, stored) == found


def test_files_swapped_between_two_versions_are_refused(registry):
    first = registry.save("reviews", weights(1), info())
    second = registry.save("reviews", weights(2), info())
    name = "weights.safetensors"
    one, two = (first.path / name).read_bytes(), (second.path / name).read_bytes()
    (first.path / name).write_bytes(two)
    (second.path / name).write_bytes(one)
    for stored in (first, second):
        assert len(refusal(registry.verify, stored)) == 1


def test_a_version_moved_as_a_whole_is_refused(registry):
    registry.save("reviews", weights(), info())
    moved = registry.root / "other" / "v3"
    shutil.copytree(registry.root / "reviews" / "v1", moved)
    line = f"{moved}/manifest.json: belongs to 'reviews@v1', found in 'other@v3'; move it back"
    assert refusal(registry.find, "other") == [line]
    assert registry.scan().problems == [line]


def test_a_manifest_exchanged_after_find_is_refused(registry):
    stored = registry.save("reviews", weights(1), info())
    shutil.rmtree(stored.path)
    registry.save("reviews", weights(2), info())
    assert len(refusal(registry.read_delta, stored)) == 2


@pytest.mark.parametrize("linked", ["weights.safetensors", "manifest.json", "v1", "reviews"])
def test_symbolic_links_are_refused(registry, linked):
    stored = registry.save("reviews", weights(), info())
    place = {"v1": stored.path, "reviews": stored.path.parent}.get(linked, stored.path / linked)
    away = registry.root.parent / "away"
    place.rename(away)
    place.symlink_to(away)
    problem = refusal(registry.verify, stored)[0]
    assert problem.startswith(f"{place}: ")
    assert "a symbolic link" in problem
    if linked != "weights.safetensors":
        refusal(registry.find, "reviews")
        scan = registry.scan()
        assert (scan.deltas, len(scan.problems)) == ([], 1)
    if linked == "reviews":
        refusal(registry.save, "reviews", weights(), info())


def test_a_manifest_may_only_list_the_files_of_its_kind(registry, monkeypatch):
    monkeypatch.setitem(store.DELTA_FILES, "weights", frozenset({"other.bin"}))
    stored = registry.save("reviews", weights(), info())
    assert refusal(registry.find, "reviews") == [
        f"{stored.path}/manifest.json: lists ['weights.safetensors'], "
        "a delta of kind 'weights' has ['other.bin']"
    ]


def test_a_giant_manifest_is_refused(registry):
    stored = registry.save("reviews", weights(), info())
    os.truncate(stored.path / "manifest.json", (4 << 20) + 1)
    assert refusal(registry.find, "reviews") == [
        f"{stored.path}/manifest.json: manifest of 4194305 bytes, 4194304 are allowed"
    ]


def test_ls_survives_and_names_what_is_damaged(registry):
    root = registry.root
    good = registry.save("reviews", weights(), info())
    bad = registry.save("reviews", weights(), info())
    (bad.path / "manifest.json").write_bytes(b"{")
    (root / "reviews" / "v3").mkdir()
    (root / "reviews" / "v04").mkdir()
    (root / "Bad Name").mkdir()
    (root / ".staging-1" / "v1").mkdir(parents=True)
    (root / "reviews" / ".staging-2").mkdir()
    (root / "README.md").write_text("my deltas")
    assert registry.ls() == [good]
    assert registry.scan().problems == [
        f"{root}: folder 'Bad Name': expected 1 to 63 characters of a-z, 0-9, '.', '_' and '-', "
        "the first a letter or a digit, such as 'reviews-lora'",
        f"{root}/reviews/v2/manifest.json: damaged manifest, not readable as JSON (Expecting "
        "property name enclosed in double quotes: line 1 column 2 (char 1))",
        f"{root}/reviews/v3/manifest.json: unreadable manifest (No such file or directory)",
        f"{root}/reviews/v04: not a version such as 'v1'; remove it",
    ]
    assert "unreadable manifest" in refusal(registry.find, "reviews")[0]
    assert registry.save("reviews", weights(), info()).version == "v4"


def test_an_absent_store_is_empty_and_stays_absent(registry):
    assert registry.ls() == []
    assert not registry.root.parent.exists()


def test_a_store_that_cannot_be_listed_says_so(registry, monkeypatch):
    def deny(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", deny)
    line = f"{registry.root}: cannot be listed (Permission denied)"
    assert refusal(registry.ls) == [line]


def test_a_file_in_the_folders_place_is_refused(registry):
    registry.root.mkdir(parents=True)
    (registry.root / "reviews").write_text("")
    assert refusal(registry.save, "reviews", weights(), info()) == [
        f"{registry.root}/reviews: delta not saved, nothing was stored "
        "(a file lies in the folder's place); check the disk, then save again"
    ]


class Faults:
    """Lets the n-th call that touches the disk fail; a failing write leaves half its bytes."""

    def __init__(self, monkeypatch, code: int) -> None:
        self.calls, self.fatal, self.code = 0, 0, code
        for owner, name in [(os, "fsync"), (os, "rename"), (os, "open"), (os, "listdir")]:
            self._wrap(monkeypatch, owner, name)
        for name in ("write_bytes", "mkdir"):
            self._wrap(monkeypatch, Path, name)

    def _wrap(self, monkeypatch, owner, name):
        real = getattr(owner, name)

        def wrapped(*arguments, **options):
            self.calls += 1
            if self.calls == self.fatal:
                if name == "write_bytes":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                if self.code < 0:
                    raise KeyboardInterrupt
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, wrapped)


def outcome(action, *arguments) -> BaseException | None:
    try:
        action(*arguments)
    except BaseException as error:
        return error
    return None


@pytest.mark.parametrize(
    ("code", "litter", "older"),
    [(errno.ENOSPC, False, 0), (errno.ENOSPC, True, 1), (errno.EIO, False, 1), (-1, True, 1)],
)
def test_a_save_cut_short_anywhere_leaves_the_old_or_the_new_state(
    registry, code, litter, older, tmp_path
):
    fatal, failed = 1, True
    expected = KeyboardInterrupt if code < 0 else RegistryError
    while failed:
        shutil.rmtree(tmp_path / "deep", ignore_errors=True)
        before = {"reviews@v1": 1.0} if older else {}
        for _ in before:
            registry.save("reviews", weights(1), info())
        after = {**before, f"reviews@v{older + 1}": 2.0}
        with pytest.MonkeyPatch.context() as patch:
            if litter:
                patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            faults = Faults(patch, code)
            faults.fatal = fatal
            raised = outcome(registry.save, "reviews", weights(2), info())
            failed = faults.calls >= fatal
        assert type(raised) is (expected if failed else type(None))
        if isinstance(raised, RegistryError):
            assert len(str(raised).splitlines()) == 1
            assert summary(registry) == (after if "stored and whole" in str(raised) else before)
        assert summary(registry) in (before, after)
        registry.save("reviews", weights(3), info())
        assert max(summary(registry).values()) == 3.0
        fatal += 1
    assert fatal > 12


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "free some space or point PEFTKIT_REGISTRY at another disk"),
        (errno.EROFS, "make it writable or point PEFTKIT_REGISTRY at a folder that is"),
        (errno.EIO, "check the disk, then save again"),
    ],
)
def test_a_disk_that_refuses_gets_one_line(registry, monkeypatch, code, hint):
    Faults(monkeypatch, code).fatal = 1
    assert refusal(registry.save, "reviews", weights(), info()) == [
        f"{registry.root}/reviews: delta not saved, nothing was stored "
        f"({os.strerror(code)}); {hint}"
    ]


def test_a_failing_last_fsync_does_not_deny_what_is_stored(registry, monkeypatch):
    registry.save("reviews", weights(1), info())
    real = staging.fsync_path

    def fsync_path(path):
        if path == registry.root / "reviews":
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(staging, "fsync_path", fsync_path)
    assert refusal(registry.save, "reviews", weights(2), info()) == [
        f"{registry.root}/reviews/v2: stored and whole, but a power cut may still undo it "
        "(Input/output error); check the disk, then verify it"
    ]
    assert summary(registry) == {"reviews@v1": 1.0, "reviews@v2": 2.0}


def test_everything_is_on_disk_before_it_is_published(registry, monkeypatch):
    events = []
    real_fsync, real_rename = staging.fsync_path, os.rename

    def fsync_path(path):
        events.append(path.name)
        real_fsync(path)

    def rename(source, target):
        events[events.index(Path(source).name)] = "staging"
        events.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(staging, "fsync_path", fsync_path)
    monkeypatch.setattr(store, "fsync_path", fsync_path)
    monkeypatch.setattr(os, "rename", rename)
    registry.save("reviews", weights(), info())
    files = ["manifest.json", "weights.safetensors", "staging"]
    parents = [registry.root.parent.parent.name, "deep", "store"]
    assert events == [*parents, *files, "rename", "reviews"]


@pytest.mark.parametrize("checked", [True, False])
def test_a_number_taken_meanwhile_is_never_overwritten(registry, checked):
    registry.save("reviews", weights(1), info())
    registry.save("reviews", weights(2), info())
    real = store.versions
    stale = [["v1"], []]  # what a listing showed before the others published
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "versions", lambda path: stale.pop() if stale else real(path))
        if not checked:  # the other writer comes between the check and the rename
            patch.setattr(Path, "exists", lambda path: not path.name.startswith("v"))
        assert registry.save("reviews", weights(3), info()).version == "v3"
    assert stale == []
    assert summary(registry) == {"reviews@v1": 1.0, "reviews@v2": 2.0, "reviews@v3": 3.0}


def test_a_save_that_never_gets_a_number_gives_up(registry, monkeypatch):
    registry.save("reviews", weights(1), info())
    monkeypatch.setattr(store, "MAX_ATTEMPTS", 3)

    def taken(source, target):
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "rename", taken)
    assert refusal(registry.save, "reviews", weights(2), info()) == [
        f"{registry.root}/reviews: delta not saved, other writers took 3 numbers; save it again"
    ]
    assert summary(registry) == {"reviews@v1": 1.0}


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
        "registry.verify(registry.find('reviews')); assert len(registry.ls()) == 1\n"
        "heavy = {'torch', 'numpy', 'transformers', 'peft', 'safetensors', 'datasets'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")
