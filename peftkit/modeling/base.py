"""The `base` section of a recipe and the folder that it stands for.

Read by the recipe; called by the experiment and by the registry when a delta is loaded.
"""

from pydantic import field_validator

from peftkit.data.sources import Located, locate, offline_problem
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

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("empty; give a path or <org>/<name>")
        return value

    @field_validator("offline")
    @classmethod
    def _names_a_package(cls, value: str | None) -> str | None:
        if value is not None and (problem := offline_problem("models", value)):
            raise ValueError(problem.removeprefix("offline: "))
        return value


def resolve_base(config: BaseConfig) -> Located:
    """Find the base's folder: path, mirror, Hub or its cache, then `offline`.

    Raises:
        SourceError: nowhere to be found, or found and not to be trusted.
    """
    return locate("models", config.name, revision=config.revision, offline=config.offline)
