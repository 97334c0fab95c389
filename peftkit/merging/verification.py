"""Whether what was written answers like what it was made of.

Called after every merge. Both sides compute in float32, so that what is compared is the weights and
not the rounding of a forward.

Legend: C classes or vocabulary, T tokens, N rows of logits.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from peftkit.contracts import Delta
from peftkit.data.sample import sample_sentences
from peftkit.errors import RegistryError
from peftkit.modeling.loading import load_model
from peftkit.registry.fitting import load_options, model_spec, put_on
from peftkit.registry.manifest import DeltaInfo, Verification

PROBE_SENTENCES = 8
MAX_PROBE_TOKENS = 48


@dataclass(frozen=True)
class Bound:
    """How far two models may be apart; None leaves a figure free."""

    max_abs_difference: float | None = None
    """Times the largest logit where that is above 1: float32 has seven digits."""
    kl_divergence: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.max_abs_difference is not None:
            parts.append(f"max |Δlogit| ≤ {self.max_abs_difference:g}, top-1 equal")
        if self.kl_divergence is not None:
            parts.append(f"KL ≤ {self.kl_divergence:g}")
        return ", ".join(parts) or "any finite difference"


FREE = Bound()
"""For another model than the trained one, of which only the drift is told."""
SAME_ARITHMETIC = Bound(max_abs_difference=1e-5)
"""For results in float32."""
ROUNDED_TO_16_BITS = Bound(kl_divergence=1e-4)
SAME_4_BITS = Bound(kl_divergence=1e-5)
"""For a delta folded into the dequantised base, in float32."""


def trained_model(folder: Path, info: DeltaInfo, delta: Delta) -> nn.Module:
    """The delta on its base as the run held it, computing in float32 and in eval mode."""
    model = load_model(folder, model_spec(info), load_options(info))
    return computing_in_float32(put_on(model, delta))


def computing_in_float32(model: nn.Module) -> nn.Module:
    """The model in eval mode, every weight that is not in 4 bits widened, in place."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    # transformers' own `float` refuses a 4-bit model.
    return nn.Module.float(model).eval()


def probe(folder: Path) -> list[dict[str, Tensor]]:
    """Inputs of one row each: sentences, and the same with tokens drawn from the vocabulary.

    A vocabulary that knows no word of English is still reached.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    draw = random.Random(0)
    special = set(tokenizer.all_special_ids)
    words = [i for i in range(len(tokenizer)) if i not in special]
    found = []
    for sentence in sample_sentences(PROBE_SENTENCES):
        encoded = tokenizer(sentence, truncation=True, max_length=MAX_PROBE_TOKENS)
        ids = list(encoded["input_ids"])
        drawn = [i if i in special else draw.choice(words) for i in ids]
        found += [{**encoded, "input_ids": one} for one in (ids, drawn)]
    return [{key: torch.tensor([value]) for key, value in row.items()} for row in found]


def answers(model: nn.Module, rows: list[dict[str, Tensor]]) -> list[Tensor]:
    """Float32 logits (N, C) of each row: N is 1, 2 for starts and ends, or T for every token."""
    found = []
    with torch.no_grad():
        for row in rows:
            outputs: Any = model(**row)
            if "start_logits" in outputs:
                logits = torch.stack([outputs.start_logits[0], outputs.end_logits[0]])
            else:
                logits = outputs.logits.reshape(-1, outputs.logits.shape[-1])
            found.append(logits.float())
    return found


def compared(expected: list[Tensor], found: list[Tensor], bound: Bound) -> Verification:
    """How far `found` is from `expected`, logits as `answers` gives them.

    Raises:
        RegistryError: further than `bound` allows, or not finite.
    """
    pairs = list(zip(expected, found, strict=True))
    verification = Verification(
        max_abs_difference=max(float((a - b).abs().max()) for a, b in pairs),
        kl_divergence=_mean([_kl(a, b) for a, b in pairs]),
        top1_agreement=_mean([(a.argmax(-1) == b.argmax(-1)).double() for a, b in pairs]),
        rows=len(pairs),
        bound=str(bound),
    )
    largest = max(float(a.abs().max()) for a in expected)
    if not _within(verification, bound, scale=max(1.0, largest)):
        raise RegistryError(
            "verification: the result answers differently from what it was made of: "
            f"{described(verification)}; allowed: {bound}; nothing is kept"
        )
    return verification


def described(verification: Verification) -> str:
    """The figures in words."""
    return (
        f"max |Δlogit| {verification.max_abs_difference:.1e}, "
        f"KL {verification.kl_divergence:.1e}, top-1 {verification.top1_agreement:.1%}"
    )


def _within(found: Verification, bound: Bound, *, scale: float) -> bool:
    """Written so that NaN is never within."""
    difference, kl = bound.max_abs_difference, bound.kl_divergence
    near = difference is None or (
        found.max_abs_difference <= difference * scale and found.top1_agreement == 1.0
    )
    finite = found.max_abs_difference - found.max_abs_difference == 0
    return finite and near and (kl is None or found.kl_divergence <= kl)


def _kl(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected ‖ found) of each row of logits, float64 (N,)."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _mean(rows: list[Tensor]) -> float:
    return float(torch.cat(rows).mean())
