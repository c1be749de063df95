"""Which spaces can be used, and how observations and actions are laid out as flat rows.

Observations are flat Boxes, or Dicts of them (goal environments), whose entries are put side by side with the keys
sorted, nested Dicts likewise. So does Gymnasium's ``FlattenObservation``, unless an environment was given an order of
its own, which Minari does not keep. Actions are a flat Box with finite bounds.
"""

import difflib
import importlib

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from torch import Tensor

from dawm.data.sources.environments import warn_once_by_mujoco
from dawm.errors import UserError, first_line

__all__ = [
    "action_box", "environment_spaces", "environment_spec", "observation_box", "observation_leaves",
    "scale_actions", "unbounded", "unscale_actions",
]  # fmt: skip


def unbounded(size: int) -> gym.spaces.Box:
    """A flat observation Box without bounds."""
    return gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)


def observation_leaves(space: gym.Space, got: str) -> list[tuple[tuple[str, ...], gym.spaces.Box]]:
    """The flat Boxes that an observation consists of, with their paths of keys, in the order of the flat row.

    ``got`` begins messages: the setting that brought the space, and its value.
    """
    if isinstance(space, gym.spaces.Dict):
        parts = [(key, observation_leaves(part, got)) for key, part in sorted(space.spaces.items())]
        return [((key, *path), box) for key, leaves in parts for path, box in leaves]
    if isinstance(space, gym.spaces.Box) and len(space.shape) <= 1:
        return [((), space)]
    kind = f"Box of shape {space.shape}" if isinstance(space, gym.spaces.Box) else type(space).__name__
    raise UserError(f"{got} with observations of the kind {kind}, expected flat Boxes or Dicts of them; choose another")


def observation_box(space: gym.Space, got: str) -> gym.spaces.Box:
    """The flat Box that observations fill, or a UserError for images, discrete values, tuples and text."""
    boxes = [box for _, box in observation_leaves(space, got)]
    low = np.concatenate([box.low.ravel() for box in boxes])
    if not low.size:
        raise UserError(f"{got} with empty observations, expected numbers; choose another")
    return gym.spaces.Box(low, np.concatenate([box.high.ravel() for box in boxes]), dtype=low.dtype.type)


def action_box(space: gym.Space, got: str) -> gym.spaces.Box:
    """The action Box itself, or a UserError where it cannot be scaled to [-1, 1]."""
    got = f"{got} with the action space {space}, expected"
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
        raise UserError(f"{got} a flat Box of real numbers; choose another")
    if not space.shape[0]:
        raise UserError(f"{got} at least one action; choose another")
    if not (np.isfinite([space.low, space.high]).all() and (space.low < space.high).all()):
        raise UserError(f"{got} finite bounds; record them in it")
    return space


def environment_spec(env_id: str) -> EnvSpec:
    """Gymnasium's specification of an environment, or a UserError with the nearest names.

    ``module:Name-v0`` imports the module that registers it first, as ``gymnasium.make`` does.
    """
    module, _, name = env_id.rpartition(":")
    got = f"--data.env_id: got {env_id!r}, expected"
    try:
        if module:
            importlib.import_module(module)
    except Exception as error:  # the module's own code runs
        raise UserError(f"{got} the module {module!r} to import ({first_line(error)}); install or mend it") from error
    try:
        return gym.spec(name)
    except (gym.error.Error, ImportError) as error:
        near = difflib.get_close_matches(name, list(gym.registry), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "`module:Name-v0` imports the package that registers it"
        raise UserError(f"{got} an environment that Gymnasium knows; {hint}") from error


def environment_spaces(spec: EnvSpec, name: str, sizes: tuple[int, int]) -> tuple[gym.spaces.Box, gym.spaces.Box]:
    """Flat observation Box and action Box of an environment, or a UserError if the data's sizes (O, A) are others."""
    got = f"--data.env_id: got {spec.id!r}"
    warn_once_by_mujoco()
    try:
        environment = gym.make(spec, disable_env_checker=True)
    except Exception as error:  # Gymnasium lets through whatever the environment's own package raises
        raise UserError(
            f"{got} ({first_line(error)[:160]}), expected an environment that can be made; "
            "install what it needs or name another environment"
        ) from error
    with environment:
        observation_space = observation_box(environment.observation_space, got)
        action_space = action_box(environment.action_space, got)
    found = (observation_space.shape[0], action_space.shape[0])
    if sizes != found:
        raise UserError(
            f"{got} with observations and actions of sizes {found}, expected the {sizes} of {name}; name the "
            "environment that the data came from"
        )
    return observation_space, action_space


def scale_actions(actions: Tensor, space: gym.spaces.Box) -> Tensor:
    """Map actions, shape (..., A), from their Box to [-1, 1]."""
    middle, half = _middle_and_half(space)
    return (actions - middle.to(actions.device)) / half.to(actions.device)


def unscale_actions(actions: Tensor, space: gym.spaces.Box) -> Tensor:
    """Map actions, shape (..., A), from [-1, 1] to their Box."""
    middle, half = _middle_and_half(space)
    return actions * half.to(actions.device) + middle.to(actions.device)


def _middle_and_half(space: gym.spaces.Box) -> tuple[Tensor, Tensor]:
    """Middle and half the width of a Box, shapes (A,)."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    return torch.tensor((low + high) / 2, dtype=torch.float32), torch.tensor((high - low) / 2, dtype=torch.float32)
