"""Load recorded episodes: the one place where files become tensors.

Symbols: N rows, O observation size, A action size, E episodes.

A data set is named by

* a Minari id (``mujoco/hopper/medium-v0``): found under ``MINARI_DATASETS_PATH`` (else ``~/.minari/datasets``), or
  downloaded,
* an embedded id (``embedded/hopper/medium-replay``): built on first use, without a download,
* the path of an HDF5 file in D4RL's layout (``hopper_medium-v2.hdf5``),
* several of these joined with ``+`` (``mujoco/hopper/medium-v0+mujoco/hopper/expert-v0``).

All N steps stay in order. Actions are scaled from the environment's Box to [-1, 1]. The simulators behind such Boxes
clamp the actions they are given, so a recorded action outside is clipped to what was executed, with a warning if it is
more than rounding. One further out than half the Box's width was recorded in other units and is an error.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from torch import Tensor

from dawm.data.d4rl import is_d4rl_name, read_d4rl
from dawm.data.embedded import build
from dawm.data.minari_files import read_minari
from dawm.data.names import EMBEDDED
from dawm.data.recording import Recording
from dawm.data.scores import ReferenceScores
from dawm.data.transitions import Transitions
from dawm.errors import UserError

__all__ = ["Episodes", "load_episodes", "read_recordings", "scale_actions", "unscale_actions"]

# How far an action lies outside its bounds, in halves of the Box's width.
_ROUNDING = 1e-3
_OTHER_UNITS = 1.0


@dataclass(frozen=True)
class Episodes:
    """Recorded steps in order, and where their episodes end.

    Args:
        name: The data set as the user named it.
        transitions: All steps in order, float32 on the CPU, actions in [-1, 1].
        ends: Exclusive end row of each episode, shape (E,), int64.
        observation_space: Flat Box of the observations.
        action_space: The environment's own Box of actions.
        env_spec: The environment to evaluate in; None if not known.
        reference: Reference scores; None if not known.
        fingerprint: Hash of transitions, ends and action bounds: the same for the same data in another file format.
        next_observed: False where ``s_{t+1}`` was not recorded and is filled with ``s_t``, shape (N,), bool. Only
            terminated rows of files without ``next_observations`` are so; they serve one-step TD, because they never
            bootstrap, but must not teach the dynamics or the inverse dynamics.
    """

    name: str
    transitions: Transitions
    ends: Tensor
    observation_space: gym.spaces.Box
    action_space: gym.spaces.Box
    env_spec: EnvSpec | None
    reference: ReferenceScores | None
    fingerprint: str
    next_observed: Tensor

    def __len__(self) -> int:
        return len(self.transitions)

    @property
    def starts(self) -> Tensor:
        """First row of each episode, shape (E,)."""
        return torch.cat([self.ends.new_zeros(1), self.ends[:-1]])

    @property
    def lengths(self) -> Tensor:
        """Steps of each episode, shape (E,)."""
        return self.ends - self.starts

    @property
    def truncated(self) -> Tensor:
        """Whether each episode ended without a termination, shape (E,), bool."""
        return self.transitions.terminations[self.ends - 1] == 0

    def returns(self) -> Tensor:
        """Undiscounted return of each episode, shape (E,)."""
        episode = torch.repeat_interleave(torch.arange(len(self.ends)), self.lengths)
        # In double precision: an episode may sum a thousand rewards.
        sums = torch.zeros(len(self.ends), dtype=torch.float64)
        return sums.index_add(0, episode, self.transitions.rewards.double()).float()


def load_episodes(dataset: str, env_id: str | None = None) -> Episodes:
    """Load a data set by name; the module's docstring gives the forms a name takes.

    Args:
        dataset: The name.
        env_id: Gymnasium id of the environment to evaluate in; None: the one that the data set names.
    """
    recordings = read_recordings(dataset, env_id)
    for recording in recordings:
        recording.check()
    _check_agreement(recordings)

    first = recordings[0]
    parts = [_to_transitions(recording) for recording in recordings]
    transitions = parts[0] if len(parts) == 1 else Transitions.cat(parts)
    offsets = np.cumsum([0, *(len(part) for part in parts)])
    ends = torch.from_numpy(np.concatenate([part.ends + offset for part, offset in zip(recordings, offsets)]))
    next_observed = [
        np.ones(len(part.rewards), bool) if part.next_observed is None else part.next_observed for part in recordings
    ]
    return Episodes(
        name=dataset,
        transitions=transitions,
        ends=ends,
        observation_space=first.observation_space,
        action_space=first.action_space,
        env_spec=next((part.env_spec for part in recordings if part.env_spec is not None), None),
        reference=next((part.reference for part in recordings if part.reference is not None), None),
        fingerprint=_fingerprint(transitions, ends, first.action_space),
        next_observed=torch.from_numpy(np.concatenate(next_observed)),
    )


def read_recordings(dataset: str, env_id: str | None = None) -> list[Recording]:
    """Read a data set as it is, with whatever is wrong in its numbers: one recording for each of the joined parts.

    Args:
        dataset: The name.
        env_id: Gymnasium id of the environment; None: the one that the data set names.
    """
    return [_read(part, env_id) for part in _split(dataset)]


def scale_actions(actions: Tensor, space: gym.spaces.Box) -> Tensor:
    """Map actions from the environment's Box to [-1, 1].

    Args:
        actions: Actions in the environment's units, shape (..., A).
        space: The environment's Box, shape (A,).
    """
    middle, half = _middle_and_half(space)
    return (actions - middle.to(actions.device)) / half.to(actions.device)


def unscale_actions(actions: Tensor, space: gym.spaces.Box) -> Tensor:
    """Map actions from [-1, 1] to the environment's Box; the inverse of `scale_actions`.

    Args:
        actions: Actions in [-1, 1], shape (..., A).
        space: The environment's Box, shape (A,).
    """
    middle, half = _middle_and_half(space)
    return actions * half.to(actions.device) + middle.to(actions.device)


def _middle_and_half(space: gym.spaces.Box) -> tuple[Tensor, Tensor]:
    """Middle and half the width of a Box, shapes (A,)."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    return torch.tensor((low + high) / 2, dtype=torch.float32), torch.tensor((high - low) / 2, dtype=torch.float32)


