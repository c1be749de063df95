"""Metrics of the world model and the inverse dynamics, for held-out data.

Symbols: B batch, H horizon.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["HorizonErrors", "MeanPerColumn"]


class MeanPerColumn(Metric):
    """Weighted mean of each column, gathered over the ranks; a column is a step of the horizon, or an action dimension.

    Args:
        columns: Number of columns H.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, columns: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(columns, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(columns, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Adds values, shape (B, H), with weights of the same shape, all 1 if None; 0 leaves a value out."""
        weights = torch.ones_like(values) if weights is None else weights
        self.total += (values * weights).sum(dim=0).double()
        self.count += weights.sum(dim=0).double()

    def compute(self) -> Tensor:
        """Mean of each column, NaN where all weights are 0, shape (H,); torchmetrics makes one column a scalar."""
        return (self.total / self.count).float()

    def means(self) -> Tensor:
        """`compute`, always of shape (H,)."""
        return torch.atleast_1d(self.compute())


class HorizonErrors(nn.Module):
    """Observation, reward and termination errors at each step of the horizon.

    Args:
        horizon: Steps H.
    """

    parts: Any  # nn.ModuleDict, whose values mypy takes for plain modules

    def __init__(self, horizon: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({key: MeanPerColumn(horizon) for key in ("observation", "reward", "termination")})

    def update(
        self, observation: Tensor, reward: Tensor, termination: Tensor, valid: Tensor, observed: Tensor | None = None
    ) -> None:
        """Adds segments.

        Args:
            observation: Errors of the observations, shape (B, H, O); their mean over O counts.
            reward: Errors of the rewards, shape (B, H).
            termination: Errors of the terminations, shape (B, H).
            valid: 0 where a step was not recorded, else 1, shape (B, H).
            observed: 0 where its observation was not, else 1, shape (B, H); None: all were.
        """
        errors = {"observation": observation.mean(dim=-1), "reward": reward, "termination": termination}
        for key, values in errors.items():
            counts = valid if observed is None or key != "observation" else valid * observed
            self.parts[key].update(values, counts)

    def compute_and_reset(self) -> dict[str, Tensor]:
        """Mean error at each step since the last call, by name, each shape (H,)."""
        means = {key: part.means() for key, part in self.parts.items()}
        for part in self.parts.values():
            part.reset()
        return means
