"""ForwardEnsemble: what one step of the environment does to a given observation and action.

An ensemble of MLPs learns ``(s_{t+1} - s_t, r_t, end) = f(s_t, a_t)``, in the units of the world model's codec and on
its batches. The world model draws a future before its later actions are known; this one is asked afterwards, with the
action. Its mean can therefore relabel imagined steps, and its disagreement says how far they are from the data (MOReL,
arXiv 2005.05951). Its error is also what the world model's first step is measured against.

Symbols: B batch, H horizon, O observation size, A action size, M members.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam

from dawm.data.transitions import Segments
from dawm.diffusion.codecs import Codec, Imagined
from dawm.nn.mlp import BatchedMLP

__all__ = ["ForwardEnsemble", "ForwardPrediction"]


class ForwardPrediction(NamedTuple):
    """One predicted step of B observations and actions."""

    next_observations: Tensor  # mean over the members, or one member's, in the data's units, shape (B, O)
    rewards: Tensor  # likewise, shape (B,)
    terminations: Tensor  # how far the task is believed to end, around 0 or 1, shape (B,)
    disagreement: Tensor  # largest standard deviation over the members of any normalised difference, shape (B,)


class ForwardEnsemble(nn.Module):
    """An ensemble of MLPs that predict one step.

    Args:
        members: Networks in the ensemble M.
        learning_rate: Adam's learning rate.
    """

    def __init__(self, observation_size: int, action_size: int, members: int, learning_rate: float) -> None:
        super().__init__()
        self.network = BatchedMLP((members,), observation_size + action_size, (256, 256), observation_size + 2)
        self.optimizer = Adam(self.network.parameters(), lr=learning_rate, fused=True)

    def forward(self, codec: Codec, observations: Tensor, actions: Tensor) -> Tensor:
        """Normalised difference, normalised reward, and +1 or -1 for the task's end, side by side, shape (M, B, O + 2).

        From ``s_t``, shape (B, O) or one for each member (M, B, O), and ``a_t`` of shape (B, A) or (M, B, A).
        """
        return self.network(torch.cat([codec.observation_normalizer(observations), actions], dim=-1))

    def loss(self, codec: Codec, segments: Segments) -> Tensor:
        """Mean squared error of each member on one recorded step of each of B segments, shape (M,).

        Each member draws the steps for itself, which makes its batches its own at the cost of no further data.
        """
        members, batch = self.network.weights.shape[0], len(segments)
        recorded = segments.valid.sum(dim=1)  # absorbing rows come last
        steps = (torch.rand(batch, members, device=recorded.device).T * recorded).long()
        rows = torch.arange(batch, device=steps.device)
        before, after = segments.observations[rows, steps], segments.observations[rows, steps + 1]
        rewards, ends = segments.rewards[rows, steps], segments.terminations[rows, steps]
        target = [codec.difference_normalizer(after - before), codec.reward_normalizer(rewards.unsqueeze(-1))]
        errors = self(codec, before, segments.actions[rows, steps]) - torch.cat([*target, 2 * ends[..., None] - 1], -1)
        squares = errors.square()
        if segments.observed is not None:
            observed = segments.observed[rows, steps].unsqueeze(-1)
            squares = torch.cat([squares[..., :-2] * observed, squares[..., -2:]], dim=-1)
        return squares.mean(dim=(-2, -1))

    @torch.no_grad()
    def predict(
        self, codec: Codec, observations: Tensor, actions: Tensor, members: Tensor | None = None
    ) -> ForwardPrediction:
        """The step from ``s_t``, shape (B, O), by ``a_t`` in [-1, 1], shape (B, A).

        Given ``members``, shape (B,), each row is answered by the member of that number instead of by the mean.
        """
        steps = self(codec, observations, actions)
        disagreement = steps[..., :-2].std(dim=0, correction=0).amax(dim=-1)
        mean = steps.mean(dim=0) if members is None else steps[members, torch.arange(len(members))]
        next_observations = observations + codec.difference_normalizer.inverse(mean[:, :-2])
        rewards = codec.reward_normalizer.inverse(mean[:, -2:-1]).squeeze(-1)
        return ForwardPrediction(next_observations, rewards, (mean[:, -1] + 1) / 2, disagreement)

    @staticmethod
    def inconsistency(codec: Codec, predicted: ForwardPrediction, next_observations: Tensor) -> Tensor:
        """Distance of ``s_{t+1}``, shape (B, O), from its prediction, shape (B,).

        It is the root mean square over the dimensions, in standard deviations of a recorded step's difference.
        """
        difference = (next_observations - predicted.next_observations) / codec.difference_normalizer.std
        return difference.square().mean(dim=-1).sqrt()

    def roll_out(self, codec: Codec, segments: Segments) -> Imagined:
        """Futures made step by step, each from the last predicted observation and the recorded action."""
        path, steps = [segments.observations[:, 0]], []
        for actions in segments.actions.unbind(dim=1):
            steps.append(self.predict(codec, path[-1], actions))
            path.append(steps[-1].next_observations)
        rewards, terminations = (torch.stack([step[k] for step in steps], dim=1) for k in (1, 2))
        return Imagined(torch.stack(path, dim=1), rewards, terminations)
