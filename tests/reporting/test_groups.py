"""Letters: two arms share one exactly if they are not told apart."""

from itertools import combinations

import numpy as np
import pytest

from peftkit.reporting.groups import letters


def test_arms_that_are_not_told_apart_share_a_letter():
    assert letters([0, 1, 2], []) == {0: "a", 1: "a", 2: "a"}
    assert letters([2, 0, 1], [(2, 1)]) == {2: "a", 0: "ab", 1: "b"}
    assert letters([0, 1, 2], [(0, 1), (0, 2), (1, 2)]) == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("seed", range(20))
def test_letters_say_what_the_tests_say(seed):
    rng = np.random.default_rng(seed)
    pairs = list(combinations(range(9), 2))
    apart = {pair for pair in pairs if rng.random() < 0.4}
    marks = letters(list(range(9)), apart)
    for a, b in pairs:
        assert bool(set(marks[a]) & set(marks[b])) == ((a, b) not in apart)
