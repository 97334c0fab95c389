"""The `base` section of a recipe and the folder that it stands for.

Read by the recipe; called by the experiment and by the registry when a delta is loaded.
"""

from peftkit.data.sources import Located, locate
from peftkit.schema import Section


class BaseConfig(Section):
    """Which base model to start from."""

    name: str
    """Hub id (`org/name`) or path of a folder with config.json and *.safetensors."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; None is its default branch."""
    offline: str | None = None
    """Where to find the same weights without the Hub:
    `package:<distribution>/<folder>#sha256=<hex>`."""


def resolve_base(config: BaseConfig) -> Located:
    """Find the base's folder: path, mirror, Hub or its cache, then `offline`.

    Raises:
        SourceError: nowhere to be found, or found and not to be trusted.
    """
    return locate("models", config.name, revision=config.revision, offline=config.offline)
