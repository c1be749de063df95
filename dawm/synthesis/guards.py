"""Guards against imagined rows that would poison training: ranges to stay in, and drifts from the data to watch.

Symbols: B rollouts, H horizon, N real rows, O observation size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dawm.data.episodes import Episodes
from dawm.nn.normalizer import Normalizer

__all__ = ["Bounds", "RealRows", "observation_bounds"]

BLOCK = 1 << 20  # rewards looked through at once: those of a large data set stand in a mapped file


class Bounds(NamedTuple):
    """The range that imagined rows have to stay in, ends included.

    Args:
        observations: Lowest and highest observation, each shape (O,).
        rewards: Lowest and highest reward, each shape ().
    """

    observations: tuple[Tensor, Tensor]
    rewards: tuple[Tensor, Tensor]

    def to(self, device: torch.device | str) -> "Bounds":
        """The same bounds on another device."""
        return Bounds(*((low.to(device), high.to(device)) for low, high in self))

    def contain(self, observations: Tensor, rewards: Tensor) -> Tensor:
        """Whether each row is in range, shape (B, H).

        Args:
            observations: Imagined ``s_{t+1}``, shape (B, H, O).
            rewards: Imagined ``r_t``, shape (B, H).
        """
        (low, high), (lowest, highest) = self.observations, self.rewards
        observed = ((observations >= low) & (observations <= high)).all(dim=-1)
        return observed & (rewards >= lowest) & (rewards <= highest)


class RealRows(NamedTuple):
    """What rewards and terminations of the recorded rows are like, to hold imagined ones against.

    Args:
        lowest_reward: Lowest reward of any row, shape ().
        highest_reward: Highest reward of any row, shape ().
        mean_reward: Mean over the rows.
        reward_deviation: Standard deviation over the rows; 1 if the reward is always the same.
        termination_rate: Terminations per row.
    """

    lowest_reward: Tensor
    highest_reward: Tensor
    mean_reward: float
    reward_deviation: float
    termination_rate: float

    @classmethod
    def of(cls, episodes: Episodes) -> "RealRows":
        """Reads them from the data.

        Args:
            episodes: The real data.
        """
        rewards = episodes.transitions.rewards
        # of all rows, not of a sample: where rewards are sparse, the few that count would be missed
        extremes = torch.stack([torch.stack(block.aminmax()) for block in rewards.split(BLOCK)])
        normalizer = Normalizer(1)
        normalizer.fit(rewards[episodes.sample_rows()].unsqueeze(-1))
        return cls(
            lowest_reward=extremes[:, 0].min(),
            highest_reward=extremes[:, 1].max(),
            mean_reward=normalizer.mean.item(),
            reward_deviation=normalizer.std.item(),
            termination_rate=episodes.terminated.sum().item() / len(episodes),
        )

    def bounds(self, episodes: Episodes, margin: float) -> Bounds:
        """The range of observations and rewards to accept.

        Args:
            episodes: The real data that these rows are of.
            margin: How far outside their range is still accepted, as a share of the range.
        """
        observed = observation_bounds(episodes.observation_low, episodes.observation_high, margin)
        return Bounds(observed, self.reward_bounds(margin))

    def reward_bounds(self, margin: float) -> tuple[Tensor, Tensor]:
        """Lowest and highest reward to accept, each shape ().

        Args:
            margin: How far outside their range is still accepted, as a share of the range.
        """
        return _widened(self.lowest_reward, self.highest_reward, margin)

    def reward_drift(self, rewards: Tensor) -> float:
        """Mean imagined reward minus the data's, in standard deviations of the data's rewards.

        Args:
            rewards: Imagined rewards, shape (M,).
        """
        return (rewards.mean().item() - self.mean_reward) / self.reward_deviation

    def termination_drift(self, terminations: Tensor) -> float:
        """Imagined terminations per row minus the data's.

        Args:
            terminations: 1 where the task is imagined to end, shape (M,).
        """
        return terminations.mean().item() - self.termination_rate


def observation_bounds(low: Tensor, high: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest observation to accept, each shape (O,).

    Args:
        low: Lowest real observation of each dimension, shape (O,).
        high: Highest real observation of each dimension, shape (O,).
        margin: How far outside their range is still accepted, as a share of the range.
    """
    return _widened(low, high, margin)


def _widened(low: Tensor, high: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    extent = high - low
    # What does not vary has no range to take a share of, and no model meets it to the last bit. It counts as having a
    # range of 1: the normalisers, too, take it in its own units.
    constant = extent <= 1e-6 * torch.maximum(low.abs(), high.abs()).clamp(min=1e-6)
    slack = margin * torch.where(constant, torch.ones_like(extent), extent)
    return low - slack, high + slack
