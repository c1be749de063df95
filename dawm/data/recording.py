"""What every reader of files delivers: rows in order, in the environment's own units, as NumPy arrays.

Symbols: N rows, O observation size, A action size, E episodes.
"""

from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from dawm.data.scores import ReferenceScores
from dawm.errors import UserError

__all__ = ["Recording"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Recording:
    """Recorded steps, checked and cut into episodes.

    Args:
        name: What the user calls the data set.
        observations: ``s_t``, shape (N, O).
        actions: ``a_t`` in the environment's units, shape (N, A).
        rewards: ``r_t``, shape (N,).
        next_observations: ``s_{t+1}``, shape (N, O).
        terminations: Whether the task ended at ``s_{t+1}``, shape (N,), bool.
        ends: Exclusive end row of each episode, shape (E,), int64.
        observation_space: Flat Box.
        action_space: Flat Box with finite bounds.
        env_spec: The environment to evaluate in.
        reference: Reference scores.
        next_observed: False where ``s_{t+1}`` was not recorded and is filled in, shape (N,), bool; None: all recorded.
        path: The file or folder that it was read from.
        defects: What the reader found wrong and worked around, one line each.
    """

    name: str
    observations: Floats
    actions: Floats
    rewards: Floats
    next_observations: Floats
    terminations: NDArray[np.bool_]
    ends: NDArray[np.int64]
    observation_space: gym.spaces.Box
    action_space: gym.spaces.Box
    env_spec: EnvSpec | None
    reference: ReferenceScores | None
    next_observed: NDArray[np.bool_] | None = None
    path: Path | None = None
    defects: tuple[str, ...] = ()

    @property
    def starts(self) -> NDArray[np.int64]:
        """First row of each episode, shape (E,)."""
        return np.concatenate([np.zeros(1, np.int64), self.ends])[:-1]

    def returns(self) -> NDArray[np.float64]:
        """Undiscounted return of each episode, shape (E,)."""
        if not len(self.ends):
            return np.zeros(0)
        return np.add.reduceat(self.rewards, self.starts, dtype=np.float64)

    def check(self) -> None:
        """Raise a UserError if there are no rows, or numbers that are not finite."""
        if not len(self.rewards):
            raise UserError(f"data.dataset: {self.name} is empty; record some complete steps first")
        for column in ("observations", "actions", "rewards", "next_observations"):
            values = getattr(self, column)
            if np.isfinite(values).all():
                continue
            bad = ~np.isfinite(values).reshape(len(values), -1)
            columns = np.flatnonzero(bad.any(axis=0))
            where = f"{column} (column {', '.join(map(str, columns[:3]))})" if values.ndim > 1 else column
            raise UserError(
                f"data.dataset: {self.name} has {int(bad.sum())} NaN or infinite values in {where}, "
                f"the first in row {int(bad.any(axis=1).argmax())}; remove those episodes from the data set"
            )
