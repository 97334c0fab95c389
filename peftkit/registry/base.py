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

    folder = resolve_base(BaseConfig.model_validate(stored.info.recipe["base"])).path
    if problems := BaseIdentity.of(folder).problems(stored):
        raise RegistryError(problems)
    return folder
