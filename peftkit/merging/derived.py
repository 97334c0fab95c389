"""What is said of a delta that was made of others, in its manifest and on the screen.

Called by `combining` and `extraction`.
"""

from collections.abc import Sequence
from typing import Any

from peftkit.merging.sources import Source
from peftkit.merging.verification import described
from peftkit.registry.manifest import DeltaInfo, Parent, RunSummary
from peftkit.registry.store import StoredDelta

COMBINED = "combined"
"""Status of the run of a delta that no run made."""


def derived_info(
    head: Source, sources: Sequence[Source], *, kind: str, method: dict[str, Any]
) -> DeltaInfo:
    """Task, labels, recipe and run are those of `head`, but no run has scored the result.

    It is marked as trained on a sample if one of the sources was.
    """
    run = head.info.run
    parents = [
        Parent(reference=str(source), digest=source.stored.digest, weight=source.weight)
        for source in sources
    ]
    return DeltaInfo.model_validate(
        {
            **{key: value for key, value in head.info if key not in ("created", "verification")},
            "kind": kind,
            "method": method,
            "run": RunSummary(record=run.record, seed=run.seed, status=COMBINED, metrics={}),
            "parents": parents,
            "stand_in": any(source.info.stand_in for source in sources),
        }
    )


def derived_plain(stored: StoredDelta) -> dict[str, Any]:
    """What was saved, as JSON."""
    info = stored.info.model_dump(
        mode="json", include={"kind", "method", "parents", "verification"}
    )
    return {
        "name": stored.name,
        "version": stored.version,
        "digest": stored.digest,
        **info,
    }


def derived_pairs(stored: StoredDelta) -> list[tuple[str, str]]:
    """How the result was verified, as lines for a person."""
    drift, verification = stored.info.method["drift"], stored.info.verification
    assert verification is not None
    return [
        ("verified", f"{described(verification)} ({verification.bound})"),
        (
            "drift",
            f"{drift['relative_distance']:.1e} of the norm; max |Δlogit| "
            f"{drift['max_abs_difference']:.1e}, KL {drift['kl_divergence']:.1e}, "
            f"top-1 {drift['top1_agreement']:.1%}",
        ),
    ]
