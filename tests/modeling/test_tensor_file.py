"""A file that is written block by block is read by safetensors like any other."""

import pytest
import torch
from safetensors.torch import load_file

from peftkit.modeling.tensor_file import Entry, encoded, write_shard

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.double()


def test_every_dtype_and_shape_comes_back(tmp_path):
    tensors = {
        f"{dtype}-{shape}": torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        for dtype in DTYPES
        for shape in [(), (0,), (3,), (5, 7), (2, 3, 1)]
    }
    tensors["yes"] = torch.tensor([True, False, True])
    size = write_shard(tmp_path / "f", [Entry.of(name, t) for name, t in tensors.items()])
    found = load_file(tmp_path / "f")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(bits(found[name]), bits(tensors[name])) for name in tensors)
    assert all(found[name].dtype == tensors[name].dtype for name in tensors)
    assert size == sum(tensor.nbytes for tensor in tensors.values())


def test_one_buffer_can_carry_all_blocks(tmp_path):
    whole, buffer = torch.randn(7, 4), torch.empty(2, 4)

    def blocks():
        for start in range(0, 7, 2):
            part = whole[start : start + 2]
            yield buffer[: len(part)].copy_(part)

    write_shard(tmp_path / "f", [Entry("t", torch.float32, (7, 4), blocks)])
    assert torch.equal(load_file(tmp_path / "f")["t"], whole)


def test_a_tensor_of_another_size_than_promised_is_noticed(tmp_path):
    entry = Entry("t", torch.float32, (3, 4), lambda: [torch.zeros(2, 4)])
    with pytest.raises(AssertionError, match="t"):
        write_shard(tmp_path / "f", [entry])


def test_a_file_that_exists_is_not_overwritten(tmp_path):
    (tmp_path / "f").write_text("kept")
    with pytest.raises(FileExistsError):
        write_shard(tmp_path / "f", [])
    assert (tmp_path / "f").read_text() == "kept"


def test_in_one_piece_it_is_the_same_file(tmp_path):
    tensors = {"b": torch.randn(3, 4), "a": torch.randn(4, 3).T, "c": torch.arange(3)}
    write_shard(tmp_path / "f", [Entry.of(name, tensor) for name, tensor in tensors.items()])
    backwards = dict(reversed(tensors.items()))
    assert encoded(backwards, {"format": "pt"}) == (tmp_path / "f").read_bytes()
    assert torch.equal(load_file(tmp_path / "f")["a"], tensors["a"])
