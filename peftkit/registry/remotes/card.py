"""The model card of a delta on the Hugging Face Hub, made from what its info says.

Called by `hub`; imports no tensor library. The front matter is what the Hub searches by.
"""

import re
from typing import Any

import yaml

from peftkit.data.hub import HUB_NAME
from peftkit.registry.reading import StoredDelta
from peftkit.registry.remotes.address import HubAddress
from peftkit.registry.summary import task_name

STAND_IN = (
    "> **Trained and scored on a sample that peftkit made itself, not on the named data set.** "
    "Its scores say nothing about that data set."
)

_UNSAFE = re.compile(r"[`|<>\[\]\s]+")


def model_card(stored: StoredDelta, address: HubAddress) -> str:
    """README.md: the front matter, what the delta is, what it scored, how to use it."""
    front = yaml.safe_dump(_front(stored), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---", f"# {address.name}", _summary(stored)]
    if stored.info.stand_in:
        parts.append(STAND_IN)
    parts += [_facts(stored), _scores(stored), _usage(stored, address)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(stored: StoredDelta) -> dict[str, Any]:
    info = stored.info
    adapter = info.kind == "adapter"
    words = ("peftkit", info.method.get("type"), info.task.get("type"))
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "peftkit",
        "tags": [str(word) for word in words if word] + ["stand-in"] * info.stand_in,
    }
    # The Hub refuses a card whose base or data set is no name on it, such as a local path.
    if HUB_NAME.fullmatch(info.base_name):
        front |= {"base_model": info.base_name}
        front |= {"base_model_relation": "adapter" if adapter else "finetune"}
    dataset = str(info.task.get("dataset") or "")
    if HUB_NAME.fullmatch(dataset) and not info.stand_in:
        front["datasets"] = [dataset]
    if info.run.metrics:
        front["metrics"] = sorted(info.run.metrics)
    return front


def _summary(stored: StoredDelta) -> str:
    info = stored.info
    method, base = _code(info.method.get("type", "?")), _code(info.base_name)
    return (
        f"What {method} training changed of {base}, kept by peftkit as a delta of kind {info.kind}."
    )


def _facts(stored: StoredDelta) -> str:
    info = stored.info
    quantised = f", quantised to {info.quantisation.quant_type}" if info.quantisation else ""
    rows = [
        ("task", _code(task_name(info.task))),
        ("labels", ", ".join(map(_code, info.labels or [])) or "none"),
        ("base digest", _code(info.base_digest) + quantised),
        ("seed", str(info.run.seed)),
        ("run", _code(info.run.status)),
        ("made", _code(info.created)),
        ("digest", _code(stored.digest)),
    ]
    return _table(("fact", "value"), rows) + (
        "\n\nThe recipe of `peftkit run` that made it, and all else that is known of it, "
        "is in `manifest.json`."
    )


def _scores(stored: StoredDelta) -> str:
    metrics = stored.info.run.metrics.items()
    rows = [(_code(name), "-" if v is None else f"{v:.4f}") for name, v in metrics]
    on = "peftkit's sample" if stored.info.stand_in else "validation"
    return f"## Scores on {on}\n\n{_table(('metric', 'value'), rows)}" if rows else ""


def _usage(stored: StoredDelta, address: HubAddress) -> str:
    lines = [
        "## Use",
        "",
        f"    peftkit adapters pull {address} --save-as {stored.name}",
        f"    peftkit evaluate {stored.name}",
    ]
    if stored.info.kind == "adapter":
        revision = f', revision="{address.revision}"' if address.revision else ""
        opened = f'PeftModel.from_pretrained(base, "{address.repository}"{revision})'
        lines += ["", "or with PEFT alone:", "", f"    model = peft.{opened}"]
    return "\n".join(lines)


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


def _code(text: object) -> str:
    """Text of any origin as inline code: it ends neither the span nor the table's cell."""
    return f"`{_UNSAFE.sub(' ', str(text)).strip() or '?'}`"
