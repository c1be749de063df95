"""OfflineAgent: what the experiment asks of an agent, and what every agent shares.

Symbols: S seeds, B batch, N rows, E episodes, O observation size, A action size, ... nothing, or the S seeds.

To write an agent, subclass `OfflineAgent`: build networks and optimisers in the constructor, call
``self.save_hyperparameters()`` there, and write ``update``, ``act`` and ``configure_optimizers``. A config then selects
it by its class path.

An agent may train several seeds at once, as members of the same networks: it takes ``seeds`` in its constructor, hands
it on, builds its networks by `mlp`, and counts dimensions from the last. With one seed all is as if there were no
seeds; with S of them every batch, action and loss has S in front.
"""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dawm.data.batches import BatchLoader
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Transitions
from dawm.errors import require
from dawm.nn.mlp import BatchedMLP
from dawm.nn.normalizer import Normalizer
from dawm.training.updates import UpdateModule

__all__ = ["OfflineAgent"]

EPISODE_RETURN_RANGE = 1000.0  # IQL's locomotion rewards: returns of the data's episodes span this much after scaling


class OfflineAgent(UpdateModule):
    """Learns a policy by one-step TD from batches of transitions.

    Batches and observations come in the data's own units; `prepare` normalises a batch, once per update.

    Args:
        seeds: Independent agents trained side by side S.
        normalize_observations: Standardise observations by the real data's mean and standard deviation.
        normalize_rewards: Scale rewards so that the returns of the data's episodes span 1000.
        reward_shift: Added to every reward after scaling (IQL on AntMaze: -1).
    """

    name = "agent"
    needs_real_rows = False
    """Whether a loss is taken over the real rows of a batch alone."""
    reward_scale: Tensor

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        seeds: int = 1,
        normalize_observations: bool = True,
        normalize_rewards: bool = False,
        reward_shift: float = 0.0,
    ) -> None:
        super().__init__()
        require("seeds", seeds, seeds >= 1, "at least 1")
        self.seeds = seeds
        self.seed_shape = () if seeds == 1 else (seeds,)
        self.observation_size, self.action_size = observation_size, action_size
        self.normalize_observations = normalize_observations
        self.normalize_rewards = normalize_rewards
        self.reward_shift = reward_shift
        self.observation_normalizer = Normalizer(observation_size)
        self.register_buffer("reward_scale", torch.ones(()))

    def fit_normalizers(self, data: TransitionDataModule) -> None:
        """Takes the normalizers' statistics from the real data; called once, before training."""
        episodes = data.episodes
        if self.normalize_observations:
            self.observation_normalizer.fit(episodes.transitions[episodes.sample_rows()].observations)
        self.observation_normalizer.fitted = True
        if self.normalize_rewards:
            span = episodes.episode_returns.max() - episodes.episode_returns.min()
            # episodes that all return the same say nothing about the scale
            self.reward_scale.fill_(EPISODE_RETURN_RANGE / span if span > 0 else 1.0)

    def train_loader(self, data: TransitionDataModule, updates: int, rank: int) -> BatchLoader:
        """The mixture of real and synthetic transitions."""
        synthetic = round(data.batch_size * data.synthetic_fraction)
        holds = not self.needs_real_rows or synthetic < data.batch_size
        expected = "one that leaves real rows in a batch, as the agent's settings take a loss over these alone"
        require("data.synthetic_fraction", data.synthetic_fraction, holds, expected, "lower it")
        return data.mixed_loader(updates, rank, seeds=self.seeds)

    def prepare(self, batch: Transitions) -> Transitions:
        """The batch as the networks see it: normalised observations, scaled rewards."""
        return replace(
            batch,
            observations=self.observation_normalizer(batch.observations),
            rewards=batch.rewards * self.reward_scale + self.reward_shift,
            next_observations=self.observation_normalizer(batch.next_observations),
        )

    @abstractmethod
    def update(self, batch: Transitions) -> dict[str, Tensor]:
        """One update of the critics, and of the actor where it is due, on transitions in the data's units.

        Their fields have the shape (B, ...), of S seeds (S, B, ...); returned are metrics without gradient, of any
        shape, whose mean is logged under ``agent/<key>``.
        """

    @abstractmethod
    def act(self, observations: Tensor, deterministic: bool = True) -> Tensor:
        """Actions of the policy, in [-1, 1] and without gradient: its mean, or a draw from it.

        From observations in the data's units, (B, O) -> (B, A); of S seeds (S, B, A).
        """

    def mlp(
        self, in_size: int, hidden: Sequence[int], out_size: int, ensemble: int | None = None, **options: Any
    ) -> BatchedMLP:
        """A `BatchedMLP` for each seed, (..., B, in) -> (..., B, out); with its further settings as ``options``.

        With an ``ensemble`` of, say, 2 critics for each seed, outputs have the shape (..., ensemble, B, out).
        """
        shape = self.seed_shape if ensemble is None else (*self.seed_shape, ensemble)
        return BatchedMLP(shape, in_size, hidden, out_size, **options)

    @staticmethod
    def target_network(network: nn.Module) -> nn.Module:
        """A copy of a network that follows it by `soft_update` and never learns by gradient."""
        return copy.deepcopy(network).requires_grad_(False)

    @staticmethod
    @torch.no_grad()
    def soft_update(target: nn.Module, network: nn.Module, tau: float) -> None:
        """Soft update of a target network (Polyak averaging): ``target += tau (network - target)``."""
        # all tensors in one call (torch's own moving average, swa_utils, calls the same function)
        torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), tau)
