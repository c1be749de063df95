"""Evaluation, in an environment whose returns are known on paper."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import data_of

from dawm.agents import TD3BC
from dawm.data.sources.scores import ReferenceScores
from dawm.data.transitions import Transitions
from dawm.errors import UserError
from dawm.evaluation.environments import warn_once
from dawm.evaluation.episodes import bootstrap_interval, evaluate, run_episodes, summarize


class Counter(gym.Env):
    """Starts at seed % 7 and pays the action at each step; truncated after seed % 7 + 1 steps, or by an action of 9."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.array([1.0], np.float32), np.array([9.0], np.float32))
    made: list["Counter"] = []

    def __init__(self, as_dict: bool = False) -> None:
        if as_dict:
            part = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
            self.observation_space = gym.spaces.Dict({"left": part, "step": part})
        self.as_dict = as_dict
        self.closed = False
        self.over = True
        Counter.made.append(self)

    def _observation(self):
        if self.as_dict:
            return {"left": np.array([float(self.left)]), "step": np.array([float(self.steps)])}
        return np.array([self.left, self.steps], dtype=np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.steps, self.over = seed % 7 + 1, 0, False
        return self._observation(), {}

    def step(self, action):
        assert not self.over, "stepped after an episode's end"
        assert action.dtype == np.float32
        self.left, self.steps = self.left - 1, self.steps + 1
        terminated, truncated = bool(action[0] == 9), self.left == 0
        self.over = terminated or truncated
        return self._observation(), float(action[0]), terminated, truncated, {}

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def _clean():
    Counter.made.clear()
    warn_once.cache_clear()
    torch.manual_seed(0)


def always(action):
    """A policy, of any number of agents, that knows one action; 0 is 5 in the environment's units."""
    return lambda observations: torch.full((*observations.shape[:-1], 1), action)


still = always(0.0)


def units(low, high):
    """A Box of actions, as of a data set."""
    return gym.spaces.Box(low, high, (1,), np.float32)


# Functions


@pytest.mark.parametrize("num_envs", [1, 2, 4, 20])
def test_returns_of_seeded_episodes(num_envs):
    returns = run_episodes(still, Counter, range(5, 14), num_envs)
    assert returns.tolist() == [5.0 * (seed % 7 + 1) for seed in range(5, 14)]
    assert len(Counter.made) == min(num_envs, 9)
    assert all(env.closed for env in Counter.made)


def test_actions_are_scaled_to_the_box_and_clipped():
    assert run_episodes(always(-0.5), Counter, [0], 1).tolist() == [3.0]
    assert run_episodes(always(-2.0), Counter, [0], 1).tolist() == [1.0]
    # 9 ends the episode at once
    assert run_episodes(always(2.0), Counter, [6], 1).tolist() == [9.0]


def test_actions_are_played_in_the_data_s_units():
    for action, played in ((-1.0, 2.0), (0.5, 3.5), (1.0, 4.0), (1.5, 4.0)):
        assert run_episodes(always(action), Counter, [0], action_space=units(2, 4)).tolist() == [played]
    assert evaluate(always(1.0), Counter, episodes=1, seed=0, action_space=units(2, 4)).returns.tolist() == [4.0]


def test_actions_that_the_environment_does_not_take(recwarn):
    for _ in range(2):
        assert run_episodes(always(-1.0), Counter, [0], action_space=units(0, 4)).tolist() == [1.0]
    (warning,) = recwarn
    assert "'Counter' takes actions from 1 to 9 in entry 0, the data's go from 0 to 4" in str(warning.message)
    for recorded, part in ((units(-1, 0.5), "from -1 to 0.5"), (gym.spaces.Box(-1, 1, (2,)), "expected 2 as in")):
        with pytest.raises(UserError, match=f"--data.env_id: got 'Counter' with .*{part}"):
            run_episodes(still, Counter, [0], action_space=recorded)


def test_unbounded_actions_need_the_data_s_units():
    def make():
        env = Counter()
        env.action_space = units(-np.inf, np.inf)
        return env

    assert run_episodes(always(0.5), make, [0], action_space=units(2, 4)).tolist() == [3.5]
    with pytest.raises(UserError, match="without finite bounds"):
        run_episodes(still, make, [0])
    assert all(env.closed for env in Counter.made)


# Agents side by side


@pytest.mark.parametrize("num_envs", [1, 3, 20])
def test_agents_side_by_side_earn_what_each_earns_alone(num_envs):
    spec, asked = replace(gym.spec("Pendulum-v1"), max_episode_steps=30), []
    agent = TD3BC(3, 1, hidden=[32, 32], seeds=3)
    agent.fit_normalizers(data_of(Transitions(torch.randn(99, 3), *[torch.zeros(99)] * 4)))

    def act(observations):
        asked.append(observations.shape)
        return agent.act(observations)

    together = run_episodes(act, spec, range(5), num_envs, agents=3)
    # one call serves all: as many calls as the episodes of one agent take
    assert len(asked) == 30 * -(-5 // num_envs)
    assert set(asked) == {(3, 32 if num_envs > 16 else 16, 3)} or num_envs == 20
    for member, returns in enumerate(together):
        alone = run_episodes(lambda o, member=member: agent.act(o)[member], spec, range(5), num_envs)
        assert returns.tolist() == alone.tolist()
    assert len({*together[:, 0]}) == 3
    assert evaluate(agent.act, spec, 5, 0, num_envs, seeds=3).returns.tolist() == together.tolist()


def test_agents_whose_episodes_end_at_different_times():
    def act(observations):
        """The second agent ends every episode at once; the first plays on."""
        return torch.tensor([0.0, 1.0])[:, None, None].expand(2, observations.shape[1], 1)

    returns = run_episodes(act, Counter, range(7), num_envs=2, agents=2)
    assert returns.tolist() == [[5.0 * (seed % 7 + 1) for seed in range(7)], [9.0] * 7]
    assert len(Counter.made) == 4
    assert all(env.closed for env in Counter.made)


def test_a_policy_that_answers_in_another_shape():
    with pytest.raises(UserError, match=r"--agent: got actions of shape \(16,\) from act, expected \(16, 1\)"):
        run_episodes(lambda o: torch.zeros(len(o)), Counter, [0])


def test_dict_observations_are_flattened_to_float32():
    seen = []

    def act(observations):
        seen.append(observations[0])
        return still(observations)

    run_episodes(act, lambda: Counter(as_dict=True), [2], 1)
    torch.testing.assert_close(torch.stack(seen), torch.tensor([[3.0, 0.0], [2.0, 1.0], [1.0, 2.0]]))


def test_environments_are_closed_after_an_error():
    with pytest.raises(RuntimeError):
        run_episodes(lambda o: (_ for _ in ()).throw(RuntimeError()), Counter, range(3), 3)
    assert len(Counter.made) == 3
    assert all(env.closed for env in Counter.made)


@pytest.mark.parametrize("environment", ["NoSuchEnvironment-v0", "no_such_module:Env-v0", gym.spec("CartPole-v1")])
def test_unusable_environment_is_a_user_error(environment):
    with pytest.raises(UserError, match="--data.env_id"):
        run_episodes(still, environment, [0])


def test_bootstrap_interval():
    assert bootstrap_interval([4.0]) == (4.0, 4.0)
    assert bootstrap_interval([3.0, -1.5, 12.25, 7.0, 0.5]) == pytest.approx((0.2, 8.85), abs=1e-12)
    assert bootstrap_interval([[3.0, -1.5, 12.25], [7.0, 0.5, 2.0]]) == pytest.approx(
        (0.75, 8.41666666666666), abs=1e-12
    )
    values = np.random.default_rng(1).normal(10, 2, size=400)
    low, high = bootstrap_interval(values)
    # the normal approximation: mean plus or minus 1.96 standard errors
    half_width = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=0.02)
    assert bootstrap_interval(values) == (low, high)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_summary_gives_scores_where_there_is_a_reference():
    result = evaluate(still, Counter, episodes=7, seed=0, reference=ReferenceScores(0.0, 40.0, "paper"))
    assert result.mean_return == 20.0
    assert result.score == 50.0
    assert result.score_low == pytest.approx(result.low * 2.5)
    assert result.score_high == pytest.approx(result.high * 2.5)
    assert result.low < 20 < result.high
    assert summarize(np.array([1.0, 2.0])).score is None
