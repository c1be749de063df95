"""What the forward models do in a synthesis: labels, and the filters for what contradicts them."""

import pytest
import torch
from small_world_model import model

from dawm.callbacks import RegenerateRollouts
from dawm.data.module import TransitionDataModule
from dawm.inverse_dynamics import InferredActions, InverseDynamics
from dawm.synthesis.guards import Bounds, DataStatistics, forward_quantiles
from dawm.synthesis.rollouts import Synthesizer
from dawm.world_model import Imagined

PUSH = torch.tensor([0.5, -0.5])


class Inverse(torch.nn.Module):
    """Infers 0.2 everywhere."""

    def infer(self, observations, next_observations):
        return InferredActions(torch.full((len(observations), 1), 0.2), torch.zeros(len(observations)))


def truth(observations, actions):
    """s' = s + a (0.5, -0.5), r = s_1, and the task ends where s'_1 is above 1."""
    following = observations + actions * PUSH
    return following, observations[..., 0], (following[..., 0] > 1).float()


def imagining(path, ends=0.0, disagreement=None):
    """A world model that imagines a path, and forward models that know the truth or, at a step, disagree about it."""
    world_model = model(horizon=path.shape[1] - 1, forward_members=2)
    rewards = torch.full(path.shape[:2], -99.0)[:, 1:]
    imagined = Imagined(path, rewards, torch.zeros_like(rewards) + ends)
    world_model.imagine = lambda *args, **kwargs: imagined

    def forward(codec, observations, actions):
        following, reward, end = truth(observations, actions)
        difference = codec.difference_normalizer(following - observations)
        row = torch.cat([difference, codec.reward_normalizer(reward.unsqueeze(-1)), 2 * end.unsqueeze(-1) - 1], -1)
        shift = torch.zeros_like(row) if disagreement is None else disagreement(observations).unsqueeze(-1)
        return torch.stack([row - shift, row + shift])

    world_model.forward_model.forward = forward
    return world_model


def rollouts(world_model, path, **settings):
    synthesizer = Synthesizer(world_model, Inverse(), **settings)
    start = path[:, 0], torch.full((len(path), 1), -0.4), torch.zeros(len(path))
    return synthesizer.judge(synthesizer.imagine(start))


def true_path(start, steps=3):
    """A path by the action -0.4, then 0.2."""
    states = [torch.tensor(start)]
    for k in range(steps):
        states.append(truth(states[-1], torch.full((len(start), 1), 0.2 if k else -0.4))[0])
    return torch.stack(states, dim=1)


def test_labels_of_perfect_forward_models_are_the_truth():
    """At the observations imagined, by the given first action and the inferred later ones."""
    path = torch.randn(5, 4, 2).clamp(-0.8, 0.8)
    made = rollouts(imagining(path), path, labels="forward")
    steps = made.transitions()
    following, rewards, ends = truth(steps.observations, steps.actions)
    assert torch.equal(steps.observations, path[:, :3].reshape(-1, 2))
    assert steps.actions.view(5, 3)[0].tolist() == pytest.approx([-0.4, 0.2, 0.2])
    torch.testing.assert_close(steps.next_observations, following)
    torch.testing.assert_close(steps.rewards, rewards)
    assert torch.equal(steps.terminations, ends)
    assert torch.equal(made.observations, path)
    plain = rollouts(imagining(path), path).transitions()
    assert torch.equal(plain.next_observations, path[:, 1:].reshape(-1, 2))
    assert (plain.rewards == -99).all()


def test_single_steps_are_the_same_transitions():
    path = true_path([[0.0, 0.0], [1.15, 0.0]])
    made = rollouts(imagining(path), path, labels="forward")
    single = made.single_steps()
    assert single.observations.shape == (5, 2, 2)  # the second one ends after its second step
    assert torch.equal(single.transitions().pack(), made.transitions().pack())
    assert single.counts == made.counts


def test_nothing_follows_an_end_that_either_model_sees():
    """The step that only the world model thinks the last is kept, and bootstraps by the forward models' word."""
    path = true_path([[0.0, 0.0], [1.05, 0.0]])
    ends = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    made = rollouts(imagining(path, ends), path, labels="forward")
    assert made.lengths.tolist() == [2, 3]
    assert made.transitions().terminations.tolist() == [0, 0, 0, 0, 1]
    path = true_path([[1.15, 0.0]])  # 0.95, then 1.05: over
    made = rollouts(imagining(path), path, labels="forward")
    assert (made.lengths.tolist(), made.counts["after_end"]) == ([2], 1)


