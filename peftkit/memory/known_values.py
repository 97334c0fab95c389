"""What a model asks of its input's values, answered where there are none.

Called by the planner around its step. T5 and BART classify by the last end token of each row and
look for it; on fake tensors every row has one, at its end.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class OneEndTokenARow(TorchFunctionMode):
    """Answers the two questions; everything else goes its way."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """`unique_consecutive` finds one count, a mask over (B, T) finds one place a row."""
        if func is torch.unique_consecutive:
            return args[0][:1]
        if func is Tensor.__getitem__ and _is_mask(args[1]):
            return args[0][:, -1]
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    first = index[0] if isinstance(index, tuple) and index else index
    return isinstance(first, Tensor) and first.dtype is torch.bool and first.ndim == 2
