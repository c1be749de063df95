"""Returns-to-go that go on after a truncated end, by an estimate of what it is worth.

Near a time limit a sum of recorded rewards says that the future is poor, where only the recording ends. The value
there, ``V(s_end)``, is the return-to-go that a ridge regression on observations expects. It learns from the rows whose
own return-to-go is all but complete: those of episodes that terminated, and those so far from a truncated end that less
than a hundredth of the discounted future is missing.

Symbols: N rows, E episodes, O observation size, gamma the discount.
"""

import math

import torch
from torch import Tensor

from dawm.data.episodes import Episodes
from dawm.data.weights import linear_regression

__all__ = ["bootstrapped_returns_to_go", "can_bootstrap", "end_values"]

MISSING = 0.01  # fraction of the discounted future


def can_bootstrap(discount: float, window: int | None) -> bool:
    """Whether there is a value to add: it is finite, and the return-to-go reaches that far."""
    return window is None and 0 < discount < 1


def bootstrapped_returns_to_go(
    episodes: Episodes, discount: float, window: int | None = None, bootstrap: bool | None = None
) -> Tensor:
    """Return-to-go of every row, shape (N,), with the values of truncated ends; False leaves them out."""
    returns = episodes.returns_to_go(discount, window)
    if bootstrap is False or not can_bootstrap(discount, window) or not bool(episodes.truncated.any()):
        return returns
    return episodes.returns_to_go(discount, window, end_values(episodes, returns, discount))


def end_values(episodes: Episodes, returns_to_go: Tensor, discount: float) -> Tensor:
    """Value at the end of each episode, 0 where it terminated, shape (E,), float64.

    Predictions stay in the range of the returns-to-go learnt from. Where there are none, the value is that of the
    data's mean reward for ever, ``mean r / (1 - gamma)``.

    Args:
        episodes: The real data.
        returns_to_go: Sums of the recorded rewards alone, shape (N,).
        discount: Gamma, between 0 and 1.
    """
    rows, truncated = episodes.sample_rows(), episodes.truncated
    which = torch.searchsorted(episodes.ends, rows, right=True)
    left = episodes.ends[which] - rows
    rows = rows[~truncated[which] | (left >= math.log(MISSING) / math.log(discount))]
    values, ends = torch.zeros(len(truncated), dtype=torch.float64), episodes.ends[truncated] - 1
    if len(rows) == 0:
        rewards = episodes.transitions.rewards[episodes.sample_rows()]
        values[truncated] = rewards.double().mean() / (1 - discount)
        return values
    known, transitions = returns_to_go[rows].double(), episodes.transitions
    predicted = linear_regression(transitions.observations, known, transitions.next_observations[ends], rows)
    values[truncated] = predicted.clamp(known.min(), known.max())
    return values
