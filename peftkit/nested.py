"""What differs between two settings, key by key.

Used where a run is resumed: by the run's folder on recipes, by the training on conditions.
"""

import json
from collections.abc import Mapping
from typing import Any


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: then old, now new` for each dotted key that differs, sorted; values as JSON."""
    old, new = _flat(then), _flat(now)
    return [
        f"{key}: then {old.get(key, 'absent')}, now {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flat(value: Any, path: tuple[str, ...] = ()) -> dict[str, str]:
    """Dotted key → JSON; an empty mapping is a value of its own."""
    if not isinstance(value, Mapping) or (path and not value):
        return {".".join(path): json.dumps(value)}
    found: dict[str, str] = {}
    for key, inner in value.items():
        found |= _flat(inner, (*path, str(key)))
    return found
