"""The words of an adapter's settings by which PEFT chooses modules: do they match, and in time?

Called by the methods and by the putting on of a stored adapter, before PEFT does the same search.
PEFT is content when one target of several matches, and says nothing of the other settings.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from peftkit.errors import MethodError, suggestion

SECONDS = 5.0
"""For all patterns over all names: a good one takes milliseconds."""

_SEARCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
json.dump([any(re.match(p, n) for n in names) for p in patterns], sys.stdout)
"""


def check_settings(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Refuse settings of which a word matches nothing in `model`, or that are no usable patterns.

    Raises:
        MethodError: one line for each setting, with what the model has.
    """
    missing = unmatched(model, settings)
    problems = [_unmatched(model, key, words) for key, words in missing.items()]
    problems += _number_problems(model, settings)
    if problems:
        raise MethodError(problems)


def unmatched(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """The words that match no module, by setting.

    Raises:
        MethodError: a word is no usable pattern.
    """
    names = [name for name, _ in model.named_modules() if name]
    forms = list(_forms(settings))
    matched = _matched([form for _, _, form in forms], names)
    missing: dict[str, list[str]] = {}
    for (key, word, _), found in zip(forms, matched, strict=True):
        if not found:
            missing.setdefault(key, []).append(word)
    return missing


def _forms(settings: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Key, word and the expression, for `re.match`, by which PEFT looks for the word."""
    for key in ("target_modules", "exclude_modules"):
        value = settings.get(key)
        if isinstance(value, str) and value != "all-linear":
            yield key, value, rf"(?:{value})\Z"
        elif value and not isinstance(value, str):
            yield from ((key, word, rf"(.*\.)?{re.escape(word)}\Z") for word in value)
    for word in settings.get("modules_to_save") or ():
        yield "modules_to_save", word, rf"(^|.*\.){word}($|\..*)"
    for key in ("rank_pattern", "alpha_pattern"):
        for word in settings.get(key) or ():
            yield key, word, rf"(.*\.)?({word})$"
    layers = settings.get("layers_pattern") or ()
    for word in [layers] if isinstance(layers, str) else layers:
        yield "layers_pattern", word, rf"(?:^|.*?\.){word}\.\d+"


def _matched(patterns: Sequence[str], names: Sequence[str]) -> list[bool]:
    """Whether each pattern matches any name.

    The search runs in a process of its own, because nothing stops `re` within this one.

    Raises:
        MethodError: one of them is no regular expression, or the search takes too long.
    """
    if not patterns:
        return []
    try:
        search = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _SEARCH],
            input=json.dumps([patterns, names]),
            capture_output=True,
            check=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise MethodError(
            f"method: matching {', '.join(map(repr, patterns))} with {len(names)} module names "
            f"took over {SECONDS:g} s; simplify the pattern, such as repeats inside repeats"
        ) from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["?"])[-1]
        raise MethodError(
            f"method: {', '.join(map(repr, patterns))}: not all are regular expressions: {reason}"
        ) from None
    matched: list[bool] = json.loads(search.stdout)
    return matched


def _unmatched(model: nn.Module, key: str, words: Sequence[str]) -> str:
    leaves = _leaf_names(model, adaptable=key == "target_modules")
    known = [*leaves, "all-linear"] if key == "target_modules" else leaves
    hints = "".join(_hint(word, known) for word in words)
    return (
        f"method: {key} {', '.join(repr(word) for word in words)} match no module; "
        f"{hints}{type(model).__name__} has: {', '.join(leaves)}"
    )


def _hint(word: str, known: Sequence[str]) -> str:
    """What was meant by a word that matches nothing, or nothing."""
    if word in known:  # a text is one expression for a whole name
        return f"write [{word}] for all names that end in it; "
    hint, mark, _ = suggestion(word, known).partition("? ")
    return f"{hint}? " if mark else ""


def _leaf_names(model: nn.Module, *, adaptable: bool) -> list[str]:
    """Last parts of the modules' names; on request only of layers that can be adapted."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if name
            and not name.rpartition(".")[2].isdigit()
            and (not adaptable or getattr(getattr(module, "weight", None), "ndim", 0) == 2)
        }
    )


def _number_problems(model: Any, settings: Mapping[str, Any]) -> list[str]:
    """Layers and tokens beyond what the model has, and parameters that it lacks."""
    text = model.config.get_text_config()
    problems = []
    layers = settings.get("layers_to_transform")
    for layer in [layers] if isinstance(layers, int) else layers or ():
        if not 0 <= layer < text.num_hidden_layers:
            last = text.num_hidden_layers - 1
            problems.append(f"method: layers_to_transform: no layer {layer}; take 0 to {last}")
    tokens = settings.get("trainable_token_indices")
    if tokens is not None and not tokens:
        problems.append("method: trainable_token_indices: empty; name a token or leave it out")
    for token in tokens if isinstance(tokens, list) else ():
        if not 0 <= token < text.vocab_size:
            last = text.vocab_size - 1
            problems.append(f"method: trainable_token_indices: no token {token}; take 0 to {last}")
    known = [name for name, _ in model.named_parameters()]
    for word in settings.get("target_parameters") or ():
        if not any(f".{name}".endswith(f".{word}") for name in known):
            problems.append(f"method: target_parameters: no parameter ends in '{word}'")
    return problems
