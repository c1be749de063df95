"""Metrics of the world model and the inverse dynamics, for held-out data.

Symbols: B batch, H horizon.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["HorizonErrors", "MeanPerColumn"]


class MeanPerColumn(Metric):
    """Mean of each of H columns (horizon's steps, or an action's dimensions) over all rows, gathered over the ranks."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, columns: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(columns, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(columns, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Adds values (B, H), each with a weight (B, H); 0 leaves it out, and all are 1 if None."""
        weights = torch.ones_like(values) if weights is None else weights
        self.total += (values * weights).sum(dim=0).double()
        self.count += weights.sum(dim=0).double()

    def compute(self) -> Tensor:
        """Mean of each column, NaN where no row counted, shape (H,); of a single column torchmetrics makes a scalar."""
        return (self.total / self.count).float()

    def means(self) -> Tensor:
        """`compute`, always of shape (H,)."""
        return torch.atleast_1d(self.compute())


class HorizonErrors(torch.nn.Module):
    """Observation, reward and termination errors at each of H steps."""

    def __init__(self, horizon: int) -> None:
        super().__init__()
        self.errors = MeanPerColumn(3 * horizon)

    def update(self, observation: Tensor, reward: Tensor, termination: Tensor, valid: Tensor) -> None:
        """Adds errors (B, H, O), averaged over O, (B, H), and (B, H); valid (B, H) is 0 where nothing was recorded."""
        errors = torch.cat([observation.mean(dim=-1), reward, termination], dim=1)
        self.errors.update(errors, valid.repeat(1, 3))

    def compute_and_reset(self) -> dict[str, Tensor]:
        """Mean error at each step since the last call, by name, each shape (H,)."""
        means = self.errors.means().chunk(3)
        self.errors.reset()
        return dict(zip(("observation", "reward", "termination"), means))
