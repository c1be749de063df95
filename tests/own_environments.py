"""An environment as users write them, in which every answer can be replaced; for the tests of environments."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from dawm.errors import UserError
from dawm.evaluation.environments import warn_once


class Drift(gym.Env):
    """Moves by the action and pays minus the distance from 0; every answer can be replaced.

    Args:
        answers: Replace parts of what ``step`` answers, or raise, by ``observation``, ``reward``, ``terminated``,
            ``truncated``: functions of the true part.
        ends: Steps after which it terminates; 0: never.
        goal: An argument that JSON cannot hold.
        spaces: Replace the spaces.
    """

    def __init__(self, ends=0, goal=None, spaces=None, **answers):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        vars(self).update(spaces or {})
        self.ends, self.goal, self.answers = ends, goal, answers

    def _answer(self, name, value):
        return self.answers.get(name, lambda value: value)(value)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.age = self.np_random.normal(size=2), 0
        return self._answer("first", self.place.copy()), {}

    def step(self, action):
        self.age += 1
        self.place = self.place + 0.1 * action
        reward, over = -np.abs(self.place).sum(), bool(self.age == self.ends)
        return (
            self._answer("observation", self.place.copy()),
            self._answer("reward", float(reward)),
            self._answer("terminated", over),
            self._answer("truncated", False),
            {},
        )

    def close(self):
        self._answer("close", None)


@pytest.fixture
def fresh_registry():
    """Forgets what a test registers, and what has been warned of."""
    warn_once.cache_clear()
    kept = dict(gym.registry)
    yield
    gym.registry.clear()
    gym.registry.update(kept)


def register(limit=20, entry_point=Drift, **kwargs):
    gym.registry.pop("Drift-v0", None)
    gym.register("Drift-v0", entry_point=entry_point, max_episode_steps=limit, kwargs=kwargs)
    return gym.spec("Drift-v0")


DATA = {
    "observation_space": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
    "action_space": gym.spaces.Box(-1, 1, (2,), np.float32),
    "longest_episode": 20,
}


def still(observations):
    return torch.zeros(*observations.shape[:-1], 2)


def line_of(call, *args, **kwargs):
    """The one line of the error that a call ends in."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--")
    return str(caught.value)
