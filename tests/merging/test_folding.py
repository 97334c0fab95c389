"""What a delta makes of each tensor is the same however often it is asked for."""

import pytest
import stored_deltas
import torch

from peftkit.merging.folding import Fold
from peftkit.merging.held_base import HeldBase
from peftkit.registry import Registry

KINDS = ("full", "lora", "lora-own-biases", "lora-biases", "lora-tokens", "dora", "ia3")


@pytest.mark.parametrize("kind", KINDS)
def test_asking_twice_gives_the_same_and_leaves_the_model_empty(base_of, tmp_path, kind):
    folder, registry = base_of("bert"), Registry(tmp_path)
    stored = stored_deltas.store(registry, folder, kind, stored_deltas.SECTIONS[kind])
    delta = registry.read_delta(stored, base=folder)
    fold = Fold(folder, stored.info, delta, HeldBase(folder, stored.info))
    names = sorted(fold.changed)
    first = {name: fold.tensor(name).clone() for name in names}
    shapes = {name: p.shape for name, p in fold.model.named_parameters()}
    assert {name: tensor.shape for name, tensor in first.items()} == {n: shapes[n] for n in names}
    for name in reversed(names):
        assert torch.equal(fold.tensor(name), first[name])
        whole = torch.cat([block.clone() for block in fold.blocks(name)])
        assert torch.allclose(whole, first[name], rtol=0, atol=1e-6)
