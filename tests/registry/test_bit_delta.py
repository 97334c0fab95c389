"""Tensors kept as differences to a base come back to the bit, or not at all."""

import json
import tracemalloc

import pytest
import torch

from peftkit.contracts import Delta
from peftkit.errors import RegistryError
from peftkit.registry import bit_delta
from peftkit.registry.tensors import (
    BIT_DELTA,
    check_files,
    delta_from_files,
    delta_to_files,
    needs_base,
)

DTYPES = ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "int64", "int8", "bool"]
FILE = "weights.safetensors"


def bits(tensor):
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def pair(dtype, shape=(33, 17), step=1e-4):
    """A base tensor and the same after a small step, in any dtype."""
    torch.manual_seed(0)
    base = torch.randn(shape)
    moved = base + step * torch.randn(shape)
    kind = getattr(torch, dtype)
    if kind == torch.bool:
        return base > 0, moved > 0
    scale = 1 if kind.is_floating_point else 50
    return (base * scale).to(kind), (moved * scale).to(kind)


def round_trip(tensors, base):
    streams, metadata = bit_delta.encode(tensors, base.get)
    return bit_delta.decode(streams, metadata, base.get)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shape", [(33, 17), (5,), (), (0, 4)])
def test_every_dtype_and_shape_comes_back_to_the_bit(dtype, known, shape):
    base, tensor = pair(dtype, shape)
    back = round_trip({"w": tensor}, {"w": base} if known else {})["w"]
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert bits(back) == bits(tensor)


def test_special_values_and_views_come_back_to_the_bit():
    odd = torch.tensor([0x7FC00001, 0x7F800001, -(2**31), 0, 1, -1], dtype=torch.int32)
    tensors = {
        "nan payloads": odd.view(torch.float32),
        "transposed": torch.arange(12.0).reshape(3, 4).T,
        "expanded": torch.ones(1, 5).expand(4, 5),
    }
    base = {name: torch.zeros_like(t) for name, t in tensors.items()}
    back = round_trip(tensors, base)
    assert all(bits(back[name]) == bits(tensor) for name, tensor in tensors.items())


def test_a_base_of_another_dtype_is_cast_and_one_of_another_shape_is_none():
    tensors = {"cast": torch.randn(8, 8).bfloat16(), "shape": torch.randn(4)}
    base = {"cast": tensors["cast"].float(), "shape": torch.randn(5)}
    streams, metadata = bit_delta.encode(tensors, base.get)
    entries = json.loads(metadata[BIT_DELTA])["tensors"]
    assert [entries[n]["against_base"] for n in ("cast", "shape")] == [True, False]
    assert streams["cast"].numel() < 64  # the difference is nothing
    back = bit_delta.decode(streams, metadata, base.get)
    assert all(bits(back[name]) == bits(tensor) for name, tensor in tensors.items())


def test_a_small_step_takes_less_room_and_noise_takes_no_more():
    base, moved = pair("bfloat16", (400, 400), step=1e-3)
    small = bit_delta.encode({"w": moved}, {"w": base}.get)[0]["w"].numel()
    assert small < 0.7 * 2 * base.numel()
    noise = torch.randint(-(2**62), 2**62, (1000,))
    assert bit_delta.encode({"w": noise}, {}.get)[0]["w"].numel() <= 8 * 1000


def test_the_same_delta_gives_the_same_bytes():
    base, moved = pair("float32")
    delta = Delta("weights", {"b": moved, "a": moved * 2})
    swapped = Delta("weights", {"a": moved * 2, "b": moved})
    files = [delta_to_files(d, base={"a": base}.get) for d in (delta, swapped)]
    assert files[0] == files[1]


@pytest.fixture
def stored():
    base, moved = pair("float32", (9, 5))
    known = {"w": base}
    delta = Delta("weights", {"w": moved, "head": torch.randn(3)})
    return delta_to_files(delta, base=known.get), known, delta


