"""What deltas truly add up to, computed without the code under test."""

import tiny_runs
from stored_deltas import labelled

from peftkit.modeling.loading import ModelSpec, load_model

HEADS = ("classifier.", "score.")


def plain_model(folder):
    method = tiny_runs.make_method({"type": "full"})
    spec = ModelSpec(tiny_runs.AUTO_CLASS, labelled(2), None, "no")
    return load_model(folder, spec, method.load_options())


def plain_weights(folder):
    """Float64; the head is drawn and of no meaning."""
    model = plain_model(folder)
    return {key: value.double() for key, value in model.state_dict().items()}


def weighted_sum(base, parents, weights):
    """base + Σ weight · (parent - base); the head's average by the weights."""
    found = {}
    for name in base:
        if name.startswith(HEADS):
            parts = [w / sum(weights) * p[name] for w, p in zip(weights, parents, strict=True)]
            found[name] = sum(parts)
        else:
            pairs = zip(weights, parents, strict=True)
            found[name] = base[name] + sum(w * (p[name] - base[name]) for w, p in pairs)
    return found


def logits_with(folder, weights, batch):
    """Of a plain model that holds `weights`, computed in float64."""
    model = plain_model(folder).double()
    model.load_state_dict(weights)
    return tiny_runs.logits_of(model, batch)


def distance(found, expected, base):
    """‖found - expected‖ / ‖expected - base‖ below the heads."""
    names = [name for name in base if not name.startswith(HEADS)]
    apart = sum(float((found[n] - expected[n]).square().sum()) for n in names)
    whole = sum(float((expected[n] - base[n]).square().sum()) for n in names)
    return (apart / whole) ** 0.5
