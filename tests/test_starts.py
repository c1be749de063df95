"""Where imagined futures begin: rows by weight, first actions, and targets that are within reach."""

import pytest
import torch

from dawm.data.batches import WeightedRows
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Transitions
from dawm.errors import UserError
from dawm.synthesis.starts import Starts, policy_of
from dawm.synthesis.targets import FeasibleReturn


class Agent(torch.nn.Module):
    """Of two seeds, acting by 0.1 and 0.7 times the episode's number; with dropout while it trains."""

    device = torch.device("cpu")

    def __init__(self, seeds=2):
        super().__init__()
        self.seeds, self.dropout = seeds, torch.nn.Dropout(0.5)

    def act(self, observations):
        scale = torch.tensor([0.1, 0.7])[: self.seeds].view(-1, 1, 1)
        actions = self.dropout(observations[..., 1:] / 10) * scale
        return actions if self.seeds > 1 else actions[0]


def test_rows_are_drawn_by_weight_with_their_own_action_and_return(dataset):
    """The second of the six episodes, rows 5 to 7, alone."""
    data = TransitionDataModule(dataset, horizon=1)
    weights = torch.zeros(26, dtype=torch.float64)
    weights[5:8] = 26 / 3
    observations, actions, targets = Starts(weighted=WeightedRows(weights))(data, 50, seed=0)
    rows = observations[:, 0].long()
    assert rows.unique().tolist() == [5, 6, 7]
    assert torch.equal(actions, data.episodes.transitions.actions[rows])
    assert torch.equal(targets, data.returns_to_go[rows])


def test_first_actions_of_a_policy_are_noisy_bounded_and_what_targets_are_asked_for(dataset):
    data, asked = TransitionDataModule(dataset, horizon=1), []

    def target(observations, actions, own):
        asked.append((observations, actions, own))
        return own + 1

    plain = Starts()(data, 4000, seed=0)
    policy = policy_of(Agent(), 1)
    observations, actions, targets = Starts(target, policy=policy, noise=0.5)(data, 4000, seed=0)
    assert torch.equal(observations, plain[0])
    assert torch.equal(targets, plain[2] + 1)
    assert torch.equal(asked[0][1], actions)
    assert (actions.min(), actions.max()) == (-1, 1)
    noise = (actions - 0.07 * observations[:, 1:])[observations[:, 1] == 0]  # so far from the bounds
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(0.47, abs=0.03)  # 0.5, clipped at two standard deviations
    exact = Starts(policy=policy)(data, 5, seed=0)
    torch.testing.assert_close(exact[1], 0.07 * exact[0][:, 1:])


def test_a_policy_is_asked_in_evaluation_mode_and_seed_by_seed():
    observations = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
    agent = Agent().train()
    state = torch.get_rng_state()
    for seed, expected in ((0, [0.01, 0.02, 0.03]), (1, [0.07, 0.14, 0.21]), (None, [0.01, 0.14, 0.03])):
        assert policy_of(agent, seed)(observations)[:, 0].tolist() == pytest.approx(expected)
    assert policy_of(Agent(seeds=1))(observations)[:, 0].tolist() == pytest.approx([0.01, 0.02, 0.03])
    assert agent.training
    assert torch.equal(torch.get_rng_state(), state)


# Feasible returns


def rows(observations, actions):
    zeros = torch.zeros(len(observations))
    return Transitions(observations, actions, zeros, observations, zeros)


def test_a_feasible_return_is_the_expectile_of_what_the_data_had_there(monkeypatch):
    """Of 0 and 1 equally often the expectile tau is tau: tau (1 - e) = (1 - tau) e. Elsewhere the return is 4 + a."""
    monkeypatch.setattr(FeasibleReturn, "updates", 600)
    split = torch.arange(2000) % 2 == 0
    observations, actions = torch.where(split, 0.0, 1.0).unsqueeze(1), torch.rand(2000, 1) * 2 - 1
    returns = torch.where(split, (torch.arange(2000) % 4 == 0).float(), 4 + actions[:, 0])
    target = FeasibleReturn(0.9).fit(rows(observations, actions), returns)
    asked = torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.tensor([[-0.5], [0.5], [-0.5], [0.5]])
    found = target(*asked, torch.full((4,), -1.0))
    torch.testing.assert_close(found, torch.tensor([0.9, 0.9, 3.5, 4.5]), rtol=0, atol=0.06)
    own = torch.tensor([5.0, -1.0, 0.0, 9.0])
    assert target(*asked, own).tolist() == torch.maximum(found, own).tolist()


def test_fitting_gives_the_same_again_and_leaves_the_random_numbers_of_training(monkeypatch):
    monkeypatch.setattr(FeasibleReturn, "updates", 20)
    data, returns = rows(torch.randn(300, 2), torch.randn(300, 1)), torch.randn(300)
    asked, found = (torch.zeros(3, 2), torch.zeros(3, 1), torch.full((3,), -9.0)), []
    for seed in (0, 0, 1):
        torch.rand(3)
        state = torch.get_rng_state()
        found.append(FeasibleReturn().fit(data, returns, seed)(*asked))
        assert torch.equal(torch.get_rng_state(), state)
    first, again, other = found
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("expectile", [0.4, 1.0])
def test_an_expectile_below_the_mean_or_of_1_is_refused(expectile):
    with pytest.raises(UserError, match=r"target_return\.expectile"):
        FeasibleReturn(expectile)


def test_a_frozen_part_of_an_agent_stays_frozen():
    agent = Agent()
    agent.frozen = torch.nn.Dropout(0.5).eval()
    policy_of(agent)(torch.ones(4, 2))
    assert (agent.training, agent.dropout.training, agent.frozen.training) == (True, True, False)