def test_an_inconsistent_step_and_its_tail_are_dropped_and_counted():
    """Off by 1 in the first dimension, whose differences have a standard deviation of 0.5: sqrt(2^2 / 2) = 1.414."""
    path = true_path([[0.0, 0.0], [-1.0, 0.0], [0.0, 5.0]])
    path[1, 2:, 0] -= 1.0
    for limit, lengths in ((1.4, [3, 1, 3]), (1.42, [3, 3, 3])):
        made = rollouts(imagining(path), path, max_inconsistency=limit)
        assert made.lengths.tolist() == lengths
        assert made.counts["inconsistent"] == 9 - sum(lengths)
        assert made.counts["kept"] == sum(lengths)
    assert torch.equal(made.next_observations, path[:, 1:])  # labels are still the imagined ones


def test_an_unfamiliar_step_and_its_tail_are_dropped_and_counted():
    """Members are 0.3 from their mean where the second observation is above 1, else they agree."""
    path = true_path([[0.0, 0.0], [0.0, 0.9]])
    world_model = imagining(path, disagreement=lambda observations: 0.3 * (observations[:, 1] > 1))
    made = rollouts(world_model, path, max_forward_disagreement=0.29)
    assert made.lengths.tolist() == [3, 1]
    assert made.counts["unfamiliar"] == 2
    assert rollouts(world_model, path, max_forward_disagreement=0.31).counts["unfamiliar"] == 0


def test_pessimism_lowers_rewards_where_the_forward_models_disagree():
    """By 10 x 0.3 where the second observation is above 1, whatever the range of the rewards."""
    path = true_path([[0.0, 0.0], [0.0, 0.9]])
    world_model = imagining(path, disagreement=lambda observations: 0.3 * (observations[:, 1] > 1))
    bounds = Bounds((torch.full((2,), -9.0), torch.full((2,), 9.0)), (torch.tensor(-1.0), torch.tensor(1.0)))
    plain, lowered = (
        rollouts(world_model, path, labels="forward", bounds=bounds, pessimism=by).steps().rewards for by in (0.0, 10.0)
    )
    torch.testing.assert_close(plain - lowered, torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
    made = rollouts(world_model, path, pessimism=10.0)  # of the world model's own rewards, too
    assert made.steps().rewards[1].tolist() == pytest.approx([-99, -102, -99])
    assert made.lengths.tolist() == [3, 3]
    made = rollouts(world_model, path, pessimism=10.0, usual_disagreement=0.1)  # 10 x (0.3 - 0.1), and not below 0
    assert made.steps().rewards[1].tolist() == pytest.approx([-99, -101, -99])


def test_limits_are_quantiles_of_held_out_real_transitions(dataset):
    """Held-out rows i lead from (i, e) to (i + 1, e); the forward models expect (i, e), and differ by i / 100."""
    data = TransitionDataModule(dataset, horizon=1, validation_fraction=0.5)
    world_model = model(forward_members=2)
    world_model.fit_normalizers(data)
    codec = world_model.codec

    def forward(codec, observations, actions):
        unchanged = codec.difference_normalizer(torch.zeros_like(observations))
        row = torch.cat([unchanged, torch.zeros(len(observations), 2)], dim=-1)
        shift = observations[:, :1] / 100 * torch.tensor([1.0, 0, 0, 0])
        return torch.stack([row + shift, row - shift])

    world_model.forward_model.forward = forward
    rows = torch.cat([batch.observations[:, 0] for batch in data.validation_transition_loader()])
    assert len(rows) > 5
    inconsistency, disagreement = forward_quantiles(world_model, data, 1.0, 0.5)
    scale = codec.difference_normalizer.std[0]
    assert inconsistency == pytest.approx(float(1 / scale / 2**0.5))
    assert disagreement == pytest.approx(float(rows.quantile(0.5) / 100))
    assert forward_quantiles(world_model, data, None, 1.0) == (None, pytest.approx(float(rows.max() / 100)))
    assert forward_quantiles(world_model, data, None, None) == (None, None)
    callback = RegenerateRollouts(pessimism=3.0)  # of what is more than on half of them
    callback.connect(world_model, InverseDynamics(2, 1))
    statistics = DataStatistics.of(data.episodes)
    assert statistics.observation_range[1][0] == 26, "the last row ends where no row begins"
    made = callback.synthesizer(data, statistics)
    assert (made.pessimism, made.usual_disagreement) == (3 * statistics.deviation_within, disagreement)
