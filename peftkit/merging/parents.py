"""Several deltas beside the one base that they stand on, a tensor at a time.

Called by whatever combines deltas; stands on `folding`. A task vector is what a delta makes of a
tensor, less what the base held there. Heads have no base to be measured from and are averaged.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftkit.errors import RegistryError
from peftkit.merging.folding import Fold, empty_model
from peftkit.merging.held_base import HeldBase
from peftkit.merging.sources import Source, Sources, head_of
from peftkit.modeling.parameters import head_modules


class Parents:
    """The sources folded into their base, by the names of the model that the result makes."""

    def __init__(self, folder: Path, sources: Sources) -> None:
        """Fit every source to the model that its run built on the base in `folder`.

        Raises:
            RegistryError: one does not fit or cannot be folded, or the heads have no average.
            SourceError: the base has no such architecture.
        """
        self.folder, self.sources = folder, sources
        self.folds = [_folded(folder, source) for source in sources.every]
        self.base = HeldBase(folder, sources.head.info)
        self.shell = empty_model(folder, sources.head.info, self.base.files)
        self._shapes = {name: p.shape for name, p in self.shell.named_parameters()}
        heads = {head_of(source.info): source for source in sources.every}
        self._foreign = frozenset().union(*map(self._heads_of, heads.values()))
        self.head_names = self._heads_of(sources.head)
        if sources.average_heads and self.head_names and not sum(sources.weights):
            raise RegistryError(
                "weights: their sum is 0, so that the heads have no average; name the delta whose "
                "head the result takes with head_from"
            )

    def body(self) -> list[str]:
        """Names of the tensors below the heads that a source changes, sorted."""
        return sorted((self._changed() & self._shapes.keys()) - self._foreign)

    def left_out(self) -> list[str]:
        """Names of changed tensors that the model of the chosen head does not have, sorted."""
        return sorted(self._changed() - self._shapes.keys() - self._foreign)

    def task_vectors(self, name: str) -> list[Tensor]:
        """Float32, one for each source; zeros where it leaves the tensor as it was."""
        zeros = torch.zeros(self._shapes[name])
        return [
            fold.tensor(name) - fold.base(name) if name in fold.changed else zeros
            for fold in self.folds
        ]

    def given_whole(self, name: str) -> bool:
        """Whether a source of kind `weights` holds the tensor, changed or not."""
        every = self.sources.every
        return any(s.delta.kind == "weights" and name in s.delta.tensors for s in every)

    def head(self) -> dict[str, Tensor]:
        """The result's head, float32: one source's, or the average by the weights."""
        pairs = list(zip(self.folds, self.sources.weights, strict=True))
        if not self.sources.average_heads:
            pairs = [(self.folds[self.sources.every.index(self.sources.head)], 1.0)]
        total = sum(weight for _, weight in pairs)
        found = {}
        for name in sorted(self.head_names):
            parts = [fold.tensor(name).double() * (weight / total) for fold, weight in pairs]
            found[name] = torch.stack(parts).sum(0).float()
        return found

    def weighted_sum(self) -> Iterator[tuple[str, Tensor]]:
        """Name → float32 value of every changed tensor in base + Σ weight · task vector.

        For TIES, which averages, the sum is divided by the number of sources.
        """
        for name in self.body():
            total = self.base(name).double()
            pairs = zip(self.task_vectors(name), self.sources.sum_weights, strict=True)
            for vector, weight in pairs:
                total += weight * vector.double()
            yield name, total.float()
        yield from self.head().items()

    def _changed(self) -> frozenset[str]:
        return frozenset().union(*(fold.changed for fold in self.folds))

    def _heads_of(self, source: Source) -> frozenset[str]:
        """Names of the parameters that a source's model has and the base has not."""
        return head_tensors(empty_model(self.folder, source.info, self.base.files))


def head_tensors(model: PreTrainedModel) -> frozenset[str]:
    """Names of the parameters of a model's heads."""
    heads: dict[str, nn.Module] = {name: model.get_submodule(name) for name in head_modules(model)}
    return frozenset(
        f"{name}.{p}" for name, head in heads.items() for p in dict(head.named_parameters())
    )


def _folded(folder: Path, source: Source) -> Fold:
    try:
        return Fold(folder, source.info, source.delta, HeldBase(folder, source.info))
    except RegistryError as error:
        raise RegistryError(f"{source}: {line}" for line in error.problems) from error
