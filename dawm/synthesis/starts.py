"""Where imagined futures begin: a recorded observation, a first action, and the return-to-go to aim at.

Symbols: B starts, N recorded rows, S seeds, O observation size, A action size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dawm.data.batches import WeightedRows
from dawm.data.module import TransitionDataModule
from dawm.data.weights import RowWeights, checked
from dawm.nn.modes import evaluating
from dawm.synthesis.targets import Target, TargetReturn

__all__ = ["FirstAction", "Policy", "Start", "Starts", "policy_of"]

FirstAction = Literal["recorded", "policy"]
"""Whose action an imagined future begins with."""
Start = tuple[Tensor, Tensor, Tensor]
"""``s_t``, shape (B, O), ``a_t``, shape (B, A), and the return-to-go to aim at, shape (B,)."""
Policy = Callable[[Tensor], Tensor]
"""Actions in [-1, 1], shape (B, A), from observations in the data's units, shape (B, O), both on the CPU."""


@dataclass(frozen=True)
class Starts:
    """Draws starts from the real rows.

    Args:
        target: The return-to-go to aim at; by default each start's own recorded one.
        weighted: How often each row is drawn; None draws uniformly.
        policy: Chooses the first action; None takes the recorded one.
        noise: Standard deviation of Gaussian noise on the policy's actions.
    """

    target: Target = lambda observations, actions, own: own
    weighted: WeightedRows | None = None
    policy: Policy | None = None
    noise: float = 0.0

    @classmethod
    def of(
        cls, data: TransitionDataModule, target_return: TargetReturn, weights: RowWeights | None = None,
        key: str = "starts",
    ) -> "Starts":  # fmt: skip
        """Starts in the real rows that aim at a return fitted to the training episodes; ``key`` is for messages.

        Without ``weights`` each row is a start as often as the agent draws it, by the data's ``real_weights``.
        """
        weights = data.real_weights if weights is None else weights
        rows = data.episodes.sample_rows(data.training_episodes)
        target = target_return.fit(data.episodes.transitions[rows], data.returns_to_go[rows], data.seed)
        if weights is None:
            return cls(target)
        return cls(target, WeightedRows(checked(weights(data.episodes), len(data.episodes), key)))

    def __call__(self, data: TransitionDataModule, count: int, seed: int) -> Start:
        """B starts, on the CPU."""
        real, generator = data.episodes.transitions, torch.Generator().manual_seed(seed)
        if self.weighted is None:
            rows = torch.randint(len(real), (count,), generator=generator)
        else:
            rows = self.weighted.draw((count,), generator)
        observations, actions = real.observations[rows], real.actions[rows]
        if self.policy is not None:
            noise = self.noise * torch.randn(actions.shape, generator=generator)
            actions = (self.policy(observations) + noise).clamp(-1, 1)
        return observations, actions, self.target(observations, actions, data.returns_to_go[rows])


def policy_of(agent: Any, seed: int | None = None) -> Policy:
    """The policy of one of an agent's S seeds, by number; None asks them in turn, row by row."""

    @torch.no_grad()
    def act(observations: Tensor) -> Tensor:
        seeds, rows = getattr(agent, "seeds", 1), torch.arange(len(observations))
        asked = observations.to(agent.device)
        with evaluating(agent):
            actions = agent.act(asked if seeds == 1 else asked.expand(seeds, -1, -1)).cpu()
        return actions if seeds == 1 else actions[rows % seeds if seed is None else seed, rows]

    return act
