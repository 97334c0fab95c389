"""Adding, electing and dropping changes of weights: task arithmetic, TIES, DARE, magnitude pruning.

Called by `combining` for deltas of any kind, and by `lora_combination` for what is saved whole
beside the factors. The arithmetic is PEFT's, tensor by tensor.
Source: arXiv:2212.04089 (task arithmetic), arXiv:2306.01708 (TIES), arXiv:2311.03099 (DARE).
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkit.contracts import Delta
from peftkit.merging.parents import Parents
from peftkit.merging.plan import prunes


@dataclass(frozen=True)
class Arithmetic:
    """How values are combined."""

    combine: str
    """A word of `plan.ON_FACTORS`."""
    weights: Sequence[float]
    density: float | None = None
    rank: int | None = None
    seed: int = 0

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw from the seed, leave torch's generator as it was, and keep PEFT's advice quiet."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # A density of 1 keeps everything, as was asked for.
            warnings.filterwarnings("ignore", "The density 1", UserWarning)
            torch.manual_seed(self.seed)
            yield

    def __call__(self, vectors: list[Tensor]) -> Tensor:
        """One task vector from several of a shape, by what `combine` says of whole tensors."""
        from peft.utils import merge_utils

        word = self.combine.removesuffix("_svd")
        weights = torch.tensor(self.weights)
        if not prunes(word):
            return merge_utils.task_arithmetic(vectors, weights)
        merged: Tensor = getattr(merge_utils, word)(vectors, weights, self.density)
        return merged


def combined_weights(parents: Parents, arithmetic: Arithmetic) -> Delta:
    """A delta of kind `weights`: base + combined task vectors, and the head."""
    tensors = {}
    with arithmetic.drawing():
        for name in parents.body():
            vectors = parents.task_vectors(name)
            if parents.given_whole(name) or any(vector.any() for vector in vectors):
                tensors[name] = parents.base(name) + arithmetic(vectors)
    return Delta("weights", {**tensors, **parents.head()})
