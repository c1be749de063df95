"""Environments as they are made, and several of them that take their steps together.

Symbols: N environments, B of them that take a step, O observation size.

Whatever an environment's own code raises, or answers with instead of what Gymnasium asks for, becomes one line that
names the environment.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import TimeLimit
from numpy.typing import NDArray

from dawm.data.sources.environments import warn_once_by_mujoco
from dawm.errors import UserError, first_line, require

__all__ = ["ENV_ID", "Environment", "GymnasiumEnvironments", "Named", "make_environment", "time_limit", "warn_once"]

Environment = str | EnvSpec | Callable[[], gym.Env]

ENV_ID = "data.env_id"  # the setting that names the environment
ENDLESS = 100_000  # steps after which an episode is cut if the environment has no time limit


@dataclass(frozen=True)
class Named:
    """An environment's name and the setting it comes from, for messages."""

    name: str  # its id; the class or function of one that has none
    key: str = ENV_ID  # as typed

    @classmethod
    def of(cls, environment: Environment | gym.Env, key: str = ENV_ID) -> "Named":
        """The name of an environment, made or still to be made."""
        if isinstance(environment, gym.Env):
            spec = environment.unwrapped.spec
            return cls(type(environment.unwrapped).__name__ if spec is None else spec.id, key)
        if isinstance(environment, str):
            return cls(environment, key)
        name = environment.id if isinstance(environment, EnvSpec) else getattr(environment, "__name__", "a function")
        return cls(name, key)

    @property
    def limit_key(self) -> str:
        """The setting that gives the environment a time limit."""
        # fit's callbacks have environments of their own, and the limit of the data's
        return "max_episode_steps" if self.key == "env_id" else "data.max_episode_steps"

    def error(self, has: str, expected: str, remedy: str = "mend it or name another environment") -> UserError:
        """The error that says what the environment has or does, what would be right, and what to do about it."""
        return UserError(f"--{self.key}: got {self.name!r} {has}, expected {expected}; {remedy}")

    @contextmanager
    def guard(self, method: str) -> Iterator[None]:
        """Turns whatever the environment's code raises in a method, such as ``step``, into a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"[:160]
            raise self.error(f"whose {method} fails ({reason})", "one that works") from error


@cache
def warn_once(text: str) -> None:
    """Warns of something only once in a process, however often evaluations come."""
    warnings.warn(text, stacklevel=3)


def make_environment(
    environment: Environment, max_episode_steps: int | None = None, env_id_key: str = ENV_ID
) -> gym.Env:
    """One environment with flat observations, a flat Box of actions, and a time limit; None leaves it the one it has.

    Raises:
        UserError: It cannot be made, or its actions are not such a Box.
    """
    named, limit = Named.of(environment, env_id_key), max_episode_steps
    require(named.limit_key, limit, limit is None or limit >= 1, "a whole number of at least 1")
    warn_once_by_mujoco()
    try:
        if not callable(environment):
            # checking every step takes as long as a policy does
            env = gym.make(environment, limit, disable_env_checker=True)
        else:
            env = environment() if limit is None else TimeLimit(environment(), limit)
    except Exception as error:  # Gymnasium lets through whatever the environment's own package raises
        remedy = "install what it needs or name another environment"
        raise named.error(f"({first_line(error)[:160]})", "an environment that can be made", remedy) from error
    space = env.action_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
        env.close()
        raise named.error(f"with the actions {space}"[:160], "a flat Box of real numbers", "name another environment")
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        sorted_space = _sorted_keys(env.observation_space)
        with named.guard("observation space"):
            flat = gym.spaces.flatten_space(sorted_space)
        env = gym.wrappers.TransformObservation(env, lambda values: gym.spaces.flatten(sorted_space, values), flat)
    return env


def _sorted_keys(space: gym.Space) -> gym.Space:
    """A space whose observations are laid out as in data sets: Dicts by sorted keys, whatever order they were given."""
    if not isinstance(space, gym.spaces.Dict):
        return space
    return gym.spaces.Dict([(key, _sorted_keys(part)) for key, part in sorted(space.spaces.items())])


def time_limit(env: gym.Env) -> int | None:
    """Steps after which an environment's ``TimeLimit`` ends its episodes; None if it has none."""
    limits = []
    while isinstance(env, gym.Wrapper):
        if isinstance(env, TimeLimit):
            limits.append(env._max_episode_steps)
        env = env.env
    return min(limits, default=None)


class GymnasiumEnvironments:
    """N environments of any kind with flat observations, which take their steps one after the other.

    Gymnasium's own vector environments keep stepping finished episodes or start others in their place; here a finished
    environment is left alone until its reset. ``observations``, shape (N, O), holds the newest one of each.
    """

    def __init__(self, envs: Sequence[gym.Env], env_id_key: str = ENV_ID) -> None:
        self.env, self.envs, self.named = envs[0], envs, Named.of(envs[0], env_id_key)
        assert self.env.observation_space.shape is not None
        self.observations = np.zeros((len(envs), *self.env.observation_space.shape))
        self.endless = time_limit(self.env) is None
        self.ages = np.zeros(len(envs), dtype=np.int64)

    def reset(self, slot: int, seed: int) -> None:
        """Starts the episode of a seed in one of the environments."""
        with self.named.guard("reset"):
            observation, _ = self.envs[slot].reset(seed=seed)
            self._observe(slot, observation)
        self.ages[slot] = 0

    def step(self, slots: NDArray, actions: NDArray) -> tuple[NDArray, NDArray]:
        """Rewards and whether the episodes are over, by termination or truncation; both of shape (B,).

        ``slots``, shape (B,), are the numbers of the environments that take a step.
        """
        rewards, over = np.zeros(len(slots)), np.zeros(len(slots), dtype=bool)
        with self.named.guard("step"):
            for index, (slot, action) in enumerate(zip(slots, actions)):
                observation, reward, terminated, truncated, _ = self.envs[slot].step(action)
                self._observe(slot, observation)
                rewards[index] = self._single("reward", reward, "a number", "biuf")
                over[index] = self._single("terminated", terminated, "a boolean", "b")
                over[index] |= self._single("truncated", truncated, "a boolean", "b")
        self.ages[slots] += 1
        if self.endless and (cut := self.ages[slots] >= ENDLESS).any():
            key, name = self.named.limit_key, self.named.name
            warn_once(f"--{key}: {name!r} has no time limit and did not end in {ENDLESS} steps; cut there, so set one")
            over |= cut
        return rewards, over

    def _observe(self, slot: int, observation: Any) -> None:
        shape, expected = np.shape(observation), self.observations.shape[1:]
        if shape != expected:
            raise self.named.error(f"with an observation of shape {shape}", f"its observation space's {expected}")
        self.observations[slot] = observation

    def _single(self, what: str, value: Any, expected: str, kinds: str) -> Any:
        """The one entry of a scalar or an array of one entry, whose type is of one of NumPy's kinds."""
        array = np.asarray(value)
        if array.size != 1 or array.dtype.kind not in kinds:
            raise self.named.error(f"whose step answers with {what} {' '.join(repr(value).split())}"[:160], expected)
        return array.item()
