"""The base that a stored delta belongs to: found, and compared with the one it was trained on.

Called by the store and by loading; the base's rooms are imported only when a base is asked for.
"""

from pathlib import Path

from peftkit.errors import RegistryError
from peftkit.registry.reading import StoredDelta


def base_of(stored: StoredDelta) -> Path:
    """The folder of a delta's base, which is the very one that it was trained on.

    Raises:
        RegistryError: other weights, tokenizer or config; a line for each.
        SourceError: it cannot be found.
    """
    from peftkit.modeling.base import BaseConfig, resolve_base

    folder = resolve_base(BaseConfig.model_validate(stored.info.recipe["base"])).path
    refuse_other_base(stored, folder)
    return folder


def refuse_other_base(stored: StoredDelta, folder: Path) -> None:
    """Compare a folder with what a delta says of its base.

    Raises:
        RegistryError: other weights, tokenizer or config; a line for each.
    """
    from peftkit.modeling.config import differences
    from peftkit.modeling.identity import base_digest, tokenizer_digest

    info = stored.info
    found = {"weights": base_digest(folder), "tokenizer": tokenizer_digest(folder)}
    expected = {"weights": info.base_digest, "tokenizer": info.tokenizer_digest}
    problems = [
        f"{stored}: trained on {info.base_name} with {what} "
        f"{expected[what]}, but {folder} has {found[what]}"
        for what in expected
        if expected[what] != found[what]
    ]
    if info.base_config is not None:
        problems += [
            f"{stored}: {folder} has another config than {info.base_name} had: {difference}"
            for difference in differences(folder, info.base_config)
        ]
    if problems:
        raise RegistryError(problems)
