"""Environments that take their steps together, each at its own time of its own episode.

Symbols: N environments, B of them that take a step, O observation size, A action size, P positions, V velocities.

``GymnasiumEnvironments`` are of any kind and take their steps one after the other. Gymnasium's own vector environments
step finished episodes on or start others in their place; here a finished environment is left alone until its reset.

``PlanarRobots`` are Gymnasium's planar MuJoCo robots: the physics runs in threads, everything else for all robots at
once. Every robot has an ``MjData`` of its own, on which ``mj_step`` does what it does in Gymnasium's environment: each
number is the same to the last bit. ``mujoco.rollout`` does not allow that. It simulates many robots with one ``MjData``
per thread, and hands back their states but not the accelerations from which the next step's solver would start. Its
observations differ in the last bits, and contacts magnify these into another episode.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import OrderEnforcing, TimeLimit
from numpy.typing import NDArray

__all__ = ["GymnasiumEnvironments", "PlanarRobot", "PlanarRobots", "planar_robot"]


class GymnasiumEnvironments:
    """N environments of any kind with flat observations.

    Args:
        envs: The environments.
    """

    def __init__(self, envs: Sequence[gym.Env]) -> None:
        self.env, self.envs = envs[0], envs
        assert isinstance(self.env.observation_space, gym.spaces.Box)
        self.current = np.zeros((len(envs), *self.env.observation_space.shape))

    def reset(self, slot: int, seed: int) -> None:
        """Starts the episode of a seed in one of the environments."""
        self.current[slot], _ = self.envs[slot].reset(seed=seed)

    def observations(self, slots: NDArray) -> NDArray:
        """Observations, shape (B, O).

        Args:
            slots: Numbers of the environments, shape (B,).
        """
        return self.current[slots]

    def step(self, slots: NDArray, actions: NDArray) -> tuple[NDArray, NDArray]:
        """Rewards and whether the episodes are over, by termination or truncation; both of shape (B,).

        Args:
            slots: Numbers of the environments that take a step, shape (B,).
            actions: Their actions, shape (B, A).
        """
        rewards, over = np.zeros(len(slots)), np.zeros(len(slots), dtype=bool)
        for row, (slot, action) in enumerate(zip(slots, actions)):
            self.current[slot], reward, terminated, truncated, _ = self.envs[slot].step(action)
            rewards[row], over[row] = float(reward), terminated or truncated
        return rewards, over


@dataclass(frozen=True)
class PlanarRobot:
    """What tells one robot from another; the numbers are the defaults of Gymnasium's environments.

    Args:
        control_cost: Weight of the squared action in the reward.
        velocity_limit: Bound of the observed velocities.
        healthy: Positions, shape (B, P), and velocities, shape (B, V), to whether the robot stands, shape (B,), which
            earns 1 a step; None where it cannot fall.
    """

    control_cost: float
    velocity_limit: float = np.inf
    healthy: Callable[[NDArray, NDArray], NDArray] | None = None


def _hopper_stands(positions: NDArray, velocities: NDArray) -> NDArray:
    state = np.concatenate([positions[:, 2:], velocities], axis=1)
    return (np.abs(state) < 100).all(axis=1) & (positions[:, 1] > 0.7) & (np.abs(positions[:, 2]) < 0.2)


def _walker_stands(positions: NDArray, velocities: NDArray) -> NDArray:
    return (positions[:, 1] > 0.8) & (positions[:, 1] < 2.0) & (np.abs(positions[:, 2]) < 1.0)


ROBOTS = {
    "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv": PlanarRobot(control_cost=0.1),
    "gymnasium.envs.mujoco.hopper_v5:HopperEnv": PlanarRobot(1e-3, 10.0, _hopper_stands),
    "gymnasium.envs.mujoco.walker2d_v5:Walker2dEnv": PlanarRobot(1e-3, 10.0, _walker_stands),
}


def planar_robot(env: Any) -> PlanarRobot | None:
    """The robot of an environment made by ``gym.make``; None where it is another one, or has settings or wrappers.

    Args:
        env: The Gymnasium environment.
    """
    if type(env) is not TimeLimit or type(env.env) is not OrderEnforcing or env.env.env is not env.unwrapped:
        return None
    entry_point = None if env.spec is None or env.spec.kwargs else env.spec.entry_point
    return ROBOTS.get(entry_point) if isinstance(entry_point, str) else None


class PlanarRobots:
    """N environments of one robot.

    Args:
        env: The Gymnasium environment, which starts the episodes of all of them.
        robot: What ``planar_robot`` says of it.
        count: Number of environments N.
        threads: Threads that share the physics; no result depends on their number.
    """

    def __init__(self, env: Any, robot: PlanarRobot, count: int, threads: int) -> None:
        import mujoco  # type: ignore[import-untyped]  # here: the package takes long to import

        self.mujoco, self.env, self.robot, self.threads = mujoco, env, robot, threads
        self.model, self.template = env.unwrapped.model, env.unwrapped.data
        self.frame_skip, self.seconds = env.unwrapped.frame_skip, env.unwrapped.dt
        self.time_limit = env.spec.max_episode_steps
        self.data = [mujoco.MjData(self.model) for _ in range(count)]
        # views into MuJoCo's memory, kept because making one takes longer than copying what it shows
        self.views = [(data.qpos, data.qvel, data.ctrl) for data in self.data]
        self.positions, self.velocities = np.zeros((count, self.model.nq)), np.zeros((count, self.model.nv))
        self.ages = np.zeros(count, dtype=np.int64)
        self.pool = ThreadPoolExecutor(max(1, threads - 1))

    def reset(self, slot: int, seed: int) -> None:
        """Starts the episode of a seed in one of the environments."""
        self.env.reset(seed=seed)
        self.mujoco.mj_copyData(self.data[slot], self.model, self.template)
        self.positions[slot], self.velocities[slot], _ = self.views[slot]
        self.ages[slot] = 0

    def observations(self, slots: NDArray) -> NDArray:
        """Observations, shape (B, O).

        Args:
            slots: Numbers of the environments, shape (B,).
        """
        limit = self.robot.velocity_limit
        # without the first position: how far the robot has come is not observed
        return np.concatenate([self.positions[slots, 1:], self.velocities[slots].clip(-limit, limit)], axis=1)

    def step(self, slots: NDArray, actions: NDArray) -> tuple[NDArray, NDArray]:
        """Rewards and whether the episodes are over, by termination or truncation; both of shape (B,).

        Args:
            slots: Numbers of the environments that take a step, shape (B,).
            actions: Their actions, shape (B, A).
        """
        starts = self.positions[slots, 0]
        self.move(slots.tolist(), actions)
        positions, velocities = self.positions[slots], self.velocities[slots]
        self.ages[slots] += 1
        over = self.ages[slots] >= self.time_limit
        # sums in Gymnasium's order, and the cost in the actions' single precision: the last bit counts
        rewards = (positions[:, 0] - starts) / self.seconds
        if self.robot.healthy is not None:
            stands = self.robot.healthy(positions, velocities)
            rewards, over = rewards + stands, over | ~stands
        return rewards - self.robot.control_cost * np.square(actions).sum(axis=1), over

    def move(self, slots: list[int], actions: NDArray) -> None:
        """Simulates one step of B environments, whose arguments are those of ``step``."""
        waiting = deque(zip(slots, actions))
        # waking a thread takes as long as one robot's physics
        helpers = [self.pool.submit(self._simulate, waiting) for _ in range(min(self.threads, len(slots) // 2) - 1)]
        self._simulate(waiting)
        for helper in helpers:
            # where other programs use the processor, a helper may find nothing left to do
            if not helper.cancel():
                helper.result()

    def _simulate(self, waiting: deque[tuple[int, NDArray]]) -> None:
        """Simulates one robot after the other until none waits."""
        while waiting:
            try:
                slot, action = waiting.pop()
            except IndexError:  # another thread has taken the last one
                return
            positions, velocities, control = self.views[slot]
            control[:] = action
            self.mujoco.mj_step(self.model, self.data[slot], self.frame_skip)  # lets the other threads run
            self.positions[slot], self.velocities[slot] = positions, velocities

    def close(self) -> None:
        """Ends the threads; the Gymnasium environment stays open."""
        self.pool.shutdown()
