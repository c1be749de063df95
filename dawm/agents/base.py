"""OfflineAgent: what the experiment asks of an agent, and what every agent shares.

Symbols: B batch, N rows, E episodes, O observation size, A action size.

To write an agent, subclass `OfflineAgent`: build networks and optimisers in the constructor, call
``self.save_hyperparameters()`` there, and write ``update``, ``act`` and ``optimizers_in_order``. A config then selects
it by its class path.
"""

import copy
from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from dawm.agents.losses import cosine_decay
from dawm.data.transitions import Transitions
from dawm.normalizer import Normalizer
from dawm.updates import UpdateModule

__all__ = ["OfflineAgent"]

EPISODE_RETURN_RANGE = 1000.0  # IQL's locomotion rewards: returns of the data's episodes span this much after scaling


class OfflineAgent(UpdateModule):
    """Learns a policy by one-step TD from batches of transitions.

    Batches and observations come in the data's own units; `prepare` normalises a batch, once per update.

    Args:
        observation_size: O.
        action_size: A.
        normalize_observations: Standardise observations by the real data's mean and standard deviation.
        normalize_rewards: Scale rewards so that the returns of the data's episodes span 1000.
        reward_shift: Added to every reward after scaling (IQL on AntMaze: -1).
    """

    name = "agent"
    reward_scale: Tensor

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        normalize_observations: bool = True,
        normalize_rewards: bool = False,
        reward_shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.observation_size = observation_size
        self.action_size = action_size
        self.normalize_observations = normalize_observations
        self.normalize_rewards = normalize_rewards
        self.reward_shift = reward_shift
        self.observation_normalizer = Normalizer(observation_size)
        self.register_buffer("reward_scale", torch.ones(()))

    def fit_normalizers(self, transitions: Transitions, episode_returns: Tensor | None = None) -> None:
        """Takes the normalisers' statistics from the real data; called once, before training.

        Args:
            transitions: Real transitions, fields of shape (N, ...).
            episode_returns: Undiscounted return of each real episode, shape (E,); needed with ``normalize_rewards``.
        """
        if self.normalize_observations:
            self.observation_normalizer.fit(transitions.observations)
        if self.normalize_rewards:
            if episode_returns is None:
                raise ValueError("normalize_rewards needs the returns of the data's episodes")
            span = episode_returns.max() - episode_returns.min()
            # episodes that all return the same say nothing about the scale
            self.reward_scale.fill_(EPISODE_RETURN_RANGE / span if span > 0 else 1.0)

    def prepare(self, batch: Transitions) -> Transitions:
        """The batch as the networks see it: normalised observations, scaled rewards.

        Args:
            batch: Transitions in the data's units, fields of shape (B, ...).
        """
        return replace(
            batch,
            observations=self.observation_normalizer(batch.observations),
            rewards=batch.rewards * self.reward_scale + self.reward_shift,
            next_observations=self.observation_normalizer(batch.next_observations),
        )

    @abstractmethod
    def update(self, batch: Transitions) -> dict[str, Tensor]:
        """One update of the critics, and of the actor where it is due.

        Args:
            batch: Transitions in the data's units, fields of shape (B, ...).

        Returns:
            Metrics as detached scalars, logged under ``agent/<key>``.
        """

    @abstractmethod
    def act(self, observations: Tensor, deterministic: bool = True) -> Tensor:
        """Actions of the policy, without gradient, in [-1, 1], shape (B, A).

        Args:
            observations: Observations in the data's units, shape (B, O).
            deterministic: The policy's mean, or a draw from it.
        """

    def decayed(self, learning_rate: float) -> float:
        """A learning rate that falls to 0 along a cosine over the run; constant where no trainer sets a length.

        Args:
            learning_rate: Its value at the first update.
        """
        total = self._trainer.max_steps if self._trainer is not None else -1
        return learning_rate * cosine_decay(self.update_index, total) if total > 0 else learning_rate

    @staticmethod
    def target_of(network: nn.Module) -> nn.Module:
        """A copy of a network that follows it by `move_target` and never learns by gradient.

        Args:
            network: The network to copy.
        """
        return copy.deepcopy(network).requires_grad_(False)

    @staticmethod
    @torch.no_grad()
    def move_target(target: nn.Module, network: nn.Module, tau: float) -> None:
        """Moves a target network's weights towards the network's: ``target += tau (network - target)``.

        Args:
            target: The target network.
            network: The network that it follows.
            tau: Share of the way, in (0, 1].
        """
        # all tensors in one call (torch's own moving average, swa_utils, calls the same function)
        torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), tau)
