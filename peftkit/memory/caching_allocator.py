"""What CUDA's caching allocator counts for tensors that come and go: whole blocks, not their bytes.

Called by the tape of the planner where a GPU is meant; imports nothing. A block is cut from a
segment of the device's memory or from a free block, the smallest that will do, and what is left
over becomes a free block only if it is worth it. So each tensor of more than 1 MiB may hold up to
1 MiB more: nothing beside gigabytes, and 3 to 6 % of a small model.

Source: torch, c10/cuda/CUDACachingAllocator.cpp (`malloc`, `should_split`, `free_block`), as it is
without settings of PYTORCH_CUDA_ALLOC_CONF and in one stream.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

MIB = 2**20
SMALLEST_BLOCK_BYTES = 512
LARGEST_SMALL_BYTES = MIB
"""Blocks up to here are cut from segments of their own."""
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
SHARED_SEGMENT_BELOW_BYTES = 10 * MIB
"""From here on a block has a segment to itself, a multiple of 2 MiB."""


@dataclass(eq=False)
class _Block:
    """A piece of a segment, between its neighbours."""

    size: int
    is_small: bool
    number: int
    before: "_Block | None" = None
    after: "_Block | None" = None
    is_free: bool = True

    def take_in_next(self) -> None:
        """Become one with the block after it."""
        assert self.after is not None
        self.size += self.after.size
        self.after = self.after.after
        if self.after:
            self.after.before = self

    def __lt__(self, other: "_Block") -> bool:
        return (self.size, self.number) < (other.size, other.number)


@dataclass
class CachingAllocator:
    """Bytes in blocks that are handed out, and in all segments; a key stands for a tensor."""

    allocated_bytes: int = 0
    reserved_bytes: int = 0
    _blocks: dict[int, _Block] = field(default_factory=dict)
    _free: dict[bool, list[_Block]] = field(default_factory=lambda: {True: [], False: []})
    _made: int = 0

    def allocate(self, key: int, size: int) -> None:
        """Hand out a block of at least `size` bytes."""
        size = -(-max(size, 1) // SMALLEST_BLOCK_BYTES) * SMALLEST_BLOCK_BYTES
        is_small = size <= LARGEST_SMALL_BYTES
        block = self._smallest_free(size, is_small) or self._segment(size, is_small)
        left = block.size - size
        if left >= SMALLEST_BLOCK_BYTES if is_small else left > LARGEST_SMALL_BYTES:
            rest = self._new(left, is_small, block, block.after)
            if block.after:
                block.after.before = rest
            block.after, block.size = rest, size
            insort(self._free[is_small], rest)
        block.is_free = False
        self._blocks[key] = block
        self.allocated_bytes += block.size

    def free(self, key: int) -> None:
        """Take the block back, and join it to free neighbours."""
        block = self._blocks.pop(key)
        self.allocated_bytes -= block.size
        block.is_free = True
        free = self._free[block.is_small]
        if block.before and block.before.is_free:
            block = block.before
            free.remove(block)
            block.take_in_next()
        if block.after and block.after.is_free:
            free.remove(block.after)
            block.take_in_next()
        insort(free, block)

    def _smallest_free(self, size: int, is_small: bool) -> _Block | None:
        free = self._free[is_small]
        place = bisect_left(free, _Block(size, is_small, -1))
        return free.pop(place) if place < len(free) else None

    def _segment(self, size: int, is_small: bool) -> _Block:
        own = -(-size // SMALL_SEGMENT_BYTES) * SMALL_SEGMENT_BYTES
        shared = LARGE_SEGMENT_BYTES if size < SHARED_SEGMENT_BELOW_BYTES else own
        segment = SMALL_SEGMENT_BYTES if is_small else shared
        self.reserved_bytes += segment
        return self._new(segment, is_small)

    def _new(
        self, size: int, is_small: bool, before: _Block | None = None, after: _Block | None = None
    ) -> _Block:
        self._made += 1
        return _Block(size, is_small, self._made, before, after)
