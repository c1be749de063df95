"""Environments side by side: every return is that of Gymnasium's own loop, to the last bit."""

import threading
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from dawm.agents import TD3BC
from dawm.data.transitions import Transitions
from dawm.evaluation.environments import PlanarRobots, planar_robot
from dawm.evaluation.episodes import run_episodes


def gymnasium_s_own_loop(act, environment, seeds):
    """Returns, and whether each episode was truncated instead of terminated."""
    returns, truncations = [], []
    env = gym.make(environment)
    for seed in seeds:
        (observation, _), total, over = env.reset(seed=seed), 0.0, False
        while not over:
            action = act(torch.as_tensor(observation, dtype=torch.float32).expand(16, -1))[0].numpy()
            observation, reward, terminated, truncated, _ = env.step(action)
            total, over = total + reward, terminated or truncated
        returns.append(total)
        truncations.append(not terminated)
    env.close()
    return returns, truncations


def gentle_policy(observation_size, action_size):
    """A fresh agent with small actions, under which robots stand for some 100 steps."""
    torch.manual_seed(0)
    agent = TD3BC(observation_size, action_size)
    agent.fit_normalizers(Transitions(torch.randn(99, observation_size), *[torch.zeros(99)] * 4))
    return lambda observations: 0.1 * agent.act(observations)


# within these limits some of the robots fall; the cheetah cannot
@pytest.mark.parametrize(("name", "limit"), [("Hopper-v5", 105), ("Walker2d-v5", 79), ("HalfCheetah-v5", 40)])
def test_robots_equal_gymnasium_s_own_loop(name, limit):
    pytest.importorskip("mujoco")
    spec = replace(gym.spec(name), max_episode_steps=limit)
    env = gym.make(spec, disable_env_checker=True)
    assert planar_robot(env) is not None
    act = gentle_policy(env.observation_space.shape[0], env.action_space.shape[0])
    seeds = range(12)
    expected, truncations = gymnasium_s_own_loop(act, spec, seeds)
    assert len(set(expected)) == len(seeds)
    assert set(truncations) == ({True} if name == "HalfCheetah-v5" else {True, False})
    for num_envs, threads in ((1, 1), (5, 1), (12, 1), (12, 4)):
        assert run_episodes(act, spec, seeds, num_envs, threads=threads).tolist() == expected
    # what a function makes is stepped one by one
    assert run_episodes(act, lambda: gym.make(spec), seeds, 5).tolist() == expected


@pytest.mark.parametrize("name", ["Hopper-v5", "Walker2d-v5", "HalfCheetah-v5"])
def test_any_state_is_observed_and_judged_as_in_gymnasium(name):
    pytest.importorskip("mujoco")
    env = gym.make(name, disable_env_checker=True)
    robots = PlanarRobots(env, planar_robot(env), 2000, 1)
    generator = np.random.default_rng(0)
    robots.velocities[:] = generator.normal(0, 1, robots.velocities.shape) * generator.choice([1, 50], (2000, 1))
    robots.positions[:] = generator.normal(0, 1, robots.positions.shape) * generator.choice([1, 50], (2000, 1))
    robots.positions[:, 1] = generator.uniform(0.5, 2.2, 2000)
    robots.positions[:, 2] = generator.choice([0.1, 1], 2000) * generator.uniform(-1.3, 1.3, 2000)
    observations, stand = [], []
    for positions, velocities in zip(robots.positions, robots.velocities):
        env.unwrapped.data.qpos[:], env.unwrapped.data.qvel[:] = positions, velocities
        observations.append(env.unwrapped._get_obs())
        stand.append(getattr(env.unwrapped, "is_healthy", None))
    assert np.array_equal(robots.observations(np.arange(2000)), observations)
    if name != "HalfCheetah-v5":
        assert robots.robot.healthy(robots.positions, robots.velocities).tolist() == stand
        assert 200 < sum(stand) < 1800


def test_robots_with_settings_or_wrappers_run_as_gymnasium_has_them():
    pytest.importorskip("mujoco")
    paid = replace(gym.spec("Hopper-v5"), kwargs={"healthy_reward": 2.0})
    wrapper = gym.wrappers.TransformReward(gym.make("Hopper-v5"), lambda reward: 2 * reward).spec
    act = gentle_policy(11, 3)
    for spec in (paid, wrapper):
        assert planar_robot(gym.make(spec, disable_env_checker=True)) is None
        expected, _ = gymnasium_s_own_loop(act, spec, range(3))
        assert run_episodes(act, spec, range(3)).tolist() == expected


def test_robots_and_threads_are_released_after_an_error(monkeypatch):
    hopper = pytest.importorskip("gymnasium.envs.mujoco.hopper_v5")
    closed, before, steps = [], threading.active_count(), iter(range(3))
    monkeypatch.setattr(hopper.HopperEnv, "close", lambda env: closed.append(env))

    def act(observations):
        next(steps)  # raises at the fourth step, when the threads have started
        return torch.zeros(len(observations), 3)

    with pytest.raises(StopIteration):
        run_episodes(act, "Hopper-v5", range(6), threads=3)
    assert len(closed) == 1
    assert threading.active_count() == before
