"""The return-to-go that imagined futures aim at.

Symbols: B starts, N recorded rows.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dawm.errors import require

__all__ = ["ConstantReturn", "LiftedReturn", "QuantileReturn", "TargetReturn"]


class TargetReturn(ABC):
    """Chooses the return-to-go that each imagined future aims at."""

    @abstractmethod
    def __call__(self, returns_to_go: Tensor, data_returns_to_go: Tensor) -> Tensor:
        """Targets from each start's own recorded return-to-go, (B,) -> (B,).

        ``data_returns_to_go``, shape (N,), are those of the rows that statistics are taken from.
        """


class QuantileReturn(TargetReturn):
    """The same quantile of the data's returns-to-go for every start.

    Args:
        quantile: In [0, 1]; 1 is the best return in the data.
    """

    def __init__(self, quantile: float = 0.9) -> None:
        require("target_return.quantile", quantile, 0 <= quantile <= 1, "a number from 0 to 1")
        self.quantile = quantile

    def __call__(self, returns_to_go: Tensor, data_returns_to_go: Tensor) -> Tensor:
        """The quantile, shape (B,)."""
        place = round(self.quantile * (len(data_returns_to_go) - 1))
        # torch.quantile refuses more than 16 million values
        return data_returns_to_go.kthvalue(place + 1).values.expand_as(returns_to_go)


class LiftedReturn(TargetReturn):
    """Each start's own recorded return-to-go, lifted by some standard deviations of the data's returns-to-go.

    Not by a factor: returns may be negative.

    Args:
        lift: Standard deviations to add; 0 imagines futures as good as the recorded one.
    """

    def __init__(self, lift: float = 0.0) -> None:
        self.lift = lift

    def __call__(self, returns_to_go: Tensor, data_returns_to_go: Tensor) -> Tensor:
        """Each start's return-to-go plus the lift, shape (B,)."""
        return returns_to_go + self.lift * data_returns_to_go.std()


class ConstantReturn(TargetReturn):
    """One return-to-go for every start.

    Args:
        value: The discounted return to aim at, in the environment's units.
    """

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, returns_to_go: Tensor, data_returns_to_go: Tensor) -> Tensor:
        """The value, shape (B,)."""
        return torch.full_like(returns_to_go, self.value)