def _split(dataset: str) -> list[str]:
    """The names that are joined with ``+``; an existing file may have a ``+`` in its path."""
    if Path(dataset).expanduser().is_file():
        return [dataset]
    parts = [part.strip() for part in dataset.split("+")]
    if not all(parts):
        raise UserError(f"data.dataset: {dataset!r} has an empty part; write a name on both sides of every +")
    return parts


def _read(name: str, env_id: str | None) -> Recording:
    """One data set by name."""
    path = Path(name).expanduser()
    if path.is_file():
        return read_d4rl(path, name, env_id)
    if name.startswith((".", "/", "~")) or path.suffix in (".hdf5", ".h5"):
        raise UserError(f"data.dataset: the file {name} does not exist; check the path")
    if is_d4rl_name(name):
        raise UserError(f"data.dataset: {name} is one of D4RL's names; give the path of its HDF5 file instead")
    dataset_id = build(name) if name.removesuffix("-v0") in EMBEDDED else name
    return read_minari(dataset_id, name, env_id)


def _check_agreement(recordings: Sequence[Recording]) -> None:
    """Raise a UserError where joined data sets do not belong together."""
    first = recordings[0]
    scored = [part for part in recordings if part.reference is not None]
    for other in recordings[1:]:
        if _sizes_and_bounds(first) != _sizes_and_bounds(other):
            raise UserError(
                f"data.dataset: {first.name} and {other.name} cannot be joined, their spaces differ "
                f"({first.observation_space.shape[0]} observations, actions {first.action_space}, against "
                f"{other.observation_space.shape[0]}, {other.action_space}); join data sets of one environment"
            )
        if first.env_spec and other.env_spec and first.env_spec.id != other.env_spec.id:
            raise UserError(
                f"data.env_id: {first.name} and {other.name} come from {first.env_spec.id} and {other.env_spec.id}; "
                "name the environment to evaluate in"
            )
    for other in scored[1:]:
        ours, theirs = scored[0].reference, other.reference
        if ours and theirs and not ours.agrees_with(theirs):
            raise UserError(
                f"data.dataset: {scored[0].name} and {other.name} have different reference scores "
                f"({ours.minimum:g} to {ours.maximum:g}, {ours.source}; {theirs.minimum:g} to {theirs.maximum:g}, "
                f"{theirs.source}); join data sets with the same ones"
            )


def _sizes_and_bounds(recording: Recording) -> tuple[int, list[float], list[float]]:
    """What joined data sets must have in common."""
    space = recording.action_space
    return recording.observation_space.shape[0], space.low.tolist(), space.high.tolist()


def _to_transitions(recording: Recording) -> Transitions:
    """Tensors of one recording, with the actions scaled to [-1, 1]."""
    actions = scale_actions(torch.from_numpy(recording.actions), recording.action_space)
    excess = actions.abs().amax(dim=-1) - 1.0
    outside = excess > _ROUNDING
    if outside.any():
        where = (
            f"data.dataset: {recording.name} has {int(outside.sum())} actions outside {recording.action_space}, "
            f"the first in row {int(outside.int().argmax())}"
        )
        if excess.max() > _OTHER_UNITS:
            raise UserError(
                f"{where}; name the environment with the right bounds in data.env_id, or clip the recorded actions"
            )
        warnings.warn(f"{where}; they are clipped", stacklevel=3)
    return Transitions(
        observations=torch.from_numpy(recording.observations),
        actions=actions.clamp_(-1.0, 1.0),
        rewards=torch.from_numpy(recording.rewards),
        next_observations=torch.from_numpy(recording.next_observations),
        terminations=torch.from_numpy(recording.terminations).float(),
    )


def _fingerprint(transitions: Transitions, ends: Tensor, action_space: gym.spaces.Box) -> str:
    """Hash of everything that training sees."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (
        transitions.observations,
        transitions.actions,
        transitions.rewards,
        transitions.next_observations,
        transitions.terminations,
        ends,
    ):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    digest.update(action_space.low.astype(np.float64).tobytes() + action_space.high.astype(np.float64).tobytes())
    return digest.hexdigest()
