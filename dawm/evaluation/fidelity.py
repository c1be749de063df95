"""How true transitions are, how new, and how like the data: metrics with known answers.

Symbols: B segments or rollouts, H horizon, O observation size, N reference rows, M compared rows, D columns.

    transition error   ((s' - s'_true) / sigma)^2, sigma the standard deviation of real s' - s in each dimension.
                       A perfect model has 0, the mean difference 1, a difference drawn from another row 2.
    novelty            the distance to the nearest reference row, in standard deviations of the columns
    marginal distance  the Wasserstein-1 distance of each column, in standard deviations: a shift by c of them has c
    correlation        the mean absolute difference of the correlations of all pairs of columns, from 0 to 2
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dawm.data.transitions import Transitions
from dawm.nn.normalizer import Normalizer

__all__ = ["ColumnDistances", "Novelty", "ReturnResponse", "TransitionErrors"]

QUERIES = 256  # rows whose distances to all reference rows are held at once
QUANTILES = 2001  # at which two columns are compared: an odd number, so that the median is among them


class TransitionErrors(Metric):
    """Mean squared errors at each step of the horizon, and the fraction of wrong terminations.

    Args:
        horizon: Steps H.
        difference_std: Standard deviation of real differences ``s' - s``, shape (O,).
        reward_std: Standard deviation of real rewards, shape ().
    """

    full_state_update = False
    observation: Tensor
    reward: Tensor
    termination: Tensor
    count: Tensor

    def __init__(self, horizon: int, difference_std: Tensor, reward_std: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shapes = {"observation": (horizon, len(difference_std))} | dict.fromkeys(
            ("reward", "termination", "count"), (horizon,)
        )
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.difference_std, self.reward_std = difference_std.double(), reward_std.double()

    def update(self, predicted: Transitions, true: Transitions, valid: Tensor) -> None:
        """Adds steps, fields of shape (B, H, ...); those count whose ``valid``, shape (B, H), bool, is True."""
        errors = {
            "observation": (predicted.next_observations - true.next_observations).double().square(),
            "reward": (predicted.rewards - true.rewards).double().square(),
            "termination": ((predicted.terminations > 0.5) != (true.terminations > 0.5)).double(),
            "count": torch.ones_like(valid, dtype=torch.float64),
        }
        for name, values in errors.items():
            mask = valid if values.ndim == 2 else valid.unsqueeze(-1)
            # not a product with the mask: what does not count may be infinite
            getattr(self, name).add_(values.where(mask, 0.0).sum(dim=0))

    def compute(self) -> dict[str, Tensor]:
        """``observation``, ``reward`` and ``termination``, each of shape (H,), ``mean_...`` over all steps.

        Observation and reward errors are in units of the variance; ``raw_observation`` and ``raw_reward`` are not.
        ``by_dimension``, shape (O,), is the observation error over all steps, ``count`` the steps that counted; a mean
        of none is NaN.
        """
        count, total = self.count, self.count.sum()
        scaled = self.observation / self.difference_std.square()
        reward = self.reward / self.reward_std.square()
        return {
            "observation": scaled.mean(dim=-1) / count, "raw_observation": self.observation.mean(dim=-1) / count,
            "by_dimension": scaled.sum(dim=0) / total, "mean_observation": scaled.mean(dim=-1).sum() / total,
            "mean_raw_observation": self.observation.mean(dim=-1).sum() / total,
            "reward": reward / count, "raw_reward": self.reward / count, "mean_reward": reward.sum() / total,
            "termination": self.termination / count, "mean_termination": self.termination.sum() / total,
            "count": count,
        }  # fmt: skip


class _Rows(Metric):
    """Keeps the rows to compare, and the reference's mean and standard deviation.

    Args:
        reference: Rows to compare with, shape (N, D).
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, reference: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.normalizer = Normalizer(reference.shape[-1])
        self.normalizer.fit(reference)
        self.reference = self.normalizer(reference)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, rows: Tensor) -> None:
        """Adds rows, shape (M, D)."""
        self.rows.append(self.normalizer(rows))


class Novelty(_Rows):
    """Distances to the nearest reference row, Euclidean, in standard deviations of the reference's columns."""

    def compute(self) -> dict[str, Tensor]:
        """Their ``mean``, ``median`` and ``quantile_95``, and the fraction of ``copies``, at no distance."""
        parts = dim_zero_cat(self.rows).split(QUERIES)
        # by differences and not by products, whose rounding would keep equal rows apart
        exact = "donot_use_mm_for_euclid_dist"
        nearest = torch.cat([torch.cdist(part, self.reference, compute_mode=exact).amin(dim=-1) for part in parts])
        return {
            "mean": nearest.mean(), "median": nearest.median(), "quantile_95": nearest.quantile(0.95),
            "copies": (nearest < 1e-4).double().mean(),
        }  # fmt: skip


class ColumnDistances(_Rows):
    """How far the distribution of rows is from the reference's: each column alone, and columns in pairs."""

    def compute(self) -> dict[str, Tensor]:
        """The Wasserstein-1 distance of each column, ``marginal``, shape (D,), and ``correlation``, shape ().

        Columns that do not vary in the reference have no correlations; one that varies there and not here has 0.
        """
        rows = dim_zero_cat(self.rows)
        levels = torch.linspace(0, 1, QUANTILES)
        marginal = (_quantiles(rows, levels) - _quantiles(self.reference, levels)).abs().mean(dim=0)
        varying = self.reference.std(dim=0, correction=0) > 0.5  # 1, or 0 where there is but one value
        difference = (_correlations(rows[:, varying]) - _correlations(self.reference[:, varying])).abs()
        above = torch.ones_like(difference).triu(diagonal=1).bool()
        return {"marginal": marginal, "correlation": difference[above].mean()}


class ReturnResponse(Metric):
    """What comes of the return-to-go that is asked for: a line through the returns obtained, by least squares."""

    full_state_update = False
    asked: list[Tensor]
    obtained: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("asked", "obtained"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, asked: Tensor, obtained: Tensor) -> None:
        """Adds pairs of a return-to-go asked for and a return obtained, each of shape (M,)."""
        self.asked.append(asked.double())
        self.obtained.append(obtained.double())

    def compute(self) -> dict[str, Tensor]:
        """Means of both, ``slope`` and Pearson's ``correlation``; these are NaN where all asked for the same."""
        asked, obtained = dim_zero_cat(self.asked), dim_zero_cat(self.obtained)
        x, y = asked - asked.mean(), obtained - obtained.mean()
        covariance, variance = (x * y).mean(), x.square().mean()
        slope = torch.where(variance > 1e-12 * asked.square().mean(), covariance / variance, torch.nan)
        return {
            "asked": asked.mean(), "obtained": obtained.mean(), "slope": slope,
            "correlation": slope * (variance / y.square().mean()).sqrt(),
        }  # fmt: skip


def _quantiles(rows: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of each column, shape (Q, D), by linear interpolation; torch.quantile refuses large inputs."""
    ordered, places = rows.sort(dim=0).values, levels * (len(rows) - 1)
    below = places.floor().long()
    return ordered[below].lerp(ordered[(below + 1).clamp(max=len(rows) - 1)], (places - below).unsqueeze(-1))


def _correlations(rows: Tensor) -> Tensor:
    """Correlations of all pairs of columns, shape (D, D); 0 with a column of one value."""
    return torch.corrcoef(rows.double().T).nan_to_num(0.0)
