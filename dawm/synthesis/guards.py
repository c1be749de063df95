"""Guards against imagined steps that would poison training: the range to stay in, and drifts from the data to watch.

Symbols: B rollouts, H horizon, M imagined steps, O observation size.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dawm.data.episodes import Episodes
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Transitions
from dawm.nn.normalizer import Normalizer
from dawm.world_model import DiffusionWorldModel

__all__ = ["Bounds", "DataStatistics", "Watch", "forward_quantiles", "list_fates"]


class Bounds(NamedTuple):
    """The range that imagined steps have to stay in, ends included."""

    observations: tuple[Tensor, Tensor]  # lowest and highest, each shape (O,)
    rewards: tuple[Tensor, Tensor]  # lowest and highest, each shape ()

    def contain(self, observations: Tensor, rewards: Tensor) -> Tensor:
        """Whether each step, of ``s_{t+1}``, shape (B, H, O), and ``r_t``, shape (B, H), is in range, shape (B, H)."""
        (low, high), (lowest, highest) = ((least.to(rewards.device), most.to(rewards.device)) for least, most in self)
        observed = ((observations >= low) & (observations <= high)).all(dim=-1)
        return observed & (rewards >= lowest) & (rewards <= highest)


class DataStatistics(NamedTuple):
    """What the recorded data are like, to compare imagined steps with."""

    observation_range: tuple[Tensor, Tensor]  # lowest and highest, each shape (O,)
    reward_range: tuple[Tensor, Tensor]  # lowest and highest of all rows, each shape ()
    mean_reward: float
    reward_deviation: float  # standard deviation; 1 if the reward is always the same
    termination_rate: float  # terminations per row
    deviation_within: float  # standard deviation of rewards from their episode's mean; 1 if they do not deviate

    @classmethod
    def of(cls, episodes: Episodes) -> "DataStatistics":
        """Reads them from the real data."""
        low, high = (Transitions.unpack(bound, *episodes.sizes) for bound in (episodes.low, episodes.high))
        rows = episodes.sample_rows()
        rewards = episodes.transitions.rewards[rows]
        of_episodes = (episodes.episode_returns / episodes.lengths)[torch.searchsorted(episodes.ends, rows, right=True)]
        mean, deviation = _mean_and_deviation(rewards)
        return cls(
            # where tasks end, s_{t+1} lies where no s_t does
            observation_range=(
                torch.minimum(low.observations, low.next_observations),
                torch.maximum(high.observations, high.next_observations),
            ),
            reward_range=(low.rewards, high.rewards),
            mean_reward=mean,
            reward_deviation=deviation,
            termination_rate=episodes.terminated.sum().item() / len(episodes),
            deviation_within=_mean_and_deviation(mean + rewards - of_episodes)[1],  # mean: what is rounding is relative
        )

    def bounds(self, margin: float) -> Bounds:
        """The range to accept: the data's, and a margin on both sides as a fraction of it."""
        return Bounds(_widened(*self.observation_range, margin), _widened(*self.reward_range, margin))


def _mean_and_deviation(values: Tensor) -> tuple[float, float]:
    normalizer = Normalizer(1)
    normalizer.fit(values.unsqueeze(-1))
    return normalizer.mean.item(), normalizer.std.item()


def _widened(low: Tensor, high: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    extent = high - low
    # What does not vary has no range to take a fraction of, and no model meets it to the last bit. It counts as having
    # a range of 1: the normalisers, too, take it in its own units.
    constant = extent <= 1e-6 * torch.maximum(low.abs(), high.abs()).clamp(min=1e-6)
    slack = margin * torch.where(constant, torch.ones_like(extent), extent)
    return low - slack, high + slack


@torch.no_grad()
def forward_quantiles(
    model: DiffusionWorldModel, data: TransitionDataModule, inconsistency: float | None, *disagreements: float | None
) -> tuple[float | None, ...]:
    """What held-out real transitions reach against the forward models, to hold imagined ones against.

    Quantiles, in (0, 1], of their inconsistency and of the forward models' disagreement on them; of None it is None.
    """
    if inconsistency is None and not any(disagreements):
        return None, *disagreements
    forward_model, codec = model.forward_model, model.codec
    assert forward_model is not None
    reached = []
    for batch in data.validation_transition_loader():
        held_out = batch.to(model.device)
        predicted = forward_model.predict(codec, held_out.observations, held_out.actions)
        distance = forward_model.inconsistency(codec, predicted, held_out.next_observations)
        reached.append(torch.stack([distance, predicted.disagreement]))
    distances, disagreed = torch.cat(reached, dim=1)
    wanted = (distances, inconsistency), *((disagreed, quantile) for quantile in disagreements)
    return tuple(None if quantile is None else float(values.quantile(quantile)) for values, quantile in wanted)


class Watch:
    """Compares imagined transitions with the data, and warns where they drift from them beyond a limit.

    Each limit warns once: the models stay as they are, so the next transitions will be no different.

    Args:
        data: What the data are like.
        limits: ``max_rejected``, ``max_reward_drift`` and ``max_termination_drift``.
        key: The group of settings that holds the limits, for messages.
    """

    def __init__(self, data: DataStatistics, limits: Mapping[str, float], key: str) -> None:
        self.data, self.limits, self.key = data, dict(limits), key

    def measure(self, transitions: Transitions, counts: Counter[str]) -> dict[str, float]:
        """What the M transitions kept are like, given all steps by fate as in `Rollouts`; warns if need be."""
        mean, rate = transitions.rewards.mean().item(), transitions.terminations.mean().item()
        rejected = 1 - counts["kept"] / (counts.total() - counts["after_end"])
        usual, usual_rate = self.data.mean_reward, self.data.termination_rate
        drift, rate_drift = (mean - usual) / self.data.reward_deviation, rate - usual_rate
        self._warn("max_rejected", rejected, f"{rejected:.1%} of the imagined steps dropped ({list_fates(counts)})")
        found = f"a mean imagined reward of {mean:.4g}, {abs(drift):.3g} standard deviations"
        self._warn("max_reward_drift", abs(drift), f"{found} from the data's {usual:.4g}")
        found = f"{rate:.3g} of the imagined steps ending in a termination, {abs(rate_drift):.3g}"
        self._warn("max_termination_drift", abs(rate_drift), f"{found} from the data's {usual_rate:.3g}")
        return {"rejected_fraction": rejected, "mean_reward": mean, "reward_drift": drift, "termination_rate": rate,
                "termination_drift": rate_drift}  # fmt: skip

    def _warn(self, name: str, value: float, finding: str) -> None:
        if value > self.limits.get(name, float("inf")):
            limit = self.limits.pop(name)
            rank_zero_warn(
                f"--{self.key}.{name}: got {finding}, expected at most {limit:g}; train the world model longer with "
                "--stages.world_model.max_steps, or raise the limit if this is wanted"
            )


def list_fates(counts: Counter[str]) -> str:
    """Counts of imagined steps by fate as words, without those that are 0."""
    return ", ".join(f"{fate} {count:,}" for fate, count in counts.items() if count)
