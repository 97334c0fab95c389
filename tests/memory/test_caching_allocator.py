"""Blocks of CUDA's caching allocator, by the rules of its source."""

import random

import pytest

from peftkit.memory.caching_allocator import MIB, CachingAllocator


def handed_out(*sizes):
    """Bytes of the block of each tensor, all of them alive."""
    allocator, found = CachingAllocator(), []
    for key, size in enumerate(sizes):
        before = allocator.allocated_bytes
        allocator.allocate(key, size)
        found.append(allocator.allocated_bytes - before)
    return found, allocator.reserved_bytes


@pytest.mark.parametrize(
    ("sizes", "blocks", "reserved"),
    [
        ([1], [512], 2 * MIB),
        ([0], [512], 2 * MIB),
        ([513], [1024], 2 * MIB),
        ([MIB], [MIB], 2 * MIB),
        ([MIB] * 3, [MIB] * 3, 4 * MIB),
        # Small ones have a pool of their own.
        ([MIB, MIB + 1], [MIB, MIB + 512], 22 * MIB),
        # What is left of a segment is a block of its own if it is more than 1 MiB.
        ([9 * MIB, 10 * MIB], [9 * MIB, 11 * MIB], 20 * MIB),
        ([9 * MIB, 9 * MIB], [9 * MIB, 9 * MIB], 20 * MIB),
        ([9 * MIB, 9.5 * MIB], [9 * MIB, 9.5 * MIB], 20 * MIB),
        # From 10 MiB on each has a segment to itself, a multiple of 2 MiB.
        ([10 * MIB], [10 * MIB], 10 * MIB),
        ([10 * MIB + 1], [10 * MIB + 512], 12 * MIB),
        ([11.5 * MIB], [12 * MIB], 12 * MIB),
    ],
)
def test_a_tensor_holds_a_whole_block(sizes, blocks, reserved):
    assert handed_out(*map(int, sizes)) == ([int(size) for size in blocks], reserved)


def test_a_free_block_is_used_again_the_smallest_that_will_do():
    allocator = CachingAllocator()
    for key, size in enumerate((12, 14, 16)):
        allocator.allocate(key, size * MIB)
    for key in (0, 1, 2):
        allocator.free(key)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 42 * MIB)
    allocator.allocate(3, 13 * MIB)
    # 1 MiB is left of the 14, which is not split off.
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (14 * MIB, 42 * MIB)


def test_free_neighbours_become_one_block():
    allocator = CachingAllocator()
    for key in range(4):
        allocator.allocate(key, 5 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    for key in (0, 2, 1):
        allocator.free(key)
    allocator.allocate(4, 9 * MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (14 * MIB, 20 * MIB)


def test_nothing_is_lost_over_thousands_of_tensors():
    draw, allocator, alive = random.Random(0), CachingAllocator(), {}
    for key in range(5000):
        alive[key] = draw.choice((draw.randint(1, MIB), draw.randint(1, 30 * MIB)))
        allocator.allocate(key, alive[key])
        if draw.random() < 0.5 or len(alive) > 40:
            gone = draw.choice(list(alive))
            allocator.free(gone)
            del alive[gone]
        wanted = sum(alive.values())
        assert wanted <= allocator.allocated_bytes <= allocator.reserved_bytes
        assert allocator.allocated_bytes <= wanted + len(alive) * (MIB + 512)
    for key in alive:
        allocator.free(key)
    assert allocator.allocated_bytes == 0
    held = [block for blocks in allocator._free.values() for block in blocks]
    assert sum(block.size for block in held) == allocator.reserved_bytes
    assert all(block.before is None and block.after is None for block in held)
