"""Which of two evaluations is better, by one named metric.

Called by the loop after each evaluation on the held-out part.
"""

import math

from peftkit.contracts import Metrics
from peftkit.errors import RunError, suggestion

LOWER_IS_BETTER = frozenset({"loss", "mse", "mae"})


class BestMetric:
    """Compares evaluations by `name`; every metric but losses and errors is better when greater."""

    def __init__(self, name: str) -> None:
        self.name = name

    def value(self, metrics: Metrics) -> float:
        """The metric that counts.

        Raises:
            RunError: the evaluation has no metric of that name.
        """
        if self.name not in metrics:
            raise RunError(
                f"training.metric_for_best_model: '{self.name}' is not measured; "
                f"{suggestion(self.name, metrics)}"
            )
        return metrics[self.name]

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` beats `best`. NaN never does; of two equal values the first stays."""
        if math.isnan(value):
            return False
        if best is None:
            return True
        return value < best if self.name in LOWER_IS_BETTER else value > best
