"""The verbs `evaluate` and `predict`: a stored delta, loaded in this process, at work.

Called by `cli.app`; imports torch and the loading inside each verb.
"""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkit.cli.output import JsonFlag, note, print_json, print_pairs, print_table
from peftkit.errors import UsageError
from peftkit.scoring import Score, accelerator_for, rescore

if TYPE_CHECKING:
    from peftkit.registry.loading import LoadedDelta

Name = Annotated[str, typer.Argument(metavar="NAME", help="name, or name@v2.")]


MAX_NEW_TOKENS = 256
"""The longest answer of a language model."""


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    app.command("evaluate", epilog="Example: peftkit evaluate lora_sst2@v1")(evaluate)
    app.command("predict", epilog='Example: peftkit predict lora_sst2 "a quiet triumph"')(predict)


def evaluate(name: Name, *, as_json: JsonFlag = False) -> None:
    """Score a delta again.

    Loads it in this process, scores it on its validation split, and compares with the scores that
    its run recorded. Exits 1 if one differs. A combined or extracted delta has no recorded scores.
    """
    from peftkit.registry.loading import load_delta
    from peftkit.reporting.summary import STAND_IN_LINE

    loaded = load_delta(name)
    scores, examples = rescore(loaded)
    info = loaded.stored.info
    equal = all(score.equal for score in scores) if info.run.metrics else None
    if info.stand_in:
        note(STAND_IN_LINE)
    if as_json:
        print_json(_evaluation(loaded, scores) | {"examples": examples, "equal": equal})
    elif equal is None:
        print_table(["metric", "now"], [[s.metric, _shown(s.now)] for s in scores])
    else:
        print_table(["metric", "recorded", "now", "equal"], [_row(score) for score in scores])
    if equal is None:
        parents = ", ".join(parent.reference for parent in info.parents)
        made = f"made of {parents}; " if parents else ""
        note(f"{loaded.stored}: {made}no run has scored it, so nothing is compared")
    elif not equal:
        note(f"{name}: other scores than the run's: the data, libraries or hardware differ")
        raise typer.Exit(1)


def predict(
    name: Name,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text.")],
    second: Annotated[
        str | None, typer.Argument(metavar="TEXT2", help="The other text of a pair.")
    ] = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Answer for one text.

    Prints the label and its probability, the number that a regression predicts, or what a language
    model writes. A text that begins with a dash goes after `--`.
    """
    from peftkit.registry.loading import load_delta

    texts = [text] if second is None else [text, second]
    loaded = load_delta(name)
    answer = answer_for(loaded, texts)
    if as_json:
        print_json(answer)
    elif "text" in answer:
        print(answer["text"])
    elif answer["label"] is None:
        print(f"{answer['score']:.4f}")
    else:
        print_pairs([(answer["label"], f"{answer['score']:.4f}")])


def answer_for(loaded: "LoadedDelta", texts: list[str]) -> dict[str, Any]:
    """`label`, `score` and, for a classification, `scores` by label; `text` of a language model.

    Raises:
        UsageError: the task answers no texts, or another number of them.
    """
    import torch

    rows = _encode(loaded, texts)
    accelerator = accelerator_for(loaded.stored.info)
    model = accelerator.prepare_model(loaded.model, evaluation_mode=True)
    batch = {k: v.to(accelerator.device) for k, v in loaded.task.collate(rows).items()}
    if loaded.task.label_kind == "tokens":
        return {"text": _written(loaded, model, batch)}
    with torch.no_grad():
        logits = model(**batch).logits[0].float()
    labels = loaded.stored.info.labels
    if labels is None:
        return {"label": None, "score": float(logits[0])}
    scores = dict(zip(labels, logits.softmax(-1).tolist(), strict=True))
    best = max(scores, key=scores.__getitem__)
    return {"label": best, "score": scores[best], "scores": scores}


def _written(loaded: "LoadedDelta", model: Any, batch: dict[str, Any]) -> str:
    """What the model puts after one prompt, the likeliest token each time."""
    from transformers import GenerationConfig

    from peftkit.modeling.parameters import position_limit

    tokenizer, asked = loaded.tokenizer, batch["input_ids"].shape[1]
    text = model.config.get_text_config()
    limits = position_limit(model), getattr(text, "max_position_embeddings", None)
    room = min((limit for limit in limits if limit), default=asked + MAX_NEW_TOKENS)
    if asked >= room:
        raise UsageError(f"predict: the prompt has {asked} tokens, the model's limit is {room}")
    # Else the base's own would count, too: penalties, forced tokens.
    model.generation_config = GenerationConfig()
    how = GenerationConfig(
        do_sample=False,
        max_new_tokens=min(MAX_NEW_TOKENS, room - asked),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    written = model.generate(**batch, generation_config=how)
    return str(tokenizer.decode(written[0, asked:], skip_special_tokens=True)).strip()


def _encode(loaded: "LoadedDelta", texts: list[str]) -> Any:
    encode = getattr(loaded.task, "encode", None)
    if encode is None:
        raise UsageError(f"predict: task '{loaded.stored.info.task['type']}' answers no texts")
    columns = loaded.stored.info.task.get("text_columns")
    if columns and len(texts) != len(columns):
        expected = f"{len(columns)} ({', '.join(columns)})"
        raise UsageError(
            f"predict: expected as many texts as it reads, {expected}; {len(texts)} found"
        )
    return encode(loaded.tokenizer, [texts])


def _evaluation(loaded: "LoadedDelta", scores: list[Score]) -> dict[str, Any]:
    return {
        "name": loaded.stored.name,
        "version": loaded.stored.version,
        "stand_in": loaded.stored.info.stand_in,
        "metrics": {score.metric: score.now for score in scores},
        "recorded": {score.metric: score.recorded for score in scores},
    }


def _row(score: Score) -> list[str]:
    equal = "yes" if score.equal else "no"
    return [score.metric, _shown(score.recorded), _shown(score.now), equal]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"
