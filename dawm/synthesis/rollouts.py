"""Synthesis: complete imagined transitions from the world model and the inverse dynamics.

The world model imagines observations and rewards from starts (s_t, a_t) and a target return; the inverse dynamics
infers every action but the first, unless the world model imagined them too; the forward models may say again what each
step leads to, now that its action is known; steps that cannot be trusted are dropped and counted.

Symbols: B starts, H horizon, O observation size, A action size, M steps kept.
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from dawm.data.batches import derive_seed
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Transitions
from dawm.errors import UserError
from dawm.inverse_dynamics import InverseDynamics
from dawm.synthesis.guards import Bounds, list_fates
from dawm.synthesis.starts import Start, Starts
from dawm.world_model import DiffusionWorldModel

__all__ = ["CHUNK", "Drawn", "Imagination", "Labels", "Rollouts", "Synthesizer"]

Imagination = Literal["diffusion", "ensemble"]
"""What imagines: the diffusion world model and the inverse dynamics, or the forward models and the policy."""
Labels = Literal["imagined", "forward"]
"""Who says what a step leads to: the world model, or the forward models."""

CHUNK = 4096  # starts imagined at once: bounds the memory, and is past the point where larger is faster
CHUNK_ON_CPU = 512  # there the activations of so many stay in the caches, and below what malloc fetches anew each time


class Rollouts(NamedTuple):
    """Imagined futures with their actions; the first ``lengths[b]`` steps of each can be trusted.

    The last step kept of a rollout is a truncation: it bootstraps. Only an imagined termination sets ``terminations``.
    ``counts`` holds the steps by fate: ``kept``, ``after_end`` (after an imagined termination), ``non_finite``,
    ``out_of_range``, ``uncertain`` (the inferred action), ``inconsistent`` (with the forward models' prediction) and
    ``unfamiliar`` (the forward models disagree); a rollout's steps after a bad one are dropped with it.
    """

    observations: Tensor  # the path imagined: s_t (real) and s_{t+1} .. s_{t+H}, shape (B, H + 1, O)
    actions: Tensor  # a_t (given) and a_{t+1} .. a_{t+H-1} in [-1, 1], shape (B, H, A)
    rewards: Tensor  # r_t .. r_{t+H-1}, shape (B, H)
    next_observations: Tensor  # where each step leads: on along the path, or as relabelled, shape (B, H, O)
    terminations: Tensor  # 1 where the task is imagined to end, shape (B, H)
    lengths: Tensor  # steps kept of each rollout, shape (B,), int64
    counts: Counter[str]

    def cpu(self) -> "Rollouts":
        """The same rollouts on the CPU."""
        return self._replace(**{name: getattr(self, name).cpu() for name in self._fields if name != "counts"})

    def steps(self) -> Transitions:
        """All steps, kept or not, fields of shape (B, H, ...)."""
        before, after = self.observations[:, :-1], self.next_observations
        return Transitions(before, self.actions, self.rewards, after, self.terminations)

    @property
    def kept(self) -> Tensor:
        """Whether each step can be trusted, shape (B, H), bool."""
        return torch.arange(self.rewards.shape[1], device=self.lengths.device) < self.lengths.unsqueeze(1)

    def transitions(self) -> Transitions:
        """The steps kept, rollout by rollout, fields of shape (M, ...)."""
        return self.steps()[self.kept]

    def expansions(self, discount: float) -> Transitions:
        """One row for each rollout with a step kept, over all it kept, with the discounted sum of their rewards.

        TD on them is value expansion as in DWM (arXiv 2402.03570): ``sum_k gamma^k r_{t+k} + gamma^n Q(s_{t+n})`` for
        the value of ``s_t`` and ``a_t``, cut where the task is imagined to end or a step was dropped.
        """
        rows, last = torch.arange(len(self.lengths), device=self.lengths.device), self.lengths - 1
        weights = discount ** torch.arange(self.rewards.shape[1], device=rows.device)
        rewards = (self.rewards.where(self.kept, 0) * weights).sum(dim=1)  # a dropped one may be no number
        after, terminations = self.next_observations[rows, last], self.terminations[rows, last]
        first, steps = (self.observations[:, 0], self.actions[:, 0]), self.lengths.to(rewards.dtype)
        return Transitions(*first, rewards, after, terminations, steps=steps)[self.lengths > 0]

    def single_steps(self) -> "Rollouts":
        """The steps kept as M rollouts of one step each, where they do not lead on along the path."""
        steps = self.transitions()
        path = torch.stack([steps.observations, steps.next_observations], dim=1)
        lengths = torch.ones_like(steps.rewards, dtype=torch.int64)
        return Rollouts(
            path, steps.actions[:, None], steps.rewards[:, None], steps.next_observations[:, None],
            steps.terminations[:, None], lengths, self.counts,
        )  # fmt: skip

    def require_some(self, margin: str) -> None:
        """Raises a UserError where no step is left; it names the setting that widens the range to accept."""
        if not self.counts["kept"]:
            raise UserError(
                f"--{margin}: got all {self.counts.total():,} imagined steps dropped ({list_fates(self.counts)}), "
                "expected some to keep; raise it, or train the world model longer with --stages.world_model.max_steps"
            )


class Drawn(NamedTuple):
    """What the models say of some rollouts, before anything is judged."""

    path: Tensor  # shape (B, H + 1, O)
    actions: Tensor  # shape (B, H, A)
    next_observations: Tensor  # as labelled, shape (B, H, O)
    rewards: Tensor  # as labelled, shape (B, H)
    ends: Tensor  # as labelled, around 0 or 1, shape (B, H)
    imagined_ends: Tensor  # by the world model, around 0 or 1, shape (B, H)
    uncertainty: Tensor  # disagreement of the inverse dynamics, shape (B, H)
    inconsistency: Tensor  # distance of the path from the forward models' prediction, shape (B, H)
    unfamiliarity: Tensor  # disagreement of the forward models, shape (B, H)


@dataclass(frozen=True)
class Synthesizer:
    """Makes imagined transitions from real starts.

    Args:
        world_model: Imagines observations, rewards and terminations.
        inverse_dynamics: Infers the actions after the first, where the world model imagines none.
        starts: Draws where futures begin and what they aim at.
        guidance: Weight of classifier-free guidance; 1 is the plain conditional model and the cheapest.
        labels: ``forward`` takes each step's next observation, reward and termination from the forward models, given
            the imagined observation and the action; ``imagined`` takes the world model's.
        bounds: Range that imagined observations and rewards have to stay in; None accepts all.
        max_disagreement: Largest disagreement of the inverse dynamics to accept; None accepts all.
        max_inconsistency: Largest distance from the forward models' prediction to accept; None accepts all.
        max_forward_disagreement: Largest disagreement of the forward models to accept; None accepts all.
        pessimism: How much rewards are lowered, in their own unit, per unit by which the forward models disagree more
            than ``usual_disagreement``.
        usual_disagreement: Disagreement up to which rewards stay as they are; what is usual on recorded transitions.
        noising: Part of the sampler's steps by which recorded segments are noised and denoised; None begins with noise.
    """

    world_model: DiffusionWorldModel
    inverse_dynamics: InverseDynamics
    starts: Starts = Starts()
    guidance: float = 1.0
    labels: Labels = "imagined"
    bounds: Bounds | None = None
    max_disagreement: float | None = None
    max_inconsistency: float | None = None
    max_forward_disagreement: float | None = None
    pessimism: float = 0.0
    usual_disagreement: float = 0.0
    noising: float | None = None

    def draw(self, data: TransitionDataModule, count: int, seed: int) -> tuple[Start, Tensor | None]:
        """What `imagine` begins with: B starts, and encoded segments to noise."""
        if self.noising is None:
            return self.starts(data, count, seed), None
        segments = data.random_segments(count, seed).to(self.world_model.device)
        first = segments.observations[:, 0].cpu(), segments.actions[:, 0].cpu()
        start = *first, self.starts.target(*first, segments.returns_to_go.cpu())
        return start, self.world_model.codec.encode(segments)

    def rollouts(
        self, data: TransitionDataModule, count: int, seed: int, rank: int = 0, step: int = 0, block: int = 0
    ) -> Rollouts:
        """B rollouts from random real starts; what is drawn depends on the data's seed and the last four arguments.

        They are the seed, the process (or another number that sets these rollouts apart), the update they are for, and
        the number of the agent they are for, where agents that train side by side have each their own.
        """
        seed = derive_seed(seed, data.seed, rank, step, "rollouts", *((block,) if block else ()))
        # not the seed of the starts: two generators of one seed draw the same numbers
        generator = torch.Generator(self.world_model.device).manual_seed(derive_seed(seed, "noise"))
        start, x = self.draw(data, count, seed)
        return self.judge(self.imagine(start, generator, x))

    def unfiltered(self) -> Self:
        """The same without filters and pessimism: what is finite and not after an imagined end is kept as it is."""
        return replace(self, bounds=None, max_disagreement=None, max_inconsistency=None, max_forward_disagreement=None,
                       pessimism=0.0)  # fmt: skip

    @torch.no_grad()
    def imagine(self, start: Start, generator: torch.Generator | None = None, x: Tensor | None = None) -> Drawn:
        """One future from each of B starts, not judged yet; or from their encoded segments ``x``, shape (B, H, D)."""
        device = self.world_model.device

        def chunks(part: Tensor) -> tuple[Tensor, ...]:
            return part.to(device).split(CHUNK_ON_CPU if device.type == "cpu" else CHUNK)

        segments = repeat(None) if x is None else chunks(x)
        parts = [self._draw(generator, *given) for given in zip(zip(*map(chunks, start)), segments)]
        return Drawn(*(torch.cat(part) for part in zip(*parts)))

    def judge(self, drawn: Drawn) -> Rollouts:
        """Imagined futures as rollouts, with how much of each the filters keep."""
        following, rewards, ends = drawn.next_observations, drawn.rewards, drawn.ends
        over = ((ends > 0.5) | (drawn.imagined_ends > 0.5)).float()
        observed = drawn.path[:, :-1], drawn.path[:, 1:], following  # the first may be imagined, too

        def within(values: Tensor, limit: float | None) -> Tensor:
            return torch.ones_like(values, dtype=torch.bool) if limit is None else values <= limit

        kept, bounds, counts = within(ends, None), self.bounds, Counter[str]()
        finite = torch.stack([part.isfinite().all(-1) for part in observed]).all(0)
        good = {
            "after_end": over.cumsum(dim=1) - over == 0,
            "non_finite": finite & rewards.isfinite() & ends.isfinite(),
            "out_of_range": kept
            if bounds is None
            else torch.stack([bounds.contain(part, rewards) for part in observed]).all(0),
            "uncertain": within(drawn.uncertainty, self.max_disagreement),
            "inconsistent": within(drawn.inconsistency, self.max_inconsistency),
            "unfamiliar": within(drawn.unfamiliarity, self.max_forward_disagreement),
        }
        for fate, fine in good.items():  # a step is counted under the first reason that drops it
            fine = fine.cumprod(dim=1).bool()  # and takes the later ones along, so that a beginning is kept
            counts[fate] = int((kept & ~fine).sum())
            kept = kept & fine
        counts["kept"] = int(kept.sum())
        terminations = (ends > 0.5).float()
        if self.pessimism:
            rewards = rewards - self.pessimism * (drawn.unfamiliarity - self.usual_disagreement).clamp(min=0)
        return Rollouts(drawn.path, drawn.actions, rewards, following, terminations, kept.sum(dim=1), counts)

    def _draw(self, generator: torch.Generator | None, start: Start, x: Tensor | None) -> Drawn:
        """One chunk."""
        begin: dict[str, Any] = {} if x is None else {"x": x, "noising": self.noising}
        imagined = self.world_model.imagine(*start, self.guidance, generator, **begin)
        path, rewards, ends, all_actions = imagined
        before, after = path[:, :-1], path[:, 1:]
        uncertainty = torch.full_like(rewards, -torch.inf)  # of an action that is not inferred nothing is uncertain
        if all_actions is None:
            inferred = self.inverse_dynamics.infer(before.flatten(0, 1), after.flatten(0, 1))
            all_actions, disagreement = (part.unflatten(0, ends.shape).clone() for part in inferred)
            all_actions[:, 0], uncertainty[:, 1:] = start[1], disagreement[:, 1:]
        nothing = torch.zeros_like(rewards)
        drawn = Drawn(path, all_actions, after, rewards, ends, ends, uncertainty, nothing, nothing)
        limits = self.max_inconsistency, self.max_forward_disagreement
        if self.labels == "imagined" and limits == (None, None) and not self.pessimism:
            return drawn
        forward_model, codec = self.world_model.forward_model, self.world_model.codec
        assert forward_model is not None
        predicted = forward_model.predict(codec, before.flatten(0, 1), all_actions.flatten(0, 1))
        distance = forward_model.inconsistency(codec, predicted, after.flatten(0, 1)).unflatten(0, ends.shape)
        following, rewards, ends, disagreement = (part.unflatten(0, ends.shape) for part in predicted)
        drawn = drawn._replace(inconsistency=distance, unfamiliarity=disagreement)
        if self.labels == "imagined":
            return drawn
        return drawn._replace(next_observations=following, rewards=rewards, ends=ends)
