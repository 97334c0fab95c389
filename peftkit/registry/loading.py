"""From a name in the registry to a model that answers: base, delta, task and tokenizer.

Called by the verbs that score and predict. The base must be the very one the delta was trained
on: its digest and its tokenizer's are checked before anything is put on it.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peftkit import plugins
from peftkit.contracts import Delta, Task
from peftkit.errors import RegistryError
from peftkit.modeling.loading import load_model
from peftkit.registry.base import base_of
from peftkit.registry.fitting import held_by, load_options, model_spec, put_on, restore_precision
from peftkit.registry.root import default_root
from peftkit.registry.store import Registry, StoredDelta


@dataclass(frozen=True)
class LoadedDelta:
    """A stored delta on its base. The model is on the CPU, in eval mode, nothing trains."""

    model: nn.Module
    task: Task
    tokenizer: PreTrainedTokenizerBase
    stored: StoredDelta


def load_delta(reference: str, *, registry: Registry | None = None) -> LoadedDelta:
    """Verify and load `name`, `name@v2` or `name@latest`.

    Raises:
        RegistryError: unknown, damaged, or another base or tokenizer than it was trained on.
        SourceError: the base cannot be found.
    """
    registry = registry or Registry(default_root())
    stored = registry.find(reference)
    folder = base_of(stored)
    return on_base(folder, stored, registry.read_delta(stored, base=folder))


def on_base(folder: Path, stored: StoredDelta, delta: Delta) -> LoadedDelta:
    """Put `delta` on the base in `folder`, which is checked, as the info of `stored` says.

    Raises:
        RegistryError: tensors that do not fit, or an info that names no usable task.
    """
    info = stored.info
    model = put_on(load_model(folder, model_spec(info), load_options(info)), delta)
    restore_precision(model, held_by(info).dtype, delta)
    task = _task_of(stored)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return LoadedDelta(model.eval(), task, tokenizer, stored)


def _task_of(stored: StoredDelta) -> Task:
    try:
        task_class = plugins.load("tasks", stored.info.task["type"])
        task: Task = task_class(task_class.Config.model_validate(stored.info.task))
        return task
    except (KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RegistryError(f"{stored}: its info names no usable task ({reason})") from error
