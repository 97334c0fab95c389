"""Reads many hostile safetensors files under a limit on memory; run by `test_hostile_files.py`.

Prints a JSON object: how many were read and refused, and whatever took too long, ended in another
error than the registry's, or was read though it says a thing twice. CPU seconds are measured, since
another process may have the core.
"""

import argparse
import json
import random
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from peftkit.contracts import Delta
from peftkit.errors import RegistryError
from peftkit.registry import tensors

SPARE_BYTES = 1 << 30
SLOW_SECONDS = 1.0
MIB = 1 << 20
ODD = ["0", "-1", "1e400", "NaN", "Infinity", "null", "true", "[]", "{}", '""', '"F32"', "[[1]]"]
ODD += [str(2**n) for n in (31, 32, 63, 64, 400)] + ["9" * 5000, '"\\ud800"', '"\\u0000"', "-0.5"]
BASE = {"w": torch.ones(8, 4), "head": torch.zeros(3)}


def file_of(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + payload


def wholes() -> list[tuple[str, bytes]]:
    """A good file of each form: plain weights, differences to a base, an adapter."""
    values = {"w": torch.ones(8, 4) + 1e-3, "head": torch.rand(3), "empty": torch.ones(0, 2)}
    plain = tensors.delta_to_files(Delta("weights", values))
    against = tensors.delta_to_files(Delta("weights", values), base=BASE.get)
    adapter = tensors.delta_to_files(Delta("adapter", values, {"peft_type": "LORA"}))
    name = tensors.TENSOR_FILES
    return [
        ("weights", plain[name["weights"]]),
        ("weights", against[name["weights"]]),
        ("adapter", adapter[name["adapter"]]),
    ]


def parted(whole: bytes) -> tuple[bytes, bytes]:
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    return whole[8:end], whole[end:]


def flipped(whole: bytes, draw: random.Random) -> bytes:
    """Some bytes of the header, its length included, made others."""
    changed = bytearray(whole)
    for _ in range(draw.randint(1, 4)):
        changed[draw.randrange(8 + len(parted(whole)[0]))] = draw.randrange(256)
    return bytes(changed)


def spliced(whole: bytes, draw: random.Random) -> bytes:
    """A part of the header repeated, dropped or put elsewhere; the length fits."""
    header, payload = parted(whole)
    a, b = sorted(draw.randrange(len(header)) for _ in range(2))
    place = draw.randrange(len(header))
    choices = [header[:b] + header[a:], header[:a] + header[b:]]
    choices.append(header[:place] + header[a:b] + header[place:])
    return file_of(draw.choice(choices), payload)


def odd(whole: bytes, draw: random.Random) -> bytes:
    """A value of the header made an odd one."""
    header, payload = parted(whole)
    text = header.decode()
    places = [i for i, character in enumerate(text) if character in ":[,"]
    start = draw.choice(places) + 1
    end = min((text.find(c, start) for c in ",]}" if text.find(c, start) > 0), default=start)
    return file_of(f"{text[:start]}{draw.choice(ODD)}{text[end:]}".encode(), payload)


def twice(whole: bytes, draw: random.Random) -> bytes:
    """A key that stands in the header twice."""
    header, payload = parted(whole)
    entries = json.loads(header)
    name = draw.choice(sorted(entries))
    entry = f"{json.dumps(name)}:{json.dumps(entries[name])},".encode()
    return file_of(b"{" + entry + header[1:], payload)


def bombs() -> Iterator[bytes]:
    """Headers that are small to send and large to read."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    for count in (20_000, 20_001, 60_000, 300_000):
        names = ",".join(f'"{i}":{entry}' for i in range(count))
        yield file_of(f"{{{names}}}".encode())
    for filler in ('"%d":{},', '"%d":0,', '"%d":[],', '"%d":"",'):
        many = "".join(filler % i for i in range(600_000))[: 4 * MIB - 10].rpartition(",")[0]
        yield file_of(f"{{{many}}}".encode())
    for opening in ("[", "{", '{"a":', '"', "\\", "-", "1", "[[],", "[0,", " ", "\t\n", "\0"):
        yield file_of((opening * (4 * MIB))[: 4 * MIB].encode())
    for content in ("1," * (2 * MIB - 100) + "1", "[]," * MIB + "0", "0.1," * MIB + "1"):
        yield file_of(f'{{"a":{{"dtype":"F32","shape":[{content}]}}}}'[: 4 * MIB].encode())
    for size in (4 * MIB, 4 * MIB + 1, 2**32, 2**63, 2**64 - 1):
        yield struct.pack("<Q", size) + b'{"a":'
    text = json.dumps("x" * (4 * MIB - 100))
    yield file_of(f'{{"__metadata__":{{"format":{text}}}}}'.encode())
    yield file_of(f'{{"__metadata__":{{"peftkit.bit-delta":{text}}}}}'.encode())
    for inner in ("[" * MIB, '{"a":' * (MIB // 4), "{" + '"a":1,' * (MIB // 4) + '"b":1}'):
        content = json.dumps(inner)[: 4 * MIB - 200]
        yield file_of(f'{{"__metadata__":{{"peftkit.bit-delta":{content}}}}}'.encode())


def hostile(count: int) -> Iterator[tuple[str, str, bytes]]:
    """Name, kind and bytes of each file, the same each time."""
    draw = random.Random(0)
    makers: list[Callable[[bytes, random.Random], bytes]] = [flipped, spliced, odd, twice]
    whole = wholes()
    for number in range(count):
        kind, data = whole[number % len(whole)]
        maker = makers[number % len(makers)]
        yield maker.__name__, kind, maker(data, draw)
    for number, data in enumerate(bombs()):
        for kind in tensors.TENSOR_FILES:
            yield f"bomb {number}", kind, data


def read(kind: str, data: bytes) -> bool:
    """Whether a file is read; it goes the ways of import and of loading."""
    files = {tensors.TENSOR_FILES[kind]: data, tensors.ADAPTER_CONFIG: b"{}"}
    try:
        tensors.check_files(kind, files)
        tensors.delta_from_files(kind, files, base=BASE.get)
    except RegistryError:
        return False
    return True


def main(count: int) -> dict[str, object]:
    found: dict[str, object] = {"read": 0, "refused": 0}
    bad: list[str] = []
    for name, kind, data in hostile(count):
        start = time.process_time()
        try:
            was_read = read(kind, data)
        except BaseException as error:  # a panic of the reader is no Exception
            bad.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        found["read" if was_read else "refused"] += 1
        if (seconds := time.process_time() - start) > SLOW_SECONDS:
            bad.append(f"{name}: {seconds:.1f} s")
        if was_read and name == "twice":
            bad.append(f"{name}: was read")
    return found | {"bad": bad}


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("--without", choices=["bounds", "duplicates"])
    options = parser.parse_args()
    for kind_, data_ in wholes():  # what is imported on the way counts as needed
        assert read(kind_, data_)
    limit_memory()
    if options.without == "bounds":
        tensors.MAX_TENSORS = tensors.MAX_HEADER_BYTES = 1 << 50
    if options.without == "duplicates":
        tensors._without_duplicates = dict
    print(json.dumps(main(options.count)))
