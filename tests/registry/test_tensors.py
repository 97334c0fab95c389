import json
import math
import os
import random
import struct
import time
from contextlib import suppress

import pytest
import torch

from peftkit.contracts import Delta
from peftkit.errors import RegistryError
from peftkit.registry.digests import FileDigest, checked_file, read_file
from peftkit.registry.tensors import MAX_TENSORS, check_header, delta_from_files, delta_to_files

RESTORE = "restore this version from a copy or save the delta again"


def weights(**tensors: torch.Tensor) -> Delta:
    return Delta("weights", tensors)


def file_of(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + payload


def refusal(data: bytes) -> str:
    with pytest.raises(RegistryError) as caught:
        check_header(data, "w.safetensors")
    return str(caught.value)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]
)
def test_tensors_come_back_bit_equal_in_their_dtype(dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    back = delta_from_files("weights", delta_to_files(weights(a=tensor, b=tensor.T)))
    assert back.kind == "weights"
    assert back.adapter_config is None
    assert back.tensors["a"].dtype == back.tensors["b"].dtype == dtype
    assert torch.equal(back.tensors["a"].view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(back.tensors["b"].float(), tensor.T.float())


def test_tensors_that_share_memory_are_stored_whole():
    block = torch.arange(8.0)
    delta = weights(a=block, b=block, c=block[:4], d=torch.nn.Parameter(block[4:]))
    back = delta_from_files("weights", delta_to_files(delta)).tensors
    assert {name: tensor.tolist() for name, tensor in back.items()} == {
        name: tensor.tolist() for name, tensor in delta.tensors.items()
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_non_finite_tensors_are_all_named(bad, dtype):
    spoiled = torch.tensor([0.0, bad]).to(dtype)
    with pytest.raises(RegistryError) as caught:
        delta_to_files(weights(b=spoiled, good=torch.ones(2), a=spoiled))
    assert caught.value.problems == [
        "delta: tensor 'a' holds NaN or Inf; a diverged run is not saved",
        "delta: tensor 'b' holds NaN or Inf; a diverged run is not saved",
    ]


def test_a_wholly_diverged_delta_does_not_fill_the_screen():
    with pytest.raises(RegistryError) as caught:
        delta_to_files(Delta("weights", {f"t{i}": torch.tensor([math.nan]) for i in range(25)}))
    assert caught.value.problems[20:] == ["delta: and 5 more tensors with NaN or Inf"]


@pytest.mark.parametrize("tensors", [{}, {"a": torch.empty(0, 4)}])
def test_an_empty_delta_is_refused(tensors):
    with pytest.raises(RegistryError) as caught:
        delta_to_files(Delta("weights", tensors))
    assert str(caught.value) == (
        "delta: holds no values; training changed nothing, so there is nothing to save"
    )


@pytest.mark.parametrize(
    ("delta", "problem"),
    [
        (
            Delta("adapter", {"a": torch.ones(1)}),
            "delta: kind 'adapter' needs the adapter_config of its PEFT model, with peft_type",
        ),
        (
            Delta("adapter", {"a": torch.ones(1)}, {"r": 4}),
            "delta: kind 'adapter' needs the adapter_config of its PEFT model, with peft_type",
        ),
        (
            Delta("weights", {"a": torch.ones(1)}, {"peft_type": "LORA"}),
            "delta: kind 'weights' takes no adapter_config",
        ),
        (
            Delta("weights", {"__metadata__": torch.ones(1)}),
            "delta: no tensor may be called '__metadata__', safetensors uses that name",
        ),
        (
            Delta("adapter", {"a": torch.ones(1)}, {"peft_type": "LORA", "targets": {"q"}}),
            "delta: adapter_config.json: Object of type set is not JSON serializable",
        ),
    ],
)
def test_content_that_the_files_cannot_hold_is_refused(delta, problem):
    with pytest.raises(RegistryError) as caught:
        delta_to_files(delta)
    assert str(caught.value) == problem


def test_more_tensors_than_can_be_read_again_are_refused_when_saving(monkeypatch):
    monkeypatch.setattr("peftkit.registry.tensors.MAX_TENSORS", 3)
    tensors = {f"t{i}": torch.ones(1) for i in range(5)}
    with pytest.raises(RegistryError) as caught:
        delta_to_files(Delta("weights", tensors))
    assert str(caught.value) == (
        "weights.safetensors: more than 3 tensors, which is the most allowed"
    )


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "not a safetensors file (header of 0 in 0 bytes)"),
        (b"\1" * 7, "not a safetensors file (header of 0 in 7 bytes)"),
        (file_of(b""), "not a safetensors file (header of 0 in 8 bytes)"),
        (file_of(b"{}")[:-1], "not a safetensors file (header of 2 in 9 bytes)"),
        (b"\xff" * 16, f"header of {2**64 - 1} bytes, at most 4194304 are allowed"),
        (file_of(b" " * 4194305), "header of 4194305 bytes, at most 4194304 are allowed"),
        (file_of(b"[1]"), "expected a header of at most 20000 named tensors"),
        (file_of(b"{} x"), "unreadable header (Extra data: line 1 column 4 (char 3))"),
        (file_of(b'{"a":{},"a":{}}'), "unreadable header (key 'a' appears more than once)"),
        (
            file_of(b'{"a":{"shape":[1],"shape":[2]}}'),
            "unreadable header (key 'shape' appears more than once)",
        ),
    ],
)
def test_bad_headers_are_refused(data, problem):
    assert refusal(data) == f"w.safetensors: {problem}"


