"""Read an HDF5 file in D4RL's layout: flat columns ``observations, actions, rewards, terminals, timeouts``.

``terminals`` are terminations and ``timeouts`` truncations. What the file leaves out is dealt with so:

* ``next_observations`` missing: inside an episode ``s_{t+1}`` is the next row's observation. The last row of a
  truncated episode has none and is dropped, because it would have to bootstrap from a made-up ``s_{t+1}``. The last row
  of a terminated episode is kept: it alone says that the task ends there, and it never bootstraps. Its ``s_{t+1}`` is
  filled with ``s_t`` and marked in ``Recording.next_observed``; it can teach neither dynamics nor inverse dynamics.
* ``timeouts`` missing: an episode is cut at the environment's time limit where the environment is known, and the
  file's end truncates the last one.

D4RL's own file names (``hopper_medium_replay-v2.hdf5``) bring D4RL's reference scores. D4RL's environments are gone;
Hopper, Walker2d and HalfCheetah are evaluated in Gymnasium's v5 versions, whose rewards and endings are nearly the same
but whose simulator is newer. Set ``data.env_id`` for another.
"""

import re
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from dawm.data.recording import Recording
from dawm.data.scores import d4rl_scores, reference_scores
from dawm.data.spaces import environment_spaces, environment_spec, unbounded
from dawm.errors import UserError

__all__ = ["is_d4rl_name", "read_d4rl"]

_LOCOMOTION_KINDS = "(random|medium|expert|mixed|medium-replay|full-replay|medium-expert)"
_LOCOMOTION = re.compile(rf"(?P<family>hopper|walker2d|halfcheetah)-{_LOCOMOTION_KINDS}-v\d+")
_OTHERS = re.compile(
    rf"ant-{_LOCOMOTION_KINDS}-v\d+"
    r"|(maze2d|antmaze|kitchen|minigrid)-[a-z0-9-]+-v\d+"
    r"|(pen|door|hammer|relocate)-(human|cloned|expert)(-longhorizon)?-v\d+"
)
_EVALUATED_IN = {"hopper": "Hopper-v5", "walker2d": "Walker2d-v5", "halfcheetah": "HalfCheetah-v5"}

_RANKS = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1, "timeouts": 1, "next_observations": 2}
_REQUIRED = ("observations", "actions", "rewards", "terminals")


def is_d4rl_name(name: str) -> bool:
    """Whether a name is that of one of D4RL's data sets, such as ``hopper-medium-v2``."""
    return _LOCOMOTION.fullmatch(name) is not None or _OTHERS.fullmatch(name) is not None


def read_d4rl(path: Path, name: str, env_id: str | None = None) -> Recording:
    """Read one file.

    Args:
        path: The file.
        name: What the user calls it, for messages.
        env_id: The environment to evaluate in; None: known from the file's name, or none.
    """
    columns = _read_columns(path, name)
    observations, actions = columns["observations"], columns["actions"]

    title = path.stem.lower().replace("_", "-")
    locomotion = _LOCOMOTION.fullmatch(title)
    if env_id is None and locomotion is not None:
        env_id = _EVALUATED_IN[locomotion["family"]]
    env_spec = environment_spec(env_id) if env_id is not None else None
    # D4RL scales the actions of all its environments to [-1, 1].
    observation_space = unbounded(observations.shape[1])
    action_space: gym.spaces.Box = gym.spaces.Box(-1.0, 1.0, (actions.shape[1],))
    if env_spec is not None:
        sizes = (observations.shape[1], actions.shape[1])
        observation_space, action_space = environment_spaces(env_spec, name, sizes)

    if is_d4rl_name(title):
        reference = d4rl_scores(title)
    else:
        reference = reference_scores(env_spec.id) if env_spec is not None else None

    terminations = columns["terminals"].astype(bool)
    timeouts = columns["timeouts"].astype(bool) if "timeouts" in columns else _time_limits(terminations, env_spec)
    last = terminations | timeouts
    last[-1:] = True
    if "next_observations" in columns:
        keep = np.ones(len(last), dtype=bool)
        next_observations, next_observed = columns["next_observations"], None
    else:
        keep = ~last | terminations
        next_observations = np.concatenate([observations[1:], observations[-1:]])
        next_observations[terminations] = observations[terminations]
        next_observed = ~terminations[keep]
        # A truncated episode now ends one row earlier; where it was only that one row, the episode before ends there.
        last[:-1] |= ~keep[1:]
    return Recording(
        name=name,
        observations=observations[keep],
        actions=actions[keep],
        rewards=columns["rewards"][keep],
        next_observations=next_observations[keep],
        terminations=terminations[keep],
        ends=np.flatnonzero(last[keep]) + 1,
        observation_space=observation_space,
        action_space=action_space,
        env_spec=env_spec,
        reference=reference,
        next_observed=next_observed,
    )


def _time_limits(terminations: NDArray[np.bool_], env_spec: EnvSpec | None) -> NDArray[np.bool_]:
    """Where episodes reach the environment's time limit, counted from the last termination, shape (N,)."""
    rows = np.arange(len(terminations))
    limit = env_spec.max_episode_steps if env_spec is not None else None
    if limit is None:
        return np.zeros(len(rows), dtype=bool)
    starts = np.zeros_like(rows)
    starts[1:] = np.where(terminations[:-1], rows[1:], 0)
    steps = rows - np.maximum.accumulate(starts)
    return (steps + 1) % limit == 0


def _read_columns(path: Path, name: str) -> dict[str, NDArray]:
    """The columns that are used, checked for presence, rank and length."""
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in _REQUIRED if not isinstance(file.get(key), h5py.Dataset)]
            if missing:
                raise UserError(
                    f"data.dataset: {name} has no {', '.join(missing)}; D4RL's layout needs {', '.join(_REQUIRED)}"
                )
            columns = {key: file[key][()] for key in _RANKS if key in file}
    except OSError as error:
        raise UserError(f"data.dataset: {name} is not a readable HDF5 file ({error}); get it again") from error

    rows = len(columns["observations"])
    for key, values in columns.items():
        rank = _RANKS[key]
        if rank == 1 and values.size == rows:
            values = values.reshape(rows)  # some files store (N, 1)
        if values.ndim != rank or len(values) != rows:
            raise UserError(
                f"data.dataset: {name} has {key} of shape {values.shape}, where {rows} rows of "
                f"{'vectors' if rank == 2 else 'numbers'} are needed; mend the file"
            )
        columns[key] = values if key in ("terminals", "timeouts") else values.astype(np.float32, copy=False)
    if columns.get("next_observations", columns["observations"]).shape != columns["observations"].shape:
        raise UserError(f"data.dataset: {name} has next_observations of another width than observations; mend the file")
    return columns
