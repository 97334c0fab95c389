"""The tensors of a base by the names that a model gives them, straight from its files.

Called by the registry, which keeps trained tensors as differences to these, and by merging, which
writes a folder like the base's. No model is built.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


class BaseTensors:
    """Looks tensors up by a model's parameter name; what it answers depends on the files alone.

    A model with a head names its body `bert.encoder…` where the base's file may say `encoder…`, or
    the other way round. A name that no file holds in one of these ways has no counterpart.
    """

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.safetensors"))
        self._place: dict[str, Path] = {}
        self._opened: tuple[Path, Any] | None = None
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                self._place.update(dict.fromkeys(file.keys(), path))
        self._endings = _endings(self._place)

    def __call__(self, name: str) -> Tensor | None:
        """The base's tensor, in memory that the file is mapped to; None where there is none."""
        key = self.key(name)
        if key is None:
            return None
        tensor: Tensor = self._file(self._place[key]).get_tensor(key)
        return tensor

    def names(self) -> list[str]:
        """What the files call their tensors, sorted."""
        return sorted(self._place)

    def key(self, name: str) -> str | None:
        """What the base's files call the tensor."""
        return next((key for key in _candidates(name, self._endings) if key in self._place), None)

    def file(self, name: str) -> Path | None:
        """The file that holds the tensor."""
        key = self.key(name)
        return None if key is None else self._place[key]

    def _file(self, path: Path) -> Any:
        """Keeps the last file open: parsing the header of a large one takes milliseconds."""
        if self._opened is None or self._opened[0] != path:
            self._opened = path, safe_open(path, framework="pt")
        return self._opened[1]


def _candidates(name: str, endings: dict[str, str]) -> list[str]:
    without_prefix = name.partition(".")[2]
    return [name, without_prefix, endings.get(name, "")]


def _endings(keys: Iterable[str]) -> dict[str, str]:
    """Each name without its first part → the name."""
    return {key.partition(".")[2]: key for key in sorted(keys)}
