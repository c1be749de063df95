"""What every reader of files delivers: rows in order, in the environment's own units, as NumPy arrays.

A `Source` gives the rows in blocks, so that a data set may be larger than the memory; a `Recording` was read whole.

Symbols: N rows, O observation size, A action size, E episodes, D = 2 O + A + 2 columns of a packed row.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from dawm.data.sources.scores import ReferenceScores
from dawm.errors import UserError

__all__ = ["BLOCK", "Block", "Columns", "Recording", "Source", "columns", "flags", "require_numbers"]

BLOCK = 1 << 16
"""Rows that a source reads at once."""

Floats = NDArray[np.float32]


class Columns(NamedTuple):
    """Views into packed rows; the same order as in `dawm.data.transitions.Transitions`."""

    observations: Floats
    actions: Floats
    rewards: Floats
    next_observations: Floats
    terminations: Floats


class Block(NamedTuple):
    """Consecutive rows of a data set; an episode may continue in the next block.

    Args:
        rows: Packed rows, actions in the environment's units, terminations 0 or 1, shape (N, D).
        last: Whether each row is the last one of its episode, shape (N,), bool.
        next_observed: False where ``s_{t+1}`` was not recorded and is filled in: last rows of episodes only, shape
            (N,), bool; None: all recorded.
    """

    rows: Floats
    last: NDArray[np.bool_]
    next_observed: NDArray[np.bool_] | None = None


class Source(ABC):
    """A data set that is open but not read.

    Attributes:
        name: What the user calls it.
        count: Rows N.
        observation_space: Flat Box.
        action_space: Flat Box with finite bounds.
        env_spec: The environment to evaluate in.
        reference: Reference scores.
        path: The file or folder.
        files: The files that hold the rows.
        settings: What the rows depend on besides the files, in words.
        defects: What the reader found wrong and worked around, one line each; complete when the rows were read.
    """

    name: str
    count: int
    observation_space: gym.spaces.Box
    action_space: gym.spaces.Box
    env_spec: EnvSpec | None
    reference: ReferenceScores | None
    path: Path
    files: Sequence[Path]
    settings: str
    defects: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[int, int]:
        """Observation size and action size, (O, A)."""
        return self.observation_space.shape[0], self.action_space.shape[0]

    @property
    def bounds(self) -> list[list[float]]:
        """Lowest and highest actions."""
        return [self.action_space.low.tolist(), self.action_space.high.tolist()]

    @property
    def width(self) -> int:
        """Columns of a packed row D."""
        return 2 * self.sizes[0] + self.sizes[1] + 2

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """All rows in order; about `BLOCK` of them at a time, each block in memory of its own."""

    def read(self) -> "Recording":
        """Read everything, with whatever is wrong in its numbers."""
        blocks = [Block(np.empty((0, self.width), np.float32), np.zeros(0, bool)), *self.blocks()]
        rows, last = (np.concatenate(arrays) for arrays in ([b.rows for b in blocks], [b.last for b in blocks]))
        known = [np.ones(len(b.rows), bool) if b.next_observed is None else b.next_observed for b in blocks]
        parts, ends = columns(rows, *self.sizes), np.flatnonzero(last) + 1
        return Recording(self, *parts[:-1], parts.terminations != 0, ends, np.concatenate(known))


@dataclass(frozen=True)
class Recording:
    """A data set that was read whole, cut into episodes, with whatever is wrong in its numbers.

    Args:
        source: What surrounds the rows.
        observations: ``s_t``, shape (N, O).
        actions: ``a_t`` in the environment's units, shape (N, A).
        rewards: ``r_t``, shape (N,).
        next_observations: ``s_{t+1}``, shape (N, O).
        terminations: Whether the task ended at ``s_{t+1}``, shape (N,), bool.
        ends: Exclusive end row of each episode, shape (E,), int64.
        next_observed: False where ``s_{t+1}`` was not recorded and is filled in, shape (N,), bool.
    """

    source: Source
    observations: Floats
    actions: Floats
    rewards: Floats
    next_observations: Floats
    terminations: NDArray[np.bool_]
    ends: NDArray[np.int64]
    next_observed: NDArray[np.bool_]

    @property
    def starts(self) -> NDArray[np.int64]:
        """First row of each episode, shape (E,)."""
        return np.concatenate([np.zeros(1, np.int64), self.ends])[:-1]

    def returns(self) -> NDArray[np.float64]:
        """Undiscounted return of each episode, shape (E,)."""
        return np.add.reduceat(self.rewards, self.starts, dtype=np.float64) if len(self.ends) else np.zeros(0)


def columns(rows: Floats, observation_size: int, action_size: int) -> Columns:
    """Views into packed rows, shape (N, D)."""
    reward = observation_size + action_size
    observations, actions = rows[:, :observation_size], rows[:, observation_size:reward]
    return Columns(observations, actions, rows[:, reward], rows[:, reward + 1 : -1], rows[:, -1])


def flags(values: NDArray, name: str, key: str, start: int = 0) -> NDArray[np.bool_]:
    """Recorded flags as booleans, shape (N,), the first from row ``start`` of the data set.

    Raises a UserError for what is neither 0 nor 1 (nor 255, as some tools write true).
    """
    if values.dtype.kind == "b":
        return values
    numeric = values.dtype.kind in "iuf"
    good = np.isin(values, (0, 1)) | np.isin(values, (0, 255)).all() if numeric else np.zeros(len(values), bool)
    if not good.all():
        first = int(good.argmin())
        raise UserError(
            f"--data.dataset: got {name} with {int((~good).sum())} {key} that are no flags, the first "
            f"{values[first]} in row {start + first}, expected booleans; convert them"
        )
    return values.astype(bool)


def require_numbers(kind: np.dtype, name: str, key: str) -> None:
    """Raises a UserError where a data set's column holds anything but real numbers."""
    if kind.kind not in "biuf":
        raise UserError(f"--data.dataset: got {name} with {key} of type {kind}, expected real numbers; convert them")
