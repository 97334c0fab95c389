"""The config of a base: read without running its code, and compared with another one's.

Called by the loading, and by the registry to tell whether a delta meets its base.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from peftkit.errors import SourceError

_NOT_THE_MODEL = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "label2id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Keys that say where a config comes from or that the task sets, and not what the base computes."""


def read_config(folder: Path, **overrides: Any) -> PretrainedConfig:
    """The folder's config as transformers reads it.

    Raises:
        SourceError: an architecture that transformers does not have itself, or a damaged config.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, **overrides, trust_remote_code=False
        )
        return config
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(
            f"{folder}: config.json cannot be used without code of its own: {reason}"
        ) from error


def described(folder: Path) -> dict[str, Any]:
    """What the base's config says of the base, apart from transformers' defaults; plain JSON."""
    return _described(read_config(folder))


def differences(folder: Path, stored: Mapping[str, Any]) -> list[str]:
    """`key: then → now` for each key in which the folder's config is another than `stored`.

    Both are filled in by this version of transformers, so that a default that another version
    wrote out, or left out, is no difference.
    """
    return differences_from(read_config(folder), stored)


def differences_from(own: PretrainedConfig, stored: Mapping[str, Any]) -> list[str]:
    """As `differences`, for a config that has been read."""
    then, now = _filled(type(own).from_dict(dict(stored))), _filled(own)
    return [
        f"{key}: then {then.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]


def _described(config: PretrainedConfig) -> dict[str, Any]:
    return {k: v for k, v in config.to_diff_dict().items() if k not in _NOT_THE_MODEL}


def _filled(config: PretrainedConfig) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k not in _NOT_THE_MODEL}
