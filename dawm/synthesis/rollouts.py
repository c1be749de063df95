"""Synthesis: complete imagined transitions from the world model and the inverse dynamics.

The world model imagines observations and rewards from real starts (s_t, a_t) and a target return; the inverse dynamics
infers every action but the first, which is the real a_t; rows that cannot be trusted are dropped and counted.

Symbols: B starts, H horizon, O observation size, A action size, M rows kept.
"""

from abc import ABC, abstractmethod
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from dawm.data.transitions import Transitions
from dawm.errors import UserError
from dawm.inverse_dynamics import InverseDynamics
from dawm.synthesis.guards import Bounds
from dawm.world_model import DiffusionWorldModel

__all__ = [
    "CHUNK",
    "ConstantReturn",
    "LiftedReturn",
    "QuantileReturn",
    "Rollouts",
    "Synthesized",
    "TargetReturn",
    "roll_out",
    "synthesize",
]

CHUNK = 4096  # starts imagined at once: bounds the memory, and is past the point where larger is faster


class TargetReturn(ABC):
    """Which return-to-go an imagined future aims at."""

    @abstractmethod
    def __call__(self, returns_to_go: Tensor, data_returns_to_go: Tensor) -> Tensor:
        """Targets for some starts, shape (B,).

        Args:
            returns_to_go: The recorded return-to-go of each start, shape (B,).
            data_returns_to_go: The return-to-go of every recorded row, shape (N,).
        """


class QuantileReturn(TargetReturn):
    """The same quantile of the data's returns-to-go for every start.

    Args:
        quantile: In [0, 1]; 1 is the best return in the data.
    """

    def __init__(self, quantile: float = 0.9) -> None:
        if not 0 <= quantile <= 1:
            raise UserError(f"quantile is {quantile}, but must be a number from 0 to 1; set target_return's quantile")
        self.quantile = quantile

    def __call__(self, returns_to_go: Tensor, data_returns_to_go: Tensor) -> Tensor:
        """The quantile, shape (B,)."""
        place = round(self.quantile * (len(data_returns_to_go) - 1))
        # torch.quantile refuses more than 16 million values
        return data_returns_to_go.kthvalue(place + 1).values.expand_as(returns_to_go)


class LiftedReturn(TargetReturn):
    """Each start's own recorded return-to-go, lifted by a share of the data's spread.

    A lift in standard deviations, not a factor: returns may be negative.

    Args:
        lift: Standard deviations of the data's returns-to-go to add; 0 imagines futures as good as the recorded one.
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


class Synthesized(NamedTuple):
    """Imagined transitions and what became of the rows that were imagined.

    Args:
        transitions: The rows kept, fields of shape (M, ...).
        counts: Rows by fate: ``kept``, ``after_end`` (behind an imagined termination), ``non_finite``,
            ``out_of_range`` and ``uncertain``; a rollout's rows behind a bad one are dropped with it.
    """

    transitions: Transitions
    counts: Counter[str]


class Rollouts(NamedTuple):
    """Imagined futures with their actions; the first ``lengths[b]`` steps of each can be trusted.

    Args:
        observations: ``s_t`` (real) and ``s_{t+1} .. s_{t+H}``, shape (B, H + 1, O).
        actions: ``a_t`` (real) and ``a_{t+1} .. a_{t+H-1}`` in [-1, 1], shape (B, H, A).
        rewards: ``r_t .. r_{t+H-1}``, shape (B, H).
        terminations: 1 where the task is imagined to end, shape (B, H).
        lengths: Steps kept of each rollout, shape (B,), int64.
        counts: Rows by fate, as in `Synthesized`.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminations: Tensor
    lengths: Tensor
    counts: Counter[str]

    def cpu(self) -> "Rollouts":
        """The same rollouts on the CPU."""
        observations, actions, rewards, terminations, lengths, counts = self
        return Rollouts(observations.cpu(), actions.cpu(), rewards.cpu(), terminations.cpu(), lengths.cpu(), counts)

    def transitions(self) -> Transitions:
        """The steps kept, rollout by rollout, fields of shape (M, ...)."""
        before, after = self.observations[:, :-1], self.observations[:, 1:]
        kept = torch.arange(before.shape[1], device=self.lengths.device) < self.lengths.unsqueeze(1)
        return Transitions(before, self.actions, self.rewards, after, self.terminations)[kept]


