"""MeanPerColumn: means of held-out errors, each step of the horizon or action dimension by itself.

Symbols: B batch.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["MeanPerColumn"]


class MeanPerColumn(Metric):
    """Weighted mean over the rows of each column, gathered over the ranks.

    Args:
        shape: Of a row, such as (H,) or (kinds of error, H).
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, *shape: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Adds values, shape (B, *shape), with weights of the same shape, all 1 if None; 0 leaves a value out."""
        weights = torch.ones_like(values) if weights is None else weights
        self.total += (values * weights).sum(dim=0).double()
        self.count += weights.sum(dim=0).double()

    def compute(self) -> Tensor:
        """Mean of each column, NaN where all weights are 0; torchmetrics makes one column a scalar."""
        return (self.total / self.count).float()

    def compute_and_reset(self) -> Tensor:
        """The means since the last call, always of the row's shape."""
        means = self.compute().reshape(self.total.shape)
        self.reset()
        return means
