"""Codecs: from recorded segments to the ``x`` that diffusion generates, and from a generated ``x`` to a future.

Step k of the H steps of ``x`` holds the observation ``s_{t+k+1}`` as the codec's class says, the normalised reward
``r_{t+k}``, and +1 if the task has ended at or before ``s_{t+k+1}``, else -1: D = O + 2 features. Joint codecs put more
before these.

Symbols: B batch, H horizon, O observation size, A action size, D features, C condition size.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dawm.data.transitions import Segments, Transitions
from dawm.nn.normalizer import Normalizer

__all__ = ["Absolute", "Codec", "Differences", "Imagined", "InpaintedAbsolute", "JointDifferences", "JointSegments"]


class Imagined(NamedTuple):
    """Imagined futures."""

    observations: Tensor  # s_t (as given) and s_{t+1} .. s_{t+H}, shape (B, H + 1, O)
    rewards: Tensor  # r_t .. r_{t+H-1}, shape (B, H)
    terminations: Tensor  # how far the task is believed to have ended at each step, around 0 or 1, shape (B, H)
    actions: Tensor | None = None  # a_t .. a_{t+H-1} in [-1, 1], shape (B, H, A); None leaves them to be inferred


class Codec(nn.Module, ABC):
    """Encodes segments and decodes futures, by the normalizers it owns; a subclass says how observations are held."""

    known_steps = 0  # K, the steps that are inpainted before the H imagined ones

    def __init__(self, observation_size: int, action_size: int) -> None:
        super().__init__()
        self.features = observation_size + 2
        self.condition_size = observation_size + action_size + 2
        self.observation_normalizer = Normalizer(observation_size)
        self.difference_normalizer = Normalizer(observation_size)
        self.reward_normalizer = Normalizer(1)
        self.return_normalizer = Normalizer(1)

    def fit(self, transitions: Transitions, returns_to_go: Tensor) -> None:
        """Takes the normalizers' statistics from N real transitions and their returns-to-go, shape (N,)."""
        self.observation_normalizer.fit(transitions.observations)
        self.difference_normalizer.fit(transitions.next_observations - transitions.observations)
        self.reward_normalizer.fit(transitions.rewards.unsqueeze(-1))
        self.return_normalizer.fit(returns_to_go.unsqueeze(-1))

    @abstractmethod
    def encode_observations(self, observations: Tensor) -> Tensor:
        """The observations' part of ``x`` from ``s_t .. s_{t+H}``, (B, H + 1, O) -> (B, H, O)."""

    @abstractmethod
    def decode_observations(self, start: Tensor, encoded: Tensor) -> Tensor:
        """``s_{t+1} .. s_{t+H}`` from ``s_t``, shape (B, O), and that part of ``x``, (B, H, O) -> (B, H, O)."""

    def known(self, start: Tensor) -> Tensor | None:
        """The known steps of ``x`` from ``s_t``, (B, O) -> (B, K, D); None for none."""
        return None

    def encode(self, segments: Segments) -> Tensor:
        """``x`` of recorded segments, shape (B, H, D)."""
        observations = self.encode_observations(segments.observations)
        rewards = self.reward_normalizer(segments.rewards.unsqueeze(-1))
        return torch.cat([observations, rewards, 2 * segments.terminations.unsqueeze(-1) - 1], dim=-1)

    def recorded(self, observed: Tensor) -> Tensor:
        """1 for the entries of ``x`` that were recorded, else 0, from `Segments.observed`, (B, H) -> (B, H, D)."""
        mask = observed.unsqueeze(-1).repeat(1, 1, self.features)
        size = len(self.observation_normalizer.mean)
        mask[..., : -2 - size], mask[..., -2:] = 1, 1  # all but the observation where the step leads
        return mask

    def decode(self, start: Tensor, action: Tensor, x: Tensor) -> Imagined:
        """The futures that start with ``s_t``, (B, O), and ``a_t``, (B, A), and hold the steps ``x``, (B, H, D)."""
        observations = self.decode_observations(start, x[..., :-2])
        rewards = self.reward_normalizer.inverse(x[..., -2:-1]).squeeze(-1)
        return Imagined(torch.cat([start.unsqueeze(1), observations], dim=1), rewards, (x[..., -1] + 1) / 2)

    def condition(self, start: Tensor, actions: Tensor, returns_to_go: Tensor, keep: Tensor) -> Tensor:
        """What a future depends on, shape (B, C), from ``s_t``, ``a_t`` in [-1, 1] and ``g_t``, shape (B,).

        ``keep``, shape (B,), is 0 where the return is hidden, else 1.
        """
        keep = keep.unsqueeze(-1)
        returns = self.return_normalizer(returns_to_go.unsqueeze(-1)) * keep
        return torch.cat([self.observation_normalizer(start), actions, returns, keep], dim=-1)


