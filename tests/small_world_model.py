"""A world model of two observations and one action, and segments for it."""

from functools import partial

import torch

from dawm.data.batches import BatchLoader, RowStream
from dawm.data.transitions import Segments, Transitions
from dawm.diffusion.denoisers import ResidualMLP
from dawm.world_model import DiffusionWorldModel

TINY = partial(ResidualMLP, width=16, depth=1)


def model(horizon=2, **kwargs):
    """A world model of two observations and one action with statistics that are easy to compute with."""
    world_model = DiffusionWorldModel(2, 1, horizon, **{"network": TINY, "warmup_steps": 1} | kwargs)
    for name, mean, std in (
        ("observation", [1.0, 2.0], [2.0, 4.0]),
        ("difference", [0.5, 0.0], [0.5, 2.0]),
        ("reward", [3.0], [2.0]),
        ("return", [10.0], [5.0]),
    ):
        normalizer = getattr(world_model.codec, f"{name}_normalizer")
        normalizer.load_state_dict({"mean": torch.tensor(mean), "std": torch.tensor(std)})
    return world_model


# One step from (0, 0) to (1, 2) with reward 5 that ends the task, then an absorbing step.
SEGMENT = Segments(
    observations=torch.tensor([[[0.0, 0.0], [1.0, 2.0], [1.0, 2.0]]]),
    actions=torch.tensor([[[0.7], [0.0]]]),
    rewards=torch.tensor([[5.0, 0.0]]),
    terminations=torch.tensor([[1.0, 1.0]]),
    valid=torch.tensor([[1.0, 0.0]]),
    returns_to_go=torch.tensor([5.0]),
)


def starts(count=5):
    return torch.randn(count, 2), torch.rand(count, 1) * 2 - 1, torch.randn(count) * 5 + 10


def seeded(world_model, start, seed=0, **kwargs):
    return torch.cat(
        [
            part.flatten(1)
            for part in world_model.imagine(*start, generator=torch.Generator().manual_seed(seed), **kwargs)
            if part is not None
        ],
        dim=1,
    )


def starts_of(segments):
    return segments.observations[:, 0], segments.actions[:, 0], segments.returns_to_go


def looping(segments, updates, batch_size):
    stream = RowStream(0)
    return BatchLoader(
        lambda k: segments[stream.draw(len(segments), k, batch_size)], [(stream, batch_size)], updates, 20
    )


def accelerating(count, horizon):
    """s' = s + 0.4 a with the same a at every step, r = s_1 + s_2, and the task ends once s_1 passes 1."""
    current, action = torch.rand(count, 2) * 2 - 1, torch.rand(count, 1) * 2 - 1
    observations, rewards, terminations, ended = [current], [], [], torch.zeros(count)
    for _ in range(horizon):
        alive = (1 - ended).unsqueeze(-1)
        rewards.append(current.sum(dim=-1) * alive[:, 0])
        current = current + 0.4 * action * torch.tensor([1.0, -1.0]) * alive
        ended = torch.maximum(ended, (current[:, 0] > 1).float())
        observations.append(current)
        terminations.append(ended)
    ends = torch.stack(terminations, dim=1)
    valid = 1 - torch.cat([torch.zeros(count, 1), ends[:, :-1]], dim=1)
    returns = torch.stack(rewards, dim=1)
    return Segments(
        torch.stack(observations, 1), action.unsqueeze(1) * valid.unsqueeze(-1), returns, ends, valid,
        returns.sum(dim=1),
    )  # fmt: skip


def fit_normalizers(world_model, segments):
    first = Transitions(
        segments.observations[:, 0], segments.actions[:, 0], segments.rewards[:, 0], segments.observations[:, 1],
        segments.terminations[:, 0],
    )  # fmt: skip
    world_model.codec.fit(first, segments.returns_to_go)