def test_deep_headers_are_refused():
    assert refusal(file_of(b"[" * 100_000)).startswith("w.safetensors: unreadable header (maximum")


@pytest.mark.parametrize("filler", [b'"%d":{},', b'"%d":0,'])
def test_the_number_of_tensors_is_bounded(filler):
    entries = b"".join(filler % i for i in range(MAX_TENSORS + 1)).rstrip(b",")
    assert "20000" in refusal(file_of(b"{" + entries + b"}"))


def test_the_largest_allowed_number_of_tensors_is_read():
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = {"__metadata__": {"format": "pt"}} | {str(i): entry for i in range(MAX_TENSORS)}
    check_header(file_of(json.dumps(header).encode()), "w.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}},
        {"a": {}},
    ],
)
def test_headers_that_lie_about_the_payload_end_in_one_line(header):
    data = file_of(json.dumps(header).encode(), b"\0" * 4)
    with pytest.raises(RegistryError, match=r"^weights delta: cannot be read \(.*\)$"):
        delta_from_files("weights", {"weights.safetensors": data})


def test_mutated_headers_are_read_or_refused_quickly():
    whole = delta_to_files(weights(a=torch.ones(3, 2), b=torch.zeros(4)))["weights.safetensors"]
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    draw = random.Random(0)
    for _ in range(3000):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(header_end)] = draw.randrange(256)
        start = time.process_time()
        with suppress(RegistryError):
            delta_from_files("weights", {"weights.safetensors": bytes(changed)})
        assert time.process_time() - start < 1


def test_an_unchanged_file_gives_its_bytes_only_when_wanted(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    assert checked_file(path, FileDigest.of(b"abc")) == b"abc"
    assert checked_file(path, FileDigest.of(b"abc"), keep=False) == b""


@pytest.mark.parametrize("found", [b"", b"ab", b"abd", b"abcd", b"x" * 3_000_000])
def test_a_changed_file_is_named_with_both_digests(tmp_path, found):
    path = tmp_path / "f"
    path.write_bytes(found)
    expected = FileDigest.of(b"abc")
    with pytest.raises(RegistryError) as caught:
        checked_file(path, expected)
    assert str(caught.value) == (
        f"{path}: changed, expected {expected}, found {FileDigest.of(found)}; {RESTORE}"
    )


def test_a_hostile_size_allocates_nothing(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    assert read_file(path, 1 << 60) == (b"abc", FileDigest.of(b"abc"))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: path.symlink_to(__file__), "a symbolic link"),
        (lambda path: path.mkdir(), "not a regular file"),
        (os.mkfifo, "not a regular file"),
    ],
)
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path, make, found):
    path = tmp_path / "f"
    make(path)
    expected = FileDigest.of(b"abc")
    for wanted in (expected, None):
        with pytest.raises(RegistryError) as caught:
            checked_file(path, wanted)
        assert str(caught.value) == (
            f"{path}: expected {wanted or 'no such file'}, found {found}; {RESTORE}"
        )


def test_a_delta_whose_header_says_a_thing_twice_is_not_read():
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    data = file_of(b"{" + entry + b"," + entry + b"}", b"\0" * 4)
    with pytest.raises(RegistryError) as caught:
        delta_from_files("weights", {"weights.safetensors": data})
    assert str(caught.value) == (
        "weights.safetensors: unreadable header (key 'a' appears more than once)"
    )


def test_a_stray_file_is_named_with_its_digest(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    with pytest.raises(RegistryError) as caught:
        checked_file(path, None)
    assert str(caught.value) == (
        f"{path}: stray, expected no such file, found {FileDigest.of(b'abc')}; remove it"
    )
