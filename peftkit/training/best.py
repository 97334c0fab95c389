"""Which of two evaluations is better, by one named metric.

Called by the loop after each evaluation on the held-out part.
"""

import math

from peftkit.contracts import Metrics
from peftkit.errors import RunError, suggestion

LOWER_IS_BETTER = frozenset({"loss", "mse", "mae", "perplexity"})
GREATER_IS_BETTER = frozenset(
    {
        "accuracy",
        "f1",
        "f1_macro",
        "matthews_correlation",
        "pearsonr",
        "precision",
        "recall",
        "spearmanr",
        "token_accuracy",
    }
)


class BestMetric:
    """Compares evaluations by `name`.

    Unless `greater_is_better` says it, every metric but losses and errors is better when greater;
    a recipe has to say it of a metric that is not among those that peftkit knows.
    """

    def __init__(self, name: str, *, greater_is_better: bool | None = None) -> None:
        self.name = name
        known = name not in LOWER_IS_BETTER
        self._greater = known if greater_is_better is None else greater_is_better

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
        return value > best if self._greater else value < best
