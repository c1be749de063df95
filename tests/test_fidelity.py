"""Metrics of fidelity, by cases whose answer is known."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gymnasium.spaces import Box

from dawm.agents import IQL, TD3BC
from dawm.data.transitions import Transitions
from dawm.evaluation import diagnosis
from dawm.evaluation.diagnosis import Paths
from dawm.evaluation.fidelity import ColumnDistances, Novelty, ReturnResponse, TransitionErrors
from dawm.evaluation.simulator import Simulator
from dawm.synthesis.rollouts import Rollouts


def rows(count=4000):
    s, d = torch.randn(count, 1, 2), torch.randn(count, 1, 2) * torch.tensor([1.0, 5.0]) + 3
    return Transitions(s, torch.zeros(count, 1, 1), d.sum(-1), s + d, torch.zeros(count, 1))


def error_of(predicted, true, valid=None):
    difference = (true.next_observations - true.observations).flatten(0, -2)
    metric = TransitionErrors(true.rewards.shape[1], difference.std(0, correction=0), true.rewards.std(correction=0))
    metric.update(predicted, true, torch.ones_like(true.rewards).bool() if valid is None else valid)
    return metric.compute()


def test_transition_errors_of_a_perfect_a_mean_and_a_shuffled_model():
    true = rows()
    for figure in ("observation", "reward", "termination", "raw_observation"):
        assert error_of(true, true)[figure].item() == 0
    mean = (true.next_observations - true.observations).mean(0, keepdim=True)
    guess = replace(true, next_observations=true.observations + mean, rewards=true.rewards.mean().expand(4000, 1))
    assert error_of(guess, true)["observation"].item() == pytest.approx(1, rel=1e-5)
    assert error_of(guess, true)["reward"].item() == pytest.approx(1, rel=1e-5)
    # (d_i - d_j)^2 of independent rows is twice the variance
    order = torch.randperm(4000)
    drawn = true.observations + (true.next_observations - true.observations)[order]
    shuffled = replace(true, next_observations=drawn, rewards=true.rewards[order])
    found = error_of(shuffled, true)
    assert found["observation"].item() == pytest.approx(2, rel=0.1)
    assert found["reward"].item() == pytest.approx(2, rel=0.1)
    assert found["raw_observation"].item() == pytest.approx(2 * (1 + 25) / 2, rel=0.1)


def test_transition_errors_by_hand_and_only_of_what_counts():
    zero = torch.zeros(2, 2)
    true = Transitions(torch.zeros(2, 2, 1), torch.zeros(2, 2, 1), zero, torch.zeros(2, 2, 1), zero)
    predicted = replace(
        true, rewards=torch.tensor([[1.0, 4.0], [3.0, torch.nan]]), terminations=torch.tensor([[1.0, 0.0], [0.2, 1.0]]),
        next_observations=torch.tensor([[[2.0], [4.0]], [[6.0], [torch.inf]]]),
    )  # fmt: skip
    metric = TransitionErrors(2, torch.tensor([2.0]), torch.tensor(0.5))
    metric.update(predicted, true, torch.tensor([[True, True], [True, False]]))
    found = metric.compute()
    assert found["observation"].tolist() == [(1 + 9) / 2, 4]
    assert found["raw_observation"].tolist() == [20, 16]
    assert found["mean_observation"].item() == pytest.approx(14 / 3)
    assert found["reward"].tolist() == [(1 + 9) / 2 * 4, 64]
    assert found["termination"].tolist() == [0.5, 0]
    assert found["count"].tolist() == [2, 1]


def test_the_simulator_is_true_to_itself_and_shuffled_steps_are_not():
    simulator = Simulator("Hopper-v5")
    start = torch.stack([torch.tensor(simulator.env.reset(seed=k)[0]) for k in range(40)]).float()
    actions, space = torch.rand(40, 3, 3) * 2 - 1, Box(-1, 1, (3,))
    outcome = simulator.open_loop(start.double().numpy(), actions.numpy())
    following, rewards, ends = (torch.from_numpy(part).float() for part in outcome[:3])
    path = torch.cat([start.unsqueeze(1), following], dim=1)
    steps = Transitions(path[:, :-1], actions, rewards, following, ends)
    paths = Paths(path, steps, torch.zeros(40), {"real": torch.ones(40, 3).bool()})
    units = SimpleNamespace(difference_std=(following - path[:, :-1]).flatten(0, 1).std(0), reward_std=rewards.std())
    found = diagnosis.simulated(simulator, paths, space, units)
    assert found["clipped"]["real"] == 0
    for kind in ("one_step", "open_loop"):
        assert found[kind]["real"]["observation"].max() < 1e-6
        assert found[kind]["real"]["reward"].max() < 1e-6
        assert found[kind]["real"]["termination"].max() == 0
    other = replace(steps, next_observations=steps.observations + (following - path[:, :-1]).roll(1, 0))
    shuffled = diagnosis.simulated(simulator, replace(paths, steps=other), space, units)
    assert 1 < shuffled["one_step"]["real"]["mean_observation"] < 3


def test_novelty_is_0_for_copies_and_a_distance_in_standard_deviations_else():
    reference = torch.tensor([[-1.0, -10.0], [1.0, 10.0]])  # standard deviations 1 and 10
    metric = Novelty(reference)
    metric.update(torch.tensor([[1.0, 10.0], [-1.0, -10.0], [4.0, 50.0]]))
    found = metric.compute()
    assert found["median"] == 0
    assert found["copies"].item() == pytest.approx(2 / 3)
    assert found["mean"].item() == pytest.approx(5 / 3)  # 3 and 4 standard deviations away


def test_columns_shifted_by_two_standard_deviations_and_turned_round():
    reference = torch.randn(5000, 2) @ torch.tensor([[3.0, 3.0], [0.0, 1.0]])
    same, shifted, turned = ColumnDistances(reference), ColumnDistances(reference), ColumnDistances(reference)
    same.update(reference)
    shifted.update(reference + 2 * reference.std(0) * torch.tensor([1.0, 0.0]))
    turned.update(reference * torch.tensor([1.0, -1.0]))
    assert same.compute()["marginal"].tolist() == [0, 0]
    assert same.compute()["correlation"] == 0
    assert shifted.compute()["marginal"].tolist() == pytest.approx([2, 0], abs=1e-3)
    expected = 2 * torch.corrcoef(reference.T)[0, 1].item()
    assert turned.compute()["correlation"].item() == pytest.approx(expected, rel=1e-4)


def test_return_response_of_a_line_of_noise_and_of_one_target():
    asked = torch.randn(2000)
    line, constant = ReturnResponse(), ReturnResponse()
    line.update(asked, 0.5 * asked + 0.5 * torch.randn(2000))
    found = line.compute()
    assert found["slope"].item() == pytest.approx(0.5, abs=0.05)
    assert found["correlation"].item() == pytest.approx(0.5**0.5, abs=0.05)
    constant.update(torch.full((5,), 3.0), torch.randn(5))
    assert constant.compute()["asked"] == 3
    assert constant.compute()["slope"].isnan()


def test_the_window_is_discounted_and_ends_with_the_task():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
    ends = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 0, 0]])
    chosen = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()  # of the last rollout a step is lost
    steps = Transitions(torch.zeros(3, 3, 1), torch.zeros(3, 3, 1), rewards, torch.zeros(3, 3, 1), ends)
    found = diagnosis.return_response(Paths(torch.zeros(3, 4, 1), steps, torch.tensor([5.0, 3, 9]), {"x": chosen}), 0.5)
    assert found["x"]["rollouts"] == 2
    assert found["x"]["asked"] == 4
    assert found["x"]["obtained"] == ((1 + 1 + 1) + 1) / 2
    assert found["x"]["slope"] == 1


@pytest.mark.parametrize("beside", [False, True])
def test_edges_are_the_kept_steps_that_bootstrap_and_do_not_lead_on(beside):
    """Those that lead beside the next start are; else the last ones are."""
    terminations = torch.tensor([[0.0, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]])
    path, rows = torch.arange(16.0).reshape(4, 4, 1), torch.zeros(4, 3, 1)
    lengths, following = torch.tensor([3, 2, 1, 0]), path[:, 1:].clone()
    following[0, 0] += 0.1 * beside
    edge, last = diagnosis.edges(Rollouts(path, rows, rows[..., 0], following, terminations, lengths, Counter()))
    assert last.tolist() == [[False, False, True], [False] * 3, [True, False, False], [False] * 3]
    assert edge.tolist() == [[beside, False, True], *last.tolist()[1:]]


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("agent_class", [TD3BC, IQL])
def test_td_targets_by_hand(agent_class, seeds):
    agent = agent_class(2, 1, hidden=(), seeds=seeds)
    agent.target_critics.weights.data.zero_()
    agent.target_critics.weights.data[..., -1] = torch.tensor([7.0, 6.0])  # the biases of the two critics
    steps = Transitions(torch.zeros(2, 2), torch.zeros(2, 1), torch.ones(2), torch.ones(2, 2), torch.tensor([0.0, 1]))
    found = diagnosis.td_targets(agent, {"edge": steps, "none": steps[:0]}, 0.5)
    assert found.keys() == {"edge"}
    assert found["edge"]["mean"] == (1 + 0.5 * 6 + 1) / 2
    assert found["edge"]["quantile_99"] == 4
    assert diagnosis.td_targets(torch.nn.Linear(1, 1), {"edge": steps}, 0.5) is None
