"""Transitions and segments: the two shapes in which data travel.

Symbols: N rows, B batch, H horizon, O observation size, A action size.

A transition is one step of an environment: the action ``a_t`` taken at observation ``s_t`` gives the reward ``r_t``
and the next observation ``s_{t+1}``. Three conventions hold everywhere:

* ``rewards[t]`` and ``next_observations[t]`` result from ``actions[t]``.
* ``terminations[t]`` is 1 only where the task itself ended at ``s_{t+1}``; such a row never bootstraps. A truncated
  end (time limit, end of the recording, end of an imagined rollout) has termination 0 and bootstraps.
* Actions are scaled to [-1, 1]; the environment's own units appear only at the edges (loading, acting).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

__all__ = ["Segments", "Transitions"]


class _Batch:
    """What both shapes can do: they are frozen dataclasses of tensors that share their leading dimensions."""

    rewards: Tensor

    def __len__(self) -> int:
        return self.rewards.shape[0]

    def __getitem__(self, index: Tensor | slice | int) -> Self:
        """Part of the batch, along the first dimension."""
        return self._apply(lambda values: values[index])

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Batches that have the same fields, one after the other."""
        return cls(**{n: torch.cat([getattr(p, n) for p in parts]) for n, v in vars(parts[0]).items() if v is not None})

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return self._apply(lambda values: values.to(device))

    def _apply(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{name: None if v is None else function(v) for name, v in vars(self).items()})


@dataclass(frozen=True)
class Transitions(_Batch):
    """A batch of transitions; every field shares its leading dimensions.

    ``real`` is for losses that tell real rows from synthetic ones. Mixed batches have it; None counts as all real.
    ``steps`` is there where rows may span several steps of the environment: the reward is then their discounted sum,
    the next observation the last one's, and the value there counts ``gamma ** steps``. None counts as one step each.
    """

    observations: Tensor  # s_t, shape (N, O)
    actions: Tensor  # a_t in [-1, 1], shape (N, A)
    rewards: Tensor  # r_t, shape (N,)
    next_observations: Tensor  # s_{t+1}, shape (N, O)
    terminations: Tensor  # 1 where the task ended at s_{t+1}, else 0, shape (N,), float32
    real: Tensor | None = None  # 1 for a recorded row, 0 for a synthetic one, shape (N,), float32
    steps: Tensor | None = None  # steps that a row spans, shape (N,), float32

    def pack(self) -> Tensor:
        """All fields but ``real`` side by side: one gather fetches a whole row, shape (N, 2 O + A + 2).

        Where there are ``steps``, they are one column more.
        """
        rewards, last = self.rewards.unsqueeze(-1), [self.terminations.unsqueeze(-1)]
        if self.steps is not None:
            last.append(self.steps.unsqueeze(-1))
        return torch.cat([self.observations, self.actions, rewards, self.next_observations, *last], dim=-1)

    @classmethod
    def unpack(cls, rows: Tensor, observation_size: int, action_size: int) -> "Transitions":
        """Views into packed rows, shape (..., 2 O + A + 2), or one column more; the inverse of `pack`."""
        sizes = [observation_size, action_size, 1, observation_size, 1]
        sizes += [1] * (rows.shape[-1] - sum(sizes))
        observations, actions, rewards, next_observations, *last = rows.split(sizes, dim=-1)
        terminations, steps = (*(part.squeeze(-1) for part in last), None)[:2]
        return cls(observations, actions, rewards.squeeze(-1), next_observations, terminations, steps=steps)


@dataclass(frozen=True)
class Segments(_Batch):
    """A batch of H consecutive steps of one episode each; a segment never crosses an episode's end.

    A segment that meets a termination before its H-th step is continued by absorbing rows: the observation stays, the
    reward is 0, the termination stays 1. Where a data set did not record ``s_{t+1}`` of the step that ended the task,
    ``s_t`` stands in, and ``observed`` keeps losses from taking that for what happened.
    """

    observations: Tensor  # s_t .. s_{t+H}, shape (B, H + 1, O)
    actions: Tensor  # a_t .. a_{t+H-1} in [-1, 1], shape (B, H, A)
    rewards: Tensor  # r_t .. r_{t+H-1}, shape (B, H)
    terminations: Tensor  # 1 at the step that ended the task and after it, shape (B, H)
    valid: Tensor  # 1 for a recorded step, 0 for an absorbing row, shape (B, H)
    returns_to_go: Tensor  # at s_t, shape (B,)
    observed: Tensor | None = None  # 0 where s_{t+1} .. s_{t+H} was not recorded, else 1, (B, H); None: all were
