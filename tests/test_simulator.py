"""The simulator as a judge: its state is set from an observation, and what follows is what was recorded."""

import gymnasium as gym
import numpy as np
import pytest

from dawm.errors import UserError
from dawm.evaluation.simulator import Simulator


def recorded(env_id: str, steps: int, seed: int = 1):
    """One random episode: observations (T + 1, O), actions (T, A), rewards (T,), terminations (T,)."""
    env = gym.make(env_id)
    env.action_space.seed(seed)
    observations, actions, rewards, ends = [env.reset(seed=seed)[0]], [], [], []
    while len(actions) < steps and not any(ends):
        actions.append(env.action_space.sample())
        observation, reward, terminated, _, _ = env.step(actions[-1])
        observations.append(observation)
        rewards.append(reward)
        ends.append(terminated)
    env.close()
    return tuple(np.array(values) for values in (observations, actions, rewards, ends))


@pytest.mark.parametrize("env_id", ["Hopper-v5", "HalfCheetah-v5", "Walker2d-v5"])
def test_a_recorded_step_follows_from_its_observation(env_id):
    observations, actions, rewards, ends = recorded(env_id, 30)
    simulator = Simulator(env_id)
    known = ~simulator.clipped(observations[:-1])
    assert known.sum() > 1
    # in an order of its own: nothing may be left over from the step before
    order = np.random.default_rng(0).permutation(np.flatnonzero(known))
    found = simulator.one_step(observations[order], actions[order])
    np.testing.assert_allclose(found.next_observations, observations[1:][order], atol=1e-6)
    np.testing.assert_allclose(found.rewards, rewards[order], atol=1e-6)
    np.testing.assert_array_equal(found.terminations, ends[order])
    assert found.played.all()
    if known.all():
        path = simulator.open_loop(observations[:1], actions[None])
        np.testing.assert_allclose(path.next_observations[0], observations[1:], atol=1e-5)
        np.testing.assert_array_equal(path.terminations[0], ends)
    simulator.close()


def test_what_an_observation_leaves_out():
    simulator = Simulator("Hopper-v5")
    assert (simulator.skipped, simulator.velocity_limit) == (1, 10.0)
    observation = np.arange(11.0)
    positions, velocities = simulator.state_from_observation(observation)
    np.testing.assert_array_equal(positions, [0, 0, 1, 2, 3, 4])
    np.testing.assert_array_equal(velocities, [5, 6, 7, 8, 9, 10])
    np.testing.assert_array_equal(simulator.clipped(np.stack([observation, observation - 0.5])), [True, False])
    assert Simulator("HalfCheetah-v5").velocity_limit == np.inf


def test_what_is_not_finite_ends_a_rollout_and_is_not_played():
    simulator = Simulator("Hopper-v5")
    observations = np.stack([simulator.env.reset(seed=0)[0], np.full(11, np.nan), np.full(11, 1e9)])
    actions = np.zeros((3, 3, 3), dtype=np.float32)
    actions[0, 1] = np.nan
    found = simulator.open_loop(observations, actions)
    np.testing.assert_array_equal(found.played, [[True, False, False], [False] * 3, [False] * 3])
    np.testing.assert_array_equal(np.isfinite(found.rewards), found.played)


class Hidden(gym.ObservationWrapper):
    """Hopper, whose observations are of the right size and in other units."""

    def __init__(self):
        super().__init__(gym.make("Hopper-v5"))

    def observation(self, observation):
        return observation / 2


@pytest.mark.parametrize(
    ("environment", "reason"),
    [("Ant-v5", "105 numbers"), ("Pendulum-v1", "no MuJoCo"), (Hidden, "do not hold its state")],
)
def test_an_environment_whose_state_is_not_in_its_observation_is_refused(environment, reason):
    with pytest.raises(UserError, match=f"--env_id: got .*{reason}"):
        Simulator(environment, "env_id")
