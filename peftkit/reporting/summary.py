"""A run record in a few lines of plain text, for the end of a run.

Called by `run.py`; imports `record` only.
"""

import math

from peftkit.reporting.record import MemoryPeaks, RunRecord

STAND_IN_LINE = "Data: peftkit's own sample, not the real data set"


def summary_lines(record: RunRecord) -> list[str]:
    """The result of a run as plain text, ready for stdout."""
    lines = [f"{record.name} (seed {record.seed}): {record.status.replace('_', ' ')}"]
    if record.error is not None:
        lines += [f"Error: {line}" for line in record.error.splitlines()]
    lines += [
        f"{split.capitalize()}: " + ", ".join(f"{k} {_score(v)}" for k, v in scores.items())
        for split, scores in record.metrics.items()
    ]
    if record.resumed_after_step is not None:
        lines.append(f"Resumed after step {record.resumed_after_step}")
    if record.weights_from_step is not None:
        lines.append(f"Began with weights of a training before: step {record.weights_from_step}")
    lines += [f"Seconds: {_seconds(record)}", f"Throughput: {_throughput(record)}"]
    lines += [f"Peak memory in {phase}: {_peaks(p)}" for phase, p in record.memory.items()]
    lines += [f"Trainable parameters: {_trainable(record)}", f"Delta: {_delta(record)}"]
    return [*lines, STAND_IN_LINE] if record.stand_in else lines


def _score(value: float) -> str:
    return "not finite" if math.isnan(value) else f"{value:.4f}"


def _seconds(record: RunRecord) -> str:
    parts = record.seconds.model_dump().items()
    return ", ".join(
        f"{name.replace('_', ' ')} {'-' if s is None else f'{s:.1f}'}" for name, s in parts
    )


def _throughput(record: RunRecord) -> str:
    examples, tokens = record.examples_per_second, record.tokens_per_second
    if examples is None or tokens is None:
        return "not measured"
    return f"{examples:.1f} examples/s, {tokens:.0f} tokens/s without padding"


def _peaks(peaks: MemoryPeaks) -> str:
    named = [(name.removesuffix("_bytes"), size) for name, size in peaks.model_dump().items()]
    return ", ".join(f"{name} {_mib(size)}" for name, size in named)


def _trainable(record: RunRecord) -> str:
    trainable, total = record.trainable_parameters, record.total_parameters
    if trainable is None or not total:
        return "not counted"
    return f"{trainable:,} of {total:,} ({trainable / total:.2%})"


def _delta(record: RunRecord) -> str:
    return f"{record.delta}, {_mib(record.delta_bytes)}" if record.delta else "none saved"


def _mib(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 2**20:.1f} MiB"
