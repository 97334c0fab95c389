"""Several stored deltas become one: read, combined, put to the test, saved, read back.

Called by the `merge` verb; the whole story is `combine`.
"""

from dataclasses import dataclass
from typing import Any

from peftkit.merging.checking import Drift, checked, save_and_read_back
from peftkit.merging.lora_combination import LoraCombination, combined_lora
from peftkit.merging.parents import Parents
from peftkit.merging.plan import CombinePlan, decomposes, prunes
from peftkit.merging.sources import Source, Sources, read_sources
from peftkit.merging.task_vectors import Arithmetic, combined_weights
from peftkit.merging.verification import described
from peftkit.registry.base import base_of
from peftkit.registry.manifest import DeltaInfo, Parent, RunSummary, Verification
from peftkit.registry.store import Registry, StoredDelta

COMBINED = "combined"
"""Status of the run of a delta that no run made."""


@dataclass(frozen=True)
class Combined:
    """What was saved, and what is to be said of it."""

    stored: StoredDelta
    verification: Verification
    drift: Drift
    left_out: list[str]
    """Tensors that a parent changed and the result's model does not have."""

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        info = self.stored.info
        return {
            "name": self.stored.name,
            "version": self.stored.version,
            "digest": self.stored.digest,
            "kind": info.kind,
            "method": info.method,
            "parents": [parent.model_dump() for parent in info.parents],
            "verification": self.verification.model_dump(),
            "drift": self.drift.plain(),
            "left_out": self.left_out,
        }

    def pairs(self) -> list[tuple[str, str]]:
        """As lines for a person."""
        method = self.stored.info.method
        parts = [f"{p.weight:g} · {p.reference}" for p in self.stored.info.parents]
        lines = [
            ("saved", f"{self.stored} ({self.stored.info.kind})"),
            ("combined", f"{method['combine']} of {', '.join(parts)}"),
            ("verified", f"{described(self.verification)} ({self.verification.bound})"),
            ("drift", self._drift()),
        ]
        if method["norm_held"] is not None:
            lines.append(("norm held", f"{method['norm_held']:.2%}"))
        if self.left_out:
            lines.append(("left out", f"{', '.join(self.left_out)}: not in the model of this head"))
        return lines

    def _drift(self) -> str:
        drift = self.drift
        return (
            f"{drift.relative_distance:.1e} of the weighted sum's norm; max |Δlogit| "
            f"{drift.max_abs_difference:.1e}, KL {drift.kl_divergence:.1e}, "
            f"top-1 {drift.top1_agreement:.1%}"
        )


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
    expected = Parents(folder, sources).weighted_sum()  # a fold is read once
    verification, drift = checked(folder, info, result.delta, expected, exact=result.exact)
    method = {**info.method, "drift": drift.plain()}
    info = info.model_copy(update={"verification": verification, "method": method})
    stored = save_and_read_back(registry, plan.save_as, result.delta, info, folder)
    return Combined(stored, verification, drift, parents.left_out())


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


def derived_info(
    head: Source, sources: list[Source], *, kind: str, method: dict[str, Any]
) -> DeltaInfo:
    """What is said of a delta that was made of others: task, labels, recipe and run are `head`'s.

    It has no scores, as no run measured any.
    """
    run = head.info.run
    fields = {k: v for k, v in head.info if k not in ("created", "verification")}
    parents = [
        Parent(reference=str(source), digest=source.stored.digest, weight=source.weight)
        for source in sources
    ]
    return DeltaInfo.model_validate(
        {
            **fields,
            "kind": kind,
            "method": method,
            "run": RunSummary(record=run.record, seed=run.seed, status=COMBINED, metrics={}),
            "parents": parents,
            "stand_in": any(source.info.stand_in for source in sources),
        }
    )
