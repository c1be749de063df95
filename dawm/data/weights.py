"""Row weights: how often each recorded row is drawn.

Symbols: N rows, E episodes, O observation size; ``G`` the return of an episode, undiscounted, ``s_0`` its first
observation.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dawm.data.episodes import Episodes
from dawm.errors import require

__all__ = ["AdvantageWeights", "RowWeights", "TopShare", "checked", "linear_regression"]

BLOCK = 1 << 16  # rows held in double precision at once


class RowWeights(ABC):
    """Says how often each recorded row is drawn."""

    @abstractmethod
    def __call__(self, episodes: Episodes) -> Tensor:
        """Weights of all rows, at least 0 and with a mean of 1, shape (N,), float64."""


class AdvantageWeights(RowWeights):
    """Rows of better episodes more often (AW; Hong et al. 2023, arXiv 2306.13085).

    An episode's advantage is its return minus a linear baseline in its first observation, ``A = G - V(s_0)``. Each of
    its rows has the weight ``exp(A / temperature)``, with ``A`` scaled to [0, 1] over the episodes.

    Args:
        temperature: Above 0; the best episode's rows are drawn ``exp(1 / temperature)`` times as often as the worst's.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        require("AdvantageWeights.temperature", temperature, temperature > 0, "a number above 0")
        self.temperature = temperature

    def __call__(self, episodes: Episodes) -> Tensor:
        """The weights, shape (N,)."""
        returns = episodes.episode_returns.double()
        firsts = episodes.transitions.observations[episodes.starts]
        advantages = returns - linear_regression(firsts, returns, firsts)
        extent = float(advantages.max() - advantages.min()) or 1.0  # 0 where all are the same
        return _over_rows(((advantages - advantages.max()) / (extent * self.temperature)).exp(), episodes.lengths)


class TopShare(RowWeights):
    """The rows of the best episodes alone, all alike.

    Args:
        share: In (0, 1]; the best episodes by return that together have at least this fraction of the rows.
    """

    def __init__(self, share: float = 0.1) -> None:
        require("TopShare.share", share, 0 < share <= 1, "above 0 and at most 1")
        self.share = share

    def __call__(self, episodes: Episodes) -> Tensor:
        """The weights, shape (N,)."""
        order = episodes.episode_returns.argsort(descending=True, stable=True)
        lengths = episodes.lengths[order]
        chosen = torch.zeros(len(order), dtype=torch.float64)
        chosen[order[lengths.cumsum(0) - lengths < self.share * len(episodes)]] = 1.0
        return _over_rows(chosen, episodes.lengths)


def checked(weights: Tensor, rows: int, key: str = "data.real_weights") -> Tensor:
    """The weights, shape (N,); a UserError where so many rows cannot be drawn by them."""
    holds = weights.shape == (rows,) and bool((weights >= 0).all()) and 0 < float(weights.sum()) < torch.inf
    expected = f"a finite weight of at least 0 for each of {rows} rows, not all of them 0"
    require(key, tuple(weights.shape), holds, expected, "correct what the class returns")
    return weights.double()


def linear_regression(observations: Tensor, returns: Tensor, asked: Tensor, rows: Tensor | None = None) -> Tensor:
    """Ridge regression with intercept of returns, shape (E,), on observations, (E, O): what it predicts for others.

    Or on the ``rows``, shape (E,), of more observations. They are standardised, and the penalty is O: nothing beside
    many episodes, while few are not fitted exactly, as plain least squares would, which leaves advantages of rounding
    errors alone. Sums are taken block by block, in double precision.
    """
    rows = torch.arange(len(observations)) if rows is None else rows
    blocks, returns = rows.split(BLOCK), returns.double()
    mean = torch.stack([observations[block].double().sum(dim=0) for block in blocks]).sum(dim=0) / len(rows)
    size, centre = observations.shape[1], returns.mean()
    products, towards = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for block, targets in zip(blocks, returns.split(BLOCK)):
        inputs = observations[block].double() - mean
        products += inputs.T @ inputs
        towards += inputs.T @ (targets - centre)
    std = (products.diagonal() / len(rows)).sqrt()
    scale = torch.where(std > 1e-9 * mean.abs(), std, torch.inf)  # one that does not vary says nothing
    covariance = products / scale / scale.unsqueeze(-1) + size * torch.eye(size, dtype=torch.float64)
    return centre + (asked.double() - mean) / scale @ torch.linalg.solve(covariance, towards / scale)


def _over_rows(weights: Tensor, lengths: Tensor) -> Tensor:
    """Weights of episodes, shape (E,), given to each of their rows, shape (N,), with a mean of 1."""
    mean = (weights * lengths).sum() / lengths.sum()
    return (weights / mean).repeat_interleave(lengths)
