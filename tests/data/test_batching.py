import random
from itertools import pairwise, product

import pytest

from peftkit.data.batching import (
    BUCKET_STEPS,
    evaluation_batches,
    longest_step,
    plan_epoch,
    share_step,
)

EXAMPLES = (1, 2, 7, 15, 16, 17, 97, 1000)
BATCHES = (1, 3, 8, 32)
# Most examples are short and few are long, as in text.
SKEWED = [int(random.Random(i).lognormvariate(3.0, 0.8)) + 3 for i in range(20_000)]


def drawn_lengths(count, seed=0):
    rng = random.Random(seed)
    return [rng.randint(3, 128) for _ in range(count)]


def padded_share(steps, lengths):
    """Padding as a share of all tokens computed."""
    computed = sum(len(step) * max(lengths[i] for i in step) for step in steps)
    return 1 - sum(lengths) / computed


@pytest.mark.parametrize("count", EXAMPLES)
@pytest.mark.parametrize("batch", BATCHES)
def test_an_epoch_has_every_example_once_and_only_one_step_is_smaller(count, batch):
    steps = plan_epoch(drawn_lengths(count), batch, seed=1, epoch=0)
    assert sorted(i for step in steps for i in step) == list(range(count))
    sizes = sorted(len(step) for step in steps)
    assert set(sizes[1:]) <= {batch}
    assert len(steps) == -(-count // batch)


@pytest.mark.parametrize(("count", "batch"), list(product(EXAMPLES, BATCHES)))
def test_micro_batches_of_all_ranks_are_the_step_however_it_is_shared(count, batch):
    steps = plan_epoch(drawn_lengths(count), batch, seed=2, epoch=3)
    for step, size, processes in product(steps, (1, 2, 5, 32), (1, 2, 3, 8)):
        ranks = [share_step(step, size, rank=r, processes=processes) for r in range(processes)]
        counted = [i for rank in ranks for micro in rank if micro.counts for i in micro.indices]
        assert sorted(counted) == sorted(step)
        assert len({len(rank) for rank in ranks}) == 1
        for micro in (micro for rank in ranks for micro in rank):
            assert 1 <= len(micro.indices) <= (size if micro.counts else 1)
            assert set(micro.indices) <= set(step)


def test_a_process_without_a_share_still_runs_a_pass_that_does_not_count():
    last = share_step([5, 4, 9], 2, rank=1, processes=2)
    assert [(m.indices, m.counts) for m in last] == [([9], True)]
    idle = share_step([5, 4], 2, rank=1, processes=2)
    assert [(m.indices, m.counts) for m in idle] == [([5], False)]


def test_neighbours_in_length_are_computed_at_the_same_time():
    lengths = drawn_lengths(64)
    step = plan_epoch(lengths, 64, seed=0, epoch=0)[0]
    first, second = (share_step(step, 4, rank=r, processes=2) for r in (0, 1))
    for ours, theirs in zip(first, second, strict=True):
        assert max(lengths[i] for i in ours.indices) <= min(lengths[i] for i in theirs.indices)
    assert [i for pair in zip(first, second, strict=True) for m in pair for i in m.indices] == step


def test_the_order_depends_on_seed_and_epoch_only():
    lengths = drawn_lengths(500)
    plans = {
        (seed, epoch): plan_epoch(lengths, 8, seed=seed, epoch=epoch)
        for seed, epoch in product((0, 1, 11), (0, 1, 2))
    }
    for (seed, epoch), plan in plans.items():
        random.seed(99)  # the global generator has no part in it
        assert plan_epoch(list(lengths), 8, seed=seed, epoch=epoch) == plan
    assert len({str(plan) for plan in plans.values()}) == len(plans)
    assert plans[1, 1] != plan_epoch(lengths, 8, seed=11, epoch=0)


def test_the_plan_is_the_same_in_every_version():
    lengths = [5, 3, 9, 7, 4, 8, 6]
    assert plan_epoch(lengths, 3, seed=0, epoch=0) == [[6, 3, 5], [1, 4, 0], [2]]


def test_padding_is_under_a_tenth_where_random_batches_are_half_padding():
    steps = plan_epoch(SKEWED, 32, seed=0, epoch=0)
    order = random.Random(0).sample(range(len(SKEWED)), len(SKEWED))
    unsorted = [order[i : i + 32] for i in range(0, len(order), 32)]
    assert padded_share(unsorted, SKEWED) > 0.5
    assert padded_share(steps, SKEWED) < 0.10


def test_long_and_short_batches_alternate_within_the_epoch():
    steps = plan_epoch(SKEWED, 32, seed=0, epoch=0)
    longest = [max(SKEWED[i] for i in step) for step in steps]
    assert len(steps) > 2 * BUCKET_STEPS
    rising = sum(a < b for a, b in pairwise(longest)) / len(longest)
    assert 0.4 < rising < 0.6
    halves = [sum(h) / len(h) for h in (longest[: len(steps) // 2], longest[len(steps) // 2 :])]
    assert 0.8 < halves[0] / halves[1] < 1.25


def test_a_step_does_not_hold_the_same_examples_every_epoch():
    lengths = [10] * 400
    epochs = [plan_epoch(lengths, 8, seed=0, epoch=e) for e in (0, 1)]
    same = {frozenset(s) for s in epochs[0]} & {frozenset(s) for s in epochs[1]}
    assert not same


def test_the_longest_step_is_the_one_that_needs_the_most_memory():
    lengths = [2, 2, 2, 2, 10, 3, 3]
    assert longest_step([[0, 1, 2, 3], [4], [5, 6]], lengths) == 1
    assert longest_step([[0, 1], [4], [5, 6, 0, 1]], lengths) == 2
    assert longest_step([[0, 1]], lengths) == 0


@pytest.mark.parametrize("batch", [1, 4, 7, 32])
def test_evaluation_has_every_example_once_longest_first(batch):
    for count in (0, *EXAMPLES):
        lengths = drawn_lengths(count, seed=count)
        batches = evaluation_batches(lengths, batch)
        order = [i for one in batches for i in one]
        assert sorted(order) == list(range(count))
        assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
        assert all(1 <= len(one) <= batch for one in batches)
