"""The tensors of a base by the names that a model gives them, straight from its files.

Called by the registry, which keeps trained tensors as differences to these. No model is built.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


def base_tensors(folder: Path) -> Callable[[str], Tensor | None]:
    """A function from a model's parameter name to the base's tensor, None where it has none.

    A model with a head names its body `bert.encoder…` where the base's file may say `encoder…`, or
    the other way round. A name that no file holds in one of these ways has no counterpart. The
    answer depends on the files alone.
    """
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places.update(dict.fromkeys(file.keys(), path))
    endings = _endings(places)

    def tensor(name: str) -> Tensor | None:
        key = next((key for key in _candidates(name, endings) if key in places), None)
        if key is None:
            return None
        with ExitStack() as stack:
            file = stack.enter_context(safe_open(places[key], framework="pt"))
            found: Tensor = file.get_tensor(key)
            return found

    return tensor


def _candidates(name: str, endings: dict[str, str]) -> list[str]:
    without_prefix = name.partition(".")[2]
    return [name, without_prefix, endings.get(name, "")]


def _endings(keys: Iterable[str]) -> dict[str, str]:
    """Each name without its first part → the name."""
    return {key.partition(".")[2]: key for key in sorted(keys)}
