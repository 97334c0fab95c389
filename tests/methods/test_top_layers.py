"""What stays frozen in `top_layers` computes the same features in every epoch."""

import pytest
import tiny_runs
import torch
from pydantic import ValidationError

from peftkit.errors import MethodError
from peftkit.modeling.parameters import train_mode


def prepared(folder, num_layers):
    method = tiny_runs.make_method({"type": "top_layers", "num_layers": num_layers})
    return tiny_runs.prepare(folder, method, dropout=0.5)


def features(model, folder):
    """Output of each stage in one train-mode forward."""
    seen = {}
    stages = {"embeddings": model.bert.embeddings, "pooler": model.bert.pooler}
    stages |= {f"block {i}": block for i, block in enumerate(model.bert.encoder.layer)}

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in stages.items()]
    batch = tiny_runs.make_batch(folder)
    batch.pop("labels")
    seen["logits"] = model(**batch).logits
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("num_layers", "still"),
    [
        (0, {"embeddings", "block 0", "block 1", "block 2", "pooler"}),
        (1, {"embeddings", "block 0", "block 1"}),
        (3, {"embeddings"}),
    ],
)
def test_only_the_trained_part_has_dropout(base_of, num_layers, still):
    model = prepared(base_of("bert"), num_layers)
    train_mode(model)
    first, second = (features(model, base_of("bert")) for _ in range(2))
    assert {name for name in first if torch.equal(first[name], second[name])} == still


def test_evaluation_has_no_dropout_and_does_not_end_the_train_mode(base_of):
    model = prepared(base_of("bert"), 1)
    batch = tiny_runs.make_batch(base_of("bert"))
    first, second = (tiny_runs.logits_of(model, batch) for _ in range(2))
    assert torch.equal(first, second)
    train_mode(model)
    modes = [model.training, model.bert.pooler.training]
    modes += [block.training for block in model.bert.encoder.layer]
    assert modes == [True, True, False, False, True]
    assert not model.bert.embeddings.training


def test_more_layers_than_the_model_has_are_refused(base_of):
    with pytest.raises(MethodError) as caught:
        prepared(base_of("bert"), 4)
    assert str(caught.value) == (
        "method: num_layers is 4, but BertForSequenceClassification has 3 blocks; take 0 to 3"
    )


def test_a_negative_number_of_layers_is_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        tiny_runs.make_method({"type": "top_layers", "num_layers": -1})
