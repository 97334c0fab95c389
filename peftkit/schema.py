"""The base of every config section: frozen, strict, unknown keys forbidden.

Bottom of the import order: sections live beside the code that they configure and derive from this.
"""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One block of a recipe. Values keep their YAML type: no string becomes a number."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        defer_build=True,  # `peftkit adapters ls` validates nothing and should not wait
    )
