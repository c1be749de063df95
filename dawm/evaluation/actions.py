"""The units of actions: a policy's -1 and 1 are the data's smallest and largest action, in the data's units.

They are never guessed from the environment: what was recorded is what is played, clipped to what the environment takes.
"""

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dawm.data.sources.spaces import unscale_actions
from dawm.evaluation.environments import Named, warn_once

__all__ = ["play", "recorded_box"]


def recorded_box(recorded: gym.spaces.Box | None, env: gym.Env, named: Named) -> gym.spaces.Box:
    """The Box in whose units a policy acts: the data's, shape (A,), checked against the environment's; None takes that.

    A warning says where the environment takes less than what was recorded.

    Raises:
        UserError: The Boxes differ in size or have no action in common, or there are no finite bounds to go by.
    """
    allowed = env.action_space
    assert isinstance(allowed, gym.spaces.Box)
    if recorded is None:
        if not (np.isfinite(allowed.low).all() and np.isfinite(allowed.high).all()):
            raise named.error("without finite bounds of its actions", "such bounds")
        return allowed
    if recorded.shape != allowed.shape:
        sizes = f"with actions of {allowed.shape[0]} numbers", f"{recorded.shape[0]} as in the data"
        raise named.error(*sizes, "name the environment that the data came from")
    # in double precision: one of the two may come from single precision
    low, high = recorded.low.astype(np.float64), recorded.high.astype(np.float64)
    smallest, largest, rounding = allowed.low.astype(np.float64), allowed.high.astype(np.float64), 1e-6 * (high - low)
    for entry in np.flatnonzero((smallest >= high) | (largest <= low))[:1]:
        has = f"with actions from {smallest[entry]:g} to {largest[entry]:g} in entry {entry}"
        expected = f"some from {low[entry]:g} to {high[entry]:g} as in the data"
        raise named.error(has, expected, "name the environment that the data came from")
    for entry in np.flatnonzero((smallest > low + rounding) | (largest < high - rounding))[:1]:
        warn_once(
            f"--{named.key}: {named.name!r} takes actions from {smallest[entry]:g} to {largest[entry]:g} in entry "
            f"{entry}, the data's go from {low[entry]:g} to {high[entry]:g}; those beyond are clipped when played"
        )
    return recorded


def play(actions: Tensor, recorded: gym.spaces.Box, allowed: gym.spaces.Box) -> NDArray:
    """A policy's actions, in [-1, 1] of the recorded Box, as the environment, whose Box is allowed, gets them."""
    units = unscale_actions(actions.float().clamp(-1, 1), recorded)
    return units.numpy().clip(allowed.low, allowed.high).astype(allowed.dtype)