def test_files_say_that_they_need_their_base(stored):
    files, known, delta = stored
    assert needs_base("weights", files)
    assert not needs_base("weights", delta_to_files(delta))
    check_files("weights", files)
    back = delta_from_files("weights", files, base=known.get)
    assert all(bits(back.tensors[n]) == bits(t) for n, t in delta.tensors.items())
    with pytest.raises(RegistryError, match="needs its base"):
        delta_from_files("weights", files)


def test_another_base_is_refused_by_name_with_both_digests(stored):
    files, known, _ = stored
    other = {"w": known["w"].clone()}
    other["w"][0, 0] += 1
    with pytest.raises(RegistryError) as caught:
        delta_from_files("weights", files, base=other.get)
    assert len(caught.value.problems) == 1
    assert "tensor 'w': expected sha256:" in str(caught.value)
    assert "restored sha256:" in str(caught.value)
    with pytest.raises(RegistryError, match=r"tensor 'w': the base has no such tensor"):
        delta_from_files("weights", files, base={}.get)


def test_every_changed_byte_is_refused_or_changes_nothing(stored):
    files, known, delta = stored
    whole = files[FILE]
    refused = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        try:
            back = delta_from_files("weights", {FILE: bytes(changed)}, base=known.get)
        except RegistryError:
            refused += 1
        else:  # the padding of the header, or a word of the metadata that nobody reads
            assert {n: bits(t) for n, t in back.tensors.items()} == {
                n: bits(t) for n, t in delta.tensors.items()
            }
    assert refused > 0.9 * len(whole)


def test_without_the_digest_a_changed_base_would_pass(stored, monkeypatch):
    """The planted fault: what the digest is there for."""
    files, known, delta = stored

    class Blind:
        def hexdigest(self):
            return "0" * 64

    monkeypatch.setattr(bit_delta.hashlib, "sha256", lambda data: Blind())
    files = delta_to_files(delta, base=known.get)
    back = delta_from_files("weights", files, base=lambda n: known[n] + 1 if n == "w" else None)
    assert bits(back.tensors["w"]) != bits(delta.tensors["w"])


def hostile(**changes):
    entry = {
        "dtype": "float32",
        "shape": [4],
        "against_base": False,
        "planes": [["raw", 4]] * 4,
        "sha256": "0" * 64,
    }
    return {BIT_DELTA: json.dumps({"version": "1", "tensors": {"w": entry | changes}})}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "Tensor"}, "unknown dtype"),
        ({"dtype": "complex128"}, "unknown dtype"),
        ({"shape": [2**60]}, "has shape"),
        ({"shape": [2**30, 2**30]}, "has shape"),
        ({"shape": [-1]}, "has shape"),
        ({"shape": [2**40], "planes": [["zstd", 4]] * 4}, "would grow"),
        ({"planes": [["raw", 4]] * 3}, "3 planes, expected 4"),
        ({"planes": [["raw", -4], ["raw", 12], ["raw", 4], ["raw", 4]]}, "says 16 bytes|stored"),
        ({"planes": [["raw", 2**62]] * 4}, "are stored"),
        ({"planes": [["pickle", 4]] * 4}, "unreadable description"),
        ({"sha256": "x"}, "unreadable description"),
        ({"shape": [5]}, "another length than its 5 elements"),
    ],
)
def test_a_hostile_description_is_refused_before_memory_is_taken(changes, said):
    tracemalloc.start()
    with pytest.raises(RegistryError, match=said):
        bit_delta.decode({"w": torch.zeros(16, dtype=torch.uint8)}, hostile(**changes), {}.get)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_plane_that_would_burst_is_refused_by_its_frame():
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    stream = torch.frombuffer(bytearray(bomb + bytes(12)), dtype=torch.uint8)
    planes = [["zstd", len(bomb)], *[["raw", 4]] * 3]
    tracemalloc.start()
    with pytest.raises(RegistryError, match="a plane of 67108864 bytes, expected 4"):
        bit_delta.decode({"w": stream}, hostile(planes=planes), {}.get)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_newer_form_says_so():
    content = {BIT_DELTA: json.dumps({"version": "2", "tensors": {}})}
    with pytest.raises(RegistryError, match="upgrade peftkit"):
        bit_delta.decode({}, content, {}.get)
