"""Several stored deltas become one: read, combined, put to the test, saved, read back.

Called by the `merge` verb; the whole story is `combine`.
"""

from dataclasses import dataclass
from typing import Any

from peftkit.merging.checking import checked, save_and_read_back
from peftkit.merging.derived import derived_info, derived_pairs, derived_plain
from peftkit.merging.lora_combination import LoraCombination, combined_lora
from peftkit.merging.parents import Parents
from peftkit.merging.plan import CombinePlan, decomposes, prunes
from peftkit.merging.sources import Sources, read_sources
from peftkit.merging.task_vectors import Arithmetic, combined_weights
from peftkit.registry.base import base_of
from peftkit.registry.manifest import DeltaInfo
from peftkit.registry.store import Registry, StoredDelta


@dataclass(frozen=True)
class Combined:
    """What was saved; its info says how it was made and verified."""

    stored: StoredDelta
    left_out: list[str]
    """Tensors that a parent changed and the result's model does not have."""

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {**derived_plain(self.stored), "left_out": self.left_out}

    def pairs(self) -> list[tuple[str, str]]:
        """As lines for a person."""
        info = self.stored.info
        parts = [f"{parent.weight:g} · {parent.reference}" for parent in info.parents]
        lines = [
            ("saved", f"{self.stored} ({info.kind})"),
            ("combined", f"{info.method['combine']} of {', '.join(parts)}"),
            *derived_pairs(self.stored),
        ]
        if info.method["norm_held"] is not None:
            lines.append(("norm held", f"{info.method['norm_held']:.2%}"))
        if self.left_out:
            lines.append(("left out", f"{', '.join(self.left_out)}: not in the model of this head"))
        return lines


def combine(registry: Registry, plan: CombinePlan) -> Combined:
    """Combine the deltas of `plan`, verify the result and save it.

    Raises:
        RegistryError: deltas that cannot be combined, with a line for each problem; a result that
            answers differently from what it was made of.
        SourceError: the base cannot be found.
    """
    sources = read_sources(registry, plan)
    folder = base_of(sources.head.stored)
    parents = Parents(folder, sources)
    result = _combined(parents, _arithmetic(sources, plan))
    info = _info(sources, plan, result)
    info = checked(folder, info, result.delta, parents.weighted_sum(), exact=result.exact)
    stored = save_and_read_back(registry, plan.save_as, result.delta, info, folder)
    return Combined(stored, parents.left_out())


def _arithmetic(sources: Sources, plan: CombinePlan) -> Arithmetic:
    return Arithmetic(
        sources.combine, sources.weights, density=plan.density, rank=plan.rank, seed=plan.seed
    )


def _combined(parents: Parents, arithmetic: Arithmetic) -> LoraCombination:
    if parents.sources.on_factors:
        return combined_lora(parents, arithmetic)
    delta = combined_weights(parents, arithmetic)
    return LoraCombination(delta, None, exact=arithmetic.combine == "linear")


def _info(sources: Sources, plan: CombinePlan, result: LoraCombination) -> DeltaInfo:
    method = {
        "type": "merge",
        "combine": sources.combine,
        "weights": sources.weights,
        "density": plan.density if prunes(sources.combine) else None,
        "rank": plan.rank if decomposes(sources.combine) else None,
        "seed": plan.seed if "dare" in sources.combine else None,
        "head_from": plan.head_from,
        "norm_held": result.norm.share if result.norm else None,
    }
    return derived_info(sources.head, sources.every, kind=result.delta.kind, method=method)
