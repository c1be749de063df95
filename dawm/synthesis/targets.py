"""The return-to-go that imagined futures aim at.

Symbols: B starts, N recorded rows, O observation size, A action size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Adam

from dawm.agents.losses import expectile_loss
from dawm.data.transitions import Transitions
from dawm.errors import require
from dawm.nn.mlp import BatchedMLP
from dawm.nn.normalizer import Normalizer
from dawm.training.updates import cosine_decay

__all__ = [
    "ConstantReturn", "FeasibleReturn", "LiftedReturn", "QuantileReturn", "ScaledReturn", "Target", "TargetReturn",
]  # fmt: skip

Target = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Targets, shape (B,), from the starts' ``s_t``, shape (B, O), ``a_t``, (B, A), and own recorded return-to-go, (B,)."""


class TargetReturn(ABC):
    """Chooses the return-to-go that each imagined future aims at."""

    @abstractmethod
    def fit(self, transitions: Transitions, returns_to_go: Tensor, seed: int = 0) -> Target:
        """What gives the targets, from N recorded rows and their returns-to-go, shape (N,), on the CPU.

        The same rows and seed give the same targets.
        """


class QuantileReturn(TargetReturn):
    """The same quantile of the data's returns-to-go for every start.

    Args:
        quantile: In [0, 1]; 1 is the best return in the data.
    """

    def __init__(self, quantile: float = 0.9) -> None:
        require("target_return.quantile", quantile, 0 <= quantile <= 1, "a number from 0 to 1")
        self.quantile = quantile

    def fit(self, transitions: Transitions, returns_to_go: Tensor, seed: int = 0) -> Target:
        """The quantile."""
        place = round(self.quantile * (len(returns_to_go) - 1))
        # torch.quantile refuses more than 16 million values
        value = returns_to_go.kthvalue(place + 1).values
        return lambda observations, actions, own: value.expand_as(own)


class LiftedReturn(TargetReturn):
    """Each start's own recorded return-to-go, lifted by some standard deviations of the data's returns-to-go.

    Not by a factor: returns may be negative.

    Args:
        lift: Standard deviations to add; 0 imagines futures as good as the recorded one.
    """

    def __init__(self, lift: float = 0.0) -> None:
        self.lift = lift

    def fit(self, transitions: Transitions, returns_to_go: Tensor, seed: int = 0) -> Target:
        """Each start's return-to-go plus the lift."""
        lift = self.lift * returns_to_go.std()
        return lambda observations, actions, own: own + lift


class ScaledReturn(TargetReturn):
    """Each start's own recorded return-to-go times a factor, as in GTA (arXiv 2405.16907).

    Args:
        factor: Above 1 aims higher; a negative return-to-go rises by as much as a positive one of its size.
    """

    def __init__(self, factor: float = 1.3) -> None:
        self.factor = factor

    def fit(self, transitions: Transitions, returns_to_go: Tensor, seed: int = 0) -> Target:
        """Each start's return-to-go and (factor - 1) of its size."""
        return lambda observations, actions, own: own + (self.factor - 1) * own.abs()


class ConstantReturn(TargetReturn):
    """One return-to-go for every start.

    Args:
        value: The discounted return to aim at, in the environment's units.
    """

    def __init__(self, value: float) -> None:
        self.value = value

    def fit(self, transitions: Transitions, returns_to_go: Tensor, seed: int = 0) -> Target:
        """The value."""
        return lambda observations, actions, own: torch.full_like(own, self.value)


class FeasibleReturn(TargetReturn):
    """A high return-to-go that the data show to be within reach of each start.

    It is the larger of the start's own return-to-go and an expectile of the return-to-go given ``(s_t, a_t)``, which a
    network learns from the data by IQL's asymmetric regression (arXiv 2110.06169, equation 5). It takes some seconds.

    Args:
        expectile: In [0.5, 1); 0.5 is the mean, and near 1 the best return seen from there.
    """

    updates, batch_size, learning_rate = 3000, 256, 1e-3

    def __init__(self, expectile: float = 0.9) -> None:
        require("target_return.expectile", expectile, 0.5 <= expectile < 1, "a number from 0.5 to below 1")
        self.expectile = expectile

    def fit(self, transitions: Transitions, returns_to_go: Tensor, seed: int = 0) -> Target:
        """The network's expectile, or the own return-to-go where that is more."""
        inputs = torch.cat([transitions.observations, transitions.actions], dim=-1)
        scale_in, scale_out = Normalizer(inputs.shape[1]), Normalizer(1)
        scale_in.fit(inputs)
        scale_out.fit(returns_to_go.unsqueeze(-1))
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):  # the random numbers of training are left as they are
            torch.default_generator.manual_seed(seed)
            network = BatchedMLP((), inputs.shape[1], (256, 256), 1)
        optimizer = Adam(network.parameters(), lr=self.learning_rate, fused=True)
        for index in range(self.updates):
            rows = torch.randint(len(inputs), (self.batch_size,), generator=generator)
            errors = scale_out(returns_to_go[rows].unsqueeze(-1)) - network(scale_in(inputs[rows]))
            optimizer.param_groups[0]["lr"] = self.learning_rate * cosine_decay(index, self.updates)
            optimizer.zero_grad()
            expectile_loss(errors.squeeze(-1), self.expectile).backward()
            optimizer.step()

        @torch.no_grad()
        def target(observations: Tensor, actions: Tensor, own: Tensor) -> Tensor:
            values = network(scale_in(torch.cat([observations, actions], dim=-1)))
            return torch.maximum(scale_out.inverse(values).squeeze(-1), own)

        return target
