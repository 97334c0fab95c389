"""The body of one delta under the head of another.

Called by the scoring of a combined delta on the tasks of its parents, whose heads may differ.
"""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from peftkit.contracts import Delta
from peftkit.merging.folding import Fold, empty_model
from peftkit.merging.held_base import HeldBase
from peftkit.merging.lora_delta import PREFIX
from peftkit.merging.parents import head_tensors
from peftkit.methods.lora import task_type
from peftkit.modeling.base_tensors import BaseTensors
from peftkit.modeling.parameters import head_modules
from peftkit.registry.manifest import DeltaInfo


def under_head(
    folder: Path, body: tuple[DeltaInfo, Delta], head: tuple[DeltaInfo, Delta]
) -> tuple[DeltaInfo, Delta]:
    """What `body` changes below its head, and the head of `head` with its task and labels.

    What the model of the other head does not have is left out.
    """
    (body_info, body_delta), (head_info, head_delta) = body, head
    model = empty_model(folder, head_info, BaseTensors(folder))
    fold = Fold(folder, head_info, head_delta, HeldBase(folder, head_info))
    taken = {name: fold.tensor(name) for name in sorted(head_tensors(model))}
    places = {*dict(model.named_parameters()), *dict(model.named_modules())}
    kept = {name: tensor for name, tensor in body_delta.tensors.items() if _place(name) in places}
    info = head_info.model_copy(
        update={
            "kind": body_delta.kind,
            "model": {
                **body_info.model,
                **{key: head_info.model[key] for key in ("auto_class", "config")},
            },
        }
    )
    return info, _joined(body_delta, kept, taken, model)


def _joined(
    delta: Delta, kept: dict[str, Tensor], taken: dict[str, Tensor], model: PreTrainedModel
) -> Delta:
    if delta.adapter_config is None:
        return Delta("weights", {**kept, **taken})
    heads = head_modules(model)
    saved = {*(delta.adapter_config["modules_to_save"] or ()), *heads}
    config = {
        **delta.adapter_config,
        "task_type": task_type(model),
        "modules_to_save": sorted(saved),
    }
    return Delta("adapter", {**kept, **{f"{PREFIX}{n}": t for n, t in taken.items()}}, config)


def _place(name: str) -> str:
    """Name in the model of a tensor of a delta; of its layer for a LoRA's factors."""
    return name.removeprefix(PREFIX).partition(".lora_")[0]
