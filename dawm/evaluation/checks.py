"""Does the environment fit the data? Asked before training, because scoring comes hours later."""

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from dawm.errors import UserError
from dawm.evaluation.actions import play, recorded_box
from dawm.evaluation.environments import (
    ENV_ID,
    Environment,
    GymnasiumEnvironments,
    Named,
    make_environment,
    time_limit,
    warn_once,
)

__all__ = ["check_environment"]

STEPS = 10  # that are tried
PATIENCE = 10_000  # steps, at least, in which an environment without a time limit has to end an episode


def check_environment(
    environment: Environment,
    *,
    observation_space: gym.spaces.Box,
    action_space: gym.spaces.Box,
    longest_episode: int,
    env_id_key: str = ENV_ID,
    max_episode_steps: int | None = None,
) -> None:
    """Makes the environment as evaluation will, takes a few steps in it, and compares it with the data.

    What may be meant is a warning: other bounds, or a time limit shorter than the recorded episodes.

    Args:
        environment: A Gymnasium id, a specification, or a function that makes the environment.
        observation_space: The data's flat Box of observations.
        action_space: The data's Box of actions.
        longest_episode: Steps of the longest recorded episode.
        env_id_key: The setting that names the environment, for messages.
        max_episode_steps: The environment's time limit; None leaves it the one it has.

    Raises:
        UserError: A policy learned from the data could not be scored in it.
    """
    env = make_environment(environment, max_episode_steps, env_id_key)
    envs = GymnasiumEnvironments([env], env_id_key)
    named = envs.named
    try:
        _check_observations(env.observation_space, observation_space, named)
        units = recorded_box(action_space, env, named)
        limit = time_limit(env)
        if limit is not None and limit < longest_episode:
            warn_once(
                f"--{named.key}: {named.name!r} ends episodes after {limit} steps, the data have one of "
                f"{longest_episode}; --{named.limit_key} {longest_episode} allows as many"
            )
        patience = max(PATIENCE, 2 * longest_episode)
        if not _ends(envs, units, STEPS if limit is not None else patience) and limit is None:
            raise UserError(
                f"--{named.limit_key}: got None, expected a time limit, because {named.name!r} has none and did not "
                f"end in {patience} steps; set it, such as to {longest_episode}, the data's longest episode"
            )
    finally:
        with named.guard("close"):
            env.close()


def _check_observations(space: gym.Space, recorded: gym.spaces.Box, named: Named) -> None:
    """Compares the sizes of observations, and the bounds where both have some."""
    assert isinstance(space, gym.spaces.Box)
    if space.shape != recorded.shape:
        sizes = f"with observations of {space.shape[0]} numbers", f"{recorded.shape[0]} as in the data"
        raise named.error(*sizes, "name the environment that the data came from")
    bounds = np.stack([space.low, space.high]), np.stack([recorded.low, recorded.high])
    both = np.isfinite(bounds[0]) & np.isfinite(bounds[1])
    differ = both & ~np.isclose(*bounds, rtol=1e-5, atol=1e-6)
    for entry in np.flatnonzero(differ.any(axis=0))[:1]:
        here, there = (f"from {low:g} to {high:g}" for low, high in (side[:, entry] for side in bounds))
        warn_once(
            f"--{named.key}: {named.name!r} bounds entry {entry} of its observations {here}, the data {there}; "
            "are they in the same units?"
        )


def _ends(envs: GymnasiumEnvironments, units: gym.spaces.Box, steps: int) -> bool:
    """Whether the episode ends within some steps, by the smallest, the middle and the largest action in turn."""
    allowed, slot = envs.env.action_space, np.zeros(1, dtype=np.int64)
    assert isinstance(allowed, gym.spaces.Box)
    actions = [play(torch.full((1, *units.shape), value), units, allowed) for value in (-1.0, 0.0, 1.0)]
    envs.reset(0, 0)
    _check_finite(envs.observations, "observations", envs.named)
    for step in range(steps):
        rewards, over = envs.step(slot, actions[step % len(actions)])
        _check_finite(envs.observations, "observations", envs.named)
        _check_finite(rewards, "a reward", envs.named)
        if over.any():
            return True
    return False


def _check_finite(values: NDArray[np.float64], what: str, named: Named) -> None:
    if not np.isfinite(values).all():
        raise named.error(f"with {what} of {values[~np.isfinite(values)][0]}", "finite numbers")
