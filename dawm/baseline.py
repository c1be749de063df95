"""OneStepRegression: what the world model's first imagined step is measured against.

Symbols: B batch, H horizon, O observation size, A action size, D features of one step of ``x``.
"""

import torch
from torch import Tensor, nn
from torch.optim import Adam

from dawm.data.transitions import Segments
from dawm.diffusion.codecs import Codec, Imagined
from dawm.nn.mlp import BatchedMLP

__all__ = ["OneStepRegression"]


class OneStepRegression(nn.Module):
    """An MLP that predicts one step of ``x`` from ``(s_t, a_t)``, on the world model's batches and with its codec."""

    def __init__(self, observation_size: int, action_size: int, features: int, learning_rate: float) -> None:
        super().__init__()
        self.network = BatchedMLP((), observation_size + action_size, (256, 256), features)
        self.optimizer = Adam(self.network.parameters(), lr=learning_rate, fused=True)

    def forward(self, codec: Codec, observations: Tensor, actions: Tensor) -> Tensor:
        """The predicted step of ``x``, shape (B, D), for ``s_t``, shape (B, O), and ``a_t``, shape (B, A)."""
        return self.network(torch.cat([codec.observation_normalizer(observations), actions], dim=-1))

    def loss(self, codec: Codec, segments: Segments, x: Tensor) -> Tensor:
        """Mean squared error of the first step, shape (), on segments encoded as ``x``, shape (B, H, D)."""
        return (self(codec, segments.observations[:, 0], segments.actions[:, 0]) - x[:, 0]).square().mean()

    def roll_out(self, codec: Codec, segments: Segments) -> Imagined:
        """Futures made step by step, each from the last predicted observation and the recorded action."""
        observations, rewards, terminations = [segments.observations[:, :1]], [], []
        for actions in segments.actions.unbind(dim=1):
            current = observations[-1][:, 0]
            step = codec.decode(current, self(codec, current, actions).unsqueeze(1))
            observations.append(step.observations[:, 1:])
            rewards.append(step.rewards)
            terminations.append(step.terminations)
        return Imagined(*(torch.cat(steps, dim=1) for steps in (observations, rewards, terminations)))
