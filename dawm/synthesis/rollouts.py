"""Synthesis: complete imagined transitions from the world model and the inverse dynamics.

The world model imagines observations and rewards from real starts (s_t, a_t) and a target return; the inverse dynamics
infers every action but the first, which is the real a_t; steps that cannot be trusted are dropped and counted.

Symbols: B starts, H horizon, O observation size, A action size, M steps kept.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dawm.data.batches import derive_seed
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Transitions
from dawm.errors import UserError
from dawm.inverse_dynamics import InverseDynamics
from dawm.synthesis.guards import Bounds, list_fates
from dawm.synthesis.targets import LiftedReturn, TargetReturn
from dawm.world_model import DiffusionWorldModel

__all__ = ["CHUNK", "Rollouts", "Synthesizer"]

CHUNK = 4096  # starts imagined at once: bounds the memory, and is past the point where larger is faster


class Rollouts(NamedTuple):
    """Imagined futures with their actions; the first ``lengths[b]`` steps of each can be trusted.

    The last step kept of a rollout is a truncation: it bootstraps. Only an imagined termination sets ``terminations``.
    ``counts`` holds the steps by fate: ``kept``, ``after_end`` (after an imagined termination), ``non_finite``,
    ``out_of_range`` and ``uncertain``; a rollout's steps after a bad one are dropped with it.
    """

    observations: Tensor  # s_t (real) and s_{t+1} .. s_{t+H}, shape (B, H + 1, O)
    actions: Tensor  # a_t (real) and a_{t+1} .. a_{t+H-1} in [-1, 1], shape (B, H, A)
    rewards: Tensor  # r_t .. r_{t+H-1}, shape (B, H)
    terminations: Tensor  # 1 where the task is imagined to end, shape (B, H)
    lengths: Tensor  # steps kept of each rollout, shape (B,), int64
    counts: Counter[str]

    def cpu(self) -> "Rollouts":
        """The same rollouts on the CPU."""
        return self._replace(**{name: getattr(self, name).cpu() for name in self._fields if name != "counts"})

    def steps(self) -> Transitions:
        """All steps, kept or not, fields of shape (B, H, ...)."""
        before, after = self.observations[:, :-1], self.observations[:, 1:]
        return Transitions(before, self.actions, self.rewards, after, self.terminations)

    @property
    def kept(self) -> Tensor:
        """Whether each step can be trusted, shape (B, H), bool."""
        return torch.arange(self.rewards.shape[1], device=self.lengths.device) < self.lengths.unsqueeze(1)

    def transitions(self) -> Transitions:
        """The steps kept, rollout by rollout, fields of shape (M, ...)."""
        return self.steps()[self.kept]

    def require_some(self, margin: str) -> None:
        """Raises a UserError where no step is left; it names the setting that widens the range to accept."""
        if not self.counts["kept"]:
            raise UserError(
                f"--{margin}: got all {self.counts.total():,} imagined steps dropped ({list_fates(self.counts)}), "
                "expected some to keep; raise it, or train the world model longer with --stages.world_model.max_steps"
            )


@dataclass(frozen=True)
class Synthesizer:
    """Makes imagined transitions from real starts.

    Args:
        world_model: Imagines observations, rewards and terminations.
        inverse_dynamics: Infers the actions after the first.
        target_return: Which return-to-go the futures aim at; by default each start's own.
        guidance: Weight of classifier-free guidance; 1 is the plain conditional model and the cheapest.
        bounds: Range that imagined observations and rewards have to stay in; None accepts all.
        max_disagreement: Largest disagreement of the inverse dynamics to accept; None accepts all.
    """

    world_model: DiffusionWorldModel
    inverse_dynamics: InverseDynamics
    target_return: TargetReturn = LiftedReturn()
    guidance: float = 1.0
    bounds: Bounds | None = None
    max_disagreement: float | None = None

    def rollouts(self, data: TransitionDataModule, count: int, seed: int, rank: int = 0, step: int = 0) -> Rollouts:
        """B rollouts from random real starts; what is drawn depends on the three last arguments alone.

        They are the seed, the process (or another number that sets these rollouts apart) and the update they are for.
        """
        seed = derive_seed(seed, rank, step, "rollouts")
        generator = torch.Generator(self.world_model.device).manual_seed(seed)
        return self.imagine(*self.starts(data, count, seed), generator)

    def starts(self, data: TransitionDataModule, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """B random real ``s_t`` and ``a_t``, and the return-to-go to aim at from there, shape (B,)."""
        real, returns, device = data.episodes.transitions, data.returns_to_go, self.world_model.device
        rows = torch.randint(len(real), (count,), generator=torch.Generator().manual_seed(seed))
        targets = self.target_return(returns[rows], returns[data.episodes.sample_rows()])
        return real.observations[rows].to(device), real.actions[rows].to(device), targets.to(device)

    @torch.no_grad()
    def imagine(
        self, observations: Tensor, actions: Tensor, returns_to_go: Tensor, generator: torch.Generator | None = None
    ) -> Rollouts:
        """One rollout from each real ``s_t`` and ``a_t``, with the return-to-go to aim at, shape (B,)."""
        chunks = zip(observations.split(CHUNK), actions.split(CHUNK), returns_to_go.split(CHUNK))
        parts = zip(*(self._complete(*chunk, generator) for chunk in chunks))
        path, inferred, rewards, ends, disagreement = (torch.cat(part) for part in parts)
        after, terminations = path[:, 1:], (ends > 0.5).float()
        inferred[:, 0], disagreement[:, 0] = actions, -torch.inf  # of the first action nothing is uncertain

        kept = all_good = torch.ones_like(ends, dtype=torch.bool)
        bounds, limit, counts = self.bounds, self.max_disagreement, Counter[str]()
        good = {
            "after_end": terminations.cumsum(dim=1) - terminations == 0,
            "non_finite": after.isfinite().all(-1) & rewards.isfinite() & ends.isfinite(),
            "out_of_range": all_good if bounds is None else bounds.to(after.device).contain(after, rewards),
            "uncertain": all_good if limit is None else disagreement <= limit,
        }
        for fate, fine in good.items():  # a step is counted under the first reason that drops it
            fine = fine.cumprod(dim=1).bool()  # and takes the later ones along, so that a beginning is kept
            counts[fate] = int((kept & ~fine).sum())
            kept = kept & fine
        counts["kept"] = int(kept.sum())
        return Rollouts(path, inferred, rewards, terminations, kept.sum(dim=1), counts)

    def _complete(
        self, observations: Tensor, actions: Tensor, returns_to_go: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        """Observations, actions, rewards, terminations and disagreements of one chunk, as they were imagined."""
        imagined = self.world_model.imagine(observations, actions, returns_to_go, self.guidance, generator)
        before, after = imagined.observations[:, :-1], imagined.observations[:, 1:]
        inferred = self.inverse_dynamics.infer(before.flatten(0, 1), after.flatten(0, 1))
        inferred_actions, disagreement = (part.unflatten(0, before.shape[:2]) for part in inferred)
        return imagined.observations, inferred_actions, imagined.rewards, imagined.terminations, disagreement
