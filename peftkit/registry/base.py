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
    from peftkit.registry.fitting import BaseIdentity

    try:
        config = BaseConfig.model_validate(stored.info.recipe["base"])
    except (KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RegistryError(f"{stored}: its info names no usable base ({reason})") from error
    folder = resolve_base(config).path
    if problems := BaseIdentity.of(folder).problems(stored):
        raise RegistryError(problems)
    return folder
