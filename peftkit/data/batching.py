"""Which examples make up each optimizer step, and who computes which part of it.

Called by the training loop. An optimizer step's examples depend on the seed, the epoch and the
effective batch only; how many processes and micro-batches share them changes nothing.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

BUCKET_STEPS = 100
"""Optimizer steps whose examples are sorted by length together: enough for tight batches, few
enough for batches to stay random over the epoch."""


@dataclass(frozen=True)
class MicroBatch:
    """Examples for one forward and backward pass on one process.

    An empty share still runs a pass, on one example that does not count: every process must take
    part in the gradient exchange.
    """

    indices: list[int]
    counts: bool = True


def plan_epoch(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int
) -> list[list[int]]:
    """Optimizer steps of one epoch: every example once, in steps of examples of similar length.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples an optimizer step, over all processes and micro-batches.
        seed: The run's seed.
        epoch: Counted from 0; each has its own order.

    Returns:
        Indices for each step, shortest example first; the last step drawn may be smaller.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    steps: list[list[int]] = []
    for start in range(0, len(order), BUCKET_STEPS * batch_size):
        bucket = order[start : start + BUCKET_STEPS * batch_size]
        bucket.sort(key=lengths.__getitem__)
        steps += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    rng.shuffle(steps)
    return steps


def share_step(
    step: Sequence[int], per_device_batch_size: int, *, rank: int, processes: int
) -> list[MicroBatch]:
    """The micro-batches of one optimizer step that process `rank` computes.

    Neighbours in length go to different processes at the same time, so that none waits long.
    """
    size = per_device_batch_size
    chunks = [list(step[i : i + size]) for i in range(0, len(step), size)]
    rounds = -(-len(chunks) // processes)
    mine = chunks[rank::processes]
    idle = [MicroBatch([step[0]], counts=False)] * (rounds - len(mine))
    return [MicroBatch(chunk) for chunk in mine] + idle


def longest_step(steps: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """Position of the step with the most tokens after padding to its longest example."""
    return max(range(len(steps)), key=lambda i: len(steps[i]) * max(lengths[j] for j in steps[i]))


def evaluation_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Every example once, longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
