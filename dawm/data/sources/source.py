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

BLOCK = 1 << 16  # rows that a source reads at once

Floats = NDArray[np.float32]


class Columns(NamedTuple):
    """Views into packed rows; the same order as in `dawm.data.transitions.Transitions`."""

    observations: Floats
    actions: Floats
    rewards: Floats
    next_observations: Floats
    terminations: Floats


class Block(NamedTuple):
    """Consecutive rows of a data set; an episode may continue in the next block."""

    rows: Floats  # packed, actions in the environment's units, terminations 0 or 1, shape (N, D)
    last: NDArray[np.bool_]  # whether each row is the last one of its episode, shape (N,)
    next_observed: NDArray[np.bool_] | None = None  # as in `Recording`, False in last rows only; None: all recorded


class Source(ABC):
    """A data set that is open but not read."""

    name: str  # what the user calls it
    count: int  # rows N
    observation_space: gym.spaces.Box  # flat
    action_space: gym.spaces.Box  # flat, with finite bounds
    env_spec: EnvSpec | None  # the environment to evaluate in
    reference: ReferenceScores | None
    path: Path  # the file or folder
    files: Sequence[Path]  # those that hold the rows
    settings: str  # what the rows depend on besides the files, in words
    defects: tuple[str, ...] = ()  # what is wrong and worked around, a line each; complete when the rows were read

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
        rows, last, known = np.empty((self.count, self.width), np.float32), *np.ones((2, self.count), bool)
        start = 0
        for block in self.blocks():
            part = slice(start, start := start + len(block.rows))
            rows[part], last[part] = block.rows, block.last
            known[part] = True if block.next_observed is None else block.next_observed
        parts, ends = columns(rows, *self.sizes), np.flatnonzero(last) + 1
        return Recording(self, *parts[:-1], parts.terminations != 0, ends, known)


@dataclass(frozen=True)
class Recording:
    """A data set that was read whole, cut into episodes, with whatever is wrong in its numbers."""

    source: Source
    observations: Floats  # s_t, shape (N, O)
    actions: Floats  # a_t in the environment's units, shape (N, A)
    rewards: Floats  # r_t, shape (N,)
    next_observations: Floats  # s_{t+1}, shape (N, O)
    terminations: NDArray[np.bool_]  # whether the task ended at s_{t+1}, shape (N,)
    ends: NDArray[np.int64]  # exclusive end row of each episode, shape (E,)
    next_observed: NDArray[np.bool_]  # False where s_{t+1} was not recorded and is filled in, shape (N,)

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