class Differences(Codec):
    """Step k holds the normalised difference ``s_{t+k+1} - s_{t+k}``."""

    def encode_observations(self, observations: Tensor) -> Tensor:
        """Normalised differences, shape (B, H, O)."""
        return self.difference_normalizer(observations[:, 1:] - observations[:, :-1])

    def decode_observations(self, start: Tensor, encoded: Tensor) -> Tensor:
        """Sums of the differences from the start on, shape (B, H, O)."""
        return start.unsqueeze(1) + self.difference_normalizer.inverse(encoded).cumsum(dim=1)


class Absolute(Codec):
    """Step k holds the normalised observation ``s_{t+k+1}``."""

    def encode_observations(self, observations: Tensor) -> Tensor:
        """Normalised observations, shape (B, H, O)."""
        return self.observation_normalizer(observations[:, 1:])

    def decode_observations(self, start: Tensor, encoded: Tensor) -> Tensor:
        """The observations in the data's units, shape (B, H, O)."""
        return self.observation_normalizer.inverse(encoded)


class InpaintedAbsolute(Absolute):
    """Like `Absolute`, with ``s_t`` as a known step before the imagined ones, as in DWM; the condition holds it too."""

    known_steps = 1

    def known(self, start: Tensor) -> Tensor:
        """The step of ``s_t``, with reward 0 and no termination, shape (B, 1, D)."""
        x = functional.pad(self.observation_normalizer(start), (0, 2))
        x[:, -1] = -1
        return x.unsqueeze(1)


class JointDifferences(Differences):
    """Like `Differences`, with step k's own action ``a_{t+k}`` before it: D = A + O + 2. No action is inferred then.

    It is how DAWM compares with the joint models that it argues against: all else is the same.
    """

    def __init__(self, observation_size: int, action_size: int) -> None:
        super().__init__(observation_size, action_size)
        self.action_size = action_size
        self.features += action_size
        self.action_normalizer = Normalizer(action_size)

    def fit(self, transitions: Transitions, returns_to_go: Tensor) -> None:
        """Takes the actions' statistics too."""
        super().fit(transitions, returns_to_go)
        self.action_normalizer.fit(transitions.actions)

    def encode(self, segments: Segments) -> Tensor:
        """``x`` of recorded segments, shape (B, H, D)."""
        return torch.cat([self.action_normalizer(segments.actions), super().encode(segments)], dim=-1)

    def decode(self, start: Tensor, action: Tensor, x: Tensor) -> Imagined:
        """Futures with their actions, of which the first is the given one."""
        later = self.action_normalizer.inverse(x[:, 1:, : self.action_size]).clamp(-1, 1)
        imagined = super().decode(start, action, x[..., self.action_size :])
        return imagined._replace(actions=torch.cat([action.unsqueeze(1), later], dim=1))


class JointSegments(JointDifferences):
    """Whole segments: step k of `JointDifferences` after its observation ``s_{t+k}``, D = 2 O + A + 2.

    Start and first action are imagined too, not taken as given. The condition is the return-to-go alone, as in GTA
    (arXiv 2405.16907); with ``return_dropout: 1`` it is constant and, at a horizon of 1, the model is SynthER's
    (arXiv 2303.06614).
    """

    def __init__(self, observation_size: int, action_size: int) -> None:
        super().__init__(observation_size, action_size)
        self.observation_size = observation_size
        self.features += observation_size
        self.condition_size = 2

    def encode(self, segments: Segments) -> Tensor:
        """``x`` of recorded segments, shape (B, H, D)."""
        before = self.observation_normalizer(segments.observations[:, :-1])
        return torch.cat([before, super().encode(segments)], dim=-1)

    def decode(self, start: Tensor, action: Tensor, x: Tensor) -> Imagined:
        """Futures from the start and action that the first step holds; the given ones are left aside."""
        before, rest = x.split([self.observation_size, self.features - self.observation_size], dim=-1)
        action = self.action_normalizer.inverse(rest[:, 0, : self.action_size]).clamp(-1, 1)
        return super().decode(self.observation_normalizer.inverse(before[:, 0]), action, rest)

    def condition(self, start: Tensor, actions: Tensor, returns_to_go: Tensor, keep: Tensor) -> Tensor:
        """The return-to-go and whether it is shown, shape (B, 2)."""
        return super().condition(start, actions, returns_to_go, keep)[:, -2:]