def synthesize(
    world_model: DiffusionWorldModel,
    inverse_dynamics: InverseDynamics,
    observations: Tensor,
    actions: Tensor,
    returns_to_go: Tensor,
    guidance: float = 1.0,
    generator: torch.Generator | None = None,
    bounds: Bounds | None = None,
    max_disagreement: float | None = None,
) -> Synthesized:
    """Imagines one future from each start and completes it with actions.

    The last row of a rollout is a truncation: it bootstraps. Only an imagined termination sets ``terminations``.

    Args:
        world_model: Imagines observations, rewards and terminations.
        inverse_dynamics: Infers the actions behind the first.
        observations: Real ``s_t``, shape (B, O).
        actions: Real ``a_t`` in [-1, 1], shape (B, A).
        returns_to_go: The return-to-go to aim at, shape (B,).
        guidance: Weight of classifier-free guidance.
        generator: Source of the noise; same generator state, same transitions.
        bounds: Range that imagined observations and rewards have to stay in; None accepts all.
        max_disagreement: Largest disagreement of the inverse dynamics to accept; None accepts all.
    """
    parts: list[Transitions] = []
    counts: Counter[str] = Counter()
    for chunk in torch.arange(len(observations), device=observations.device).split(CHUNK):
        rollouts = roll_out(
            world_model,
            inverse_dynamics,
            observations[chunk],
            actions[chunk],
            returns_to_go[chunk],
            guidance,
            generator,
            bounds,
            max_disagreement,
        )
        for fate, count in rollouts.counts.items():
            counts[fate] += count
        parts.append(rollouts.transitions())
    return Synthesized(Transitions.cat(parts), counts)


@torch.no_grad()
def roll_out(
    world_model: DiffusionWorldModel,
    inverse_dynamics: InverseDynamics,
    observations: Tensor,
    actions: Tensor,
    returns_to_go: Tensor,
    guidance: float = 1.0,
    generator: torch.Generator | None = None,
    bounds: Bounds | None = None,
    max_disagreement: float | None = None,
) -> Rollouts:
    """Like `synthesize`, but the steps stay together, and all starts are imagined at once.

    Args:
        world_model: Imagines observations, rewards and terminations.
        inverse_dynamics: Infers the actions behind the first.
        observations: Real ``s_t``, shape (B, O).
        actions: Real ``a_t`` in [-1, 1], shape (B, A).
        returns_to_go: The return-to-go to aim at, shape (B,).
        guidance: Weight of classifier-free guidance.
        generator: Source of the noise.
        bounds: Range that imagined observations and rewards have to stay in; None accepts all.
        max_disagreement: Largest disagreement of the inverse dynamics to accept; None accepts all.
    """
    imagined = world_model.imagine(observations, actions, returns_to_go, guidance=guidance, generator=generator)
    before, after = imagined.observations[:, :-1], imagined.observations[:, 1:]
    inferred = inverse_dynamics.infer(before.flatten(0, 1), after.flatten(0, 1))
    inferred_actions = inferred.actions.unflatten(0, before.shape[:2])
    inferred_actions[:, 0] = actions
    terminations = (imagined.terminations > 0.5).float()

    finite = after.isfinite().all(-1) & imagined.rewards.isfinite() & imagined.terminations.isfinite()
    in_range, certain = torch.ones_like(finite), torch.ones_like(finite)
    if bounds is not None:
        in_range = bounds.contain(after, imagined.rewards)
    if max_disagreement is not None:
        certain[:, 1:] = (inferred.disagreement <= max_disagreement).unflatten(0, before.shape[:2])[:, 1:]

    counts: Counter[str] = Counter()
    kept = torch.ones_like(finite)
    fates = {
        "after_end": terminations.cumsum(dim=1) - terminations == 0,
        "non_finite": _all_so_far(finite),
        "out_of_range": _all_so_far(in_range),
        "uncertain": _all_so_far(certain),
    }
    for fate, good in fates.items():  # a row is counted under the first reason that drops it
        counts[fate] = int((kept & ~good).sum())
        kept = kept & good
    counts["kept"] = int(kept.sum())
    # no reason spares a row behind one that it drops, so what is kept is the beginning of each rollout
    return Rollouts(imagined.observations, inferred_actions, imagined.rewards, terminations, kept.sum(dim=1), counts)


def _all_so_far(good: Tensor) -> Tensor:
    """True where a row and all rows before it in the rollout are good, shape (B, H).

    Args:
        good: Whether each row is good by itself, shape (B, H).
    """
    return good.cumprod(dim=1).bool()
