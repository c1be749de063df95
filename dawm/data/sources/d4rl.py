"""Read an HDF5 file in D4RL's layout: flat columns ``observations, actions, rewards, terminals, timeouts``.

``terminals`` are terminations and ``timeouts`` truncations. What the file leaves out is dealt with so:

* ``next_observations`` missing: inside an episode ``s_{t+1}`` is the next row's observation. The last row of a
  truncated episode has none and is dropped, because it would have to bootstrap from a made-up ``s_{t+1}``. The last row
  of a terminated episode is kept: it alone says that the task ends there, and it never bootstraps. Its ``s_{t+1}`` is
  filled with ``s_t`` and marked in ``Block.next_observed``; it teaches neither dynamics nor inverse dynamics.
* ``next_observations`` made by shifting ``observations``, so that episodes end in the next one's first observation: the
  column counts as missing.
* ``next_observations[t]`` is not ``observations[t + 1]`` inside an episode: the episode is truncated at row t.
* ``timeouts`` missing: an episode is cut at the environment's time limit where the environment is known, unless
  ``next_observations`` say where it ends, and the file's end truncates the last one.

D4RL's own file names (``hopper_medium_replay-v2.hdf5``) bring D4RL's reference scores. D4RL's environments are gone;
Hopper, Walker2d and HalfCheetah are evaluated in Gymnasium's v5 versions, whose rewards and endings are nearly the same
but whose simulator is newer. Symbols: N rows, O observation size, T steps of an episode.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
from numpy.typing import NDArray

from dawm.data.sources.scores import LOCOMOTION, d4rl_scores, is_d4rl_name, reference_scores
from dawm.data.sources.source import BLOCK, Block, Source, columns, flags, require_numbers
from dawm.data.sources.spaces import environment_spaces, environment_spec, unbounded
from dawm.errors import UserError

__all__ = ["D4RLSource"]

_EVALUATED_IN = {"hopper": "Hopper-v5", "walker2d": "Walker2d-v5", "halfcheetah": "HalfCheetah-v5"}

_RANKS = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1, "timeouts": 1, "next_observations": 2}
_REQUIRED = ("observations", "actions", "rewards", "terminals")
_ENDS = 64  # of episodes, to look at


class D4RLSource(Source):
    """One file, checked, and the environment to evaluate in; None: known from the file's name, or none."""

    def __init__(self, path: Path, name: str, env_id: str | None = None) -> None:
        self.path, self.name, self.files = path, name, [path]
        with self._opened() as file:
            sizes = self._check_columns(file)
            self._surroundings(path.stem.lower().replace("_", "-"), env_id, sizes)
            self._cut(file)
        self.count = int(self._kept.sum())
        self.settings = "; ".join(self.defects)  # where it was cut

    def blocks(self) -> Iterator[Block]:
        """All rows in order."""
        # A truncated episode ends one row earlier; where it was only that one row, the episode before ends there.
        last = np.append(self._last[:-1] | ~self._kept[1:], self._last[-1:])
        cuts = [np.zeros(0, np.int64)]
        with self._opened() as file:
            for start in range(0, len(last), BLOCK):
                part = slice(start, start + BLOCK)
                observations = self._read(file, "observations", start, part.stop + 1)
                ended, kept = self._terminations[part], self._kept[part]
                rows = np.empty((len(kept), self.width), np.float32)
                parts = columns(rows, *self.sizes)
                parts.observations[:], parts.terminations[:] = observations[: len(rows)], ended
                parts.actions[:] = self._read(file, "actions", start, part.stop)
                parts.rewards[:] = self._read(file, "rewards", start, part.stop)
                if self.has_next_observations:
                    parts.next_observations[:] = self._read(file, "next_observations", start, part.stop)
                    cut = _breaks(observations, parts.next_observations, last[part])
                    last[start + cut] = True
                    cuts.append(start + cut)
                    yield Block(rows, last[part])
                else:
                    parts.next_observations[: len(observations) - 1] = observations[1:]
                    parts.next_observations[ended] = parts.observations[ended]
                    yield Block(rows[kept], last[part][kept], ~ended[kept])
        if len(found := np.concatenate(cuts)):
            self.defects = (
                *self._opening_defects,
                f"next_observations: {len(found)} are not the observations of the next row of the same episode, "
                f"the first in row {found[0]}; another episode begins there",
            )

    @contextlib.contextmanager
    def _opened(self) -> Iterator[h5py.File]:
        """The open file; what a broken one throws becomes the user's error."""
        try:
            with h5py.File(self.path, "r") as file:
                yield file
        except OSError as error:
            raise UserError(
                f"--data.dataset: got {self.name}, expected a readable HDF5 file ({error}); get it again"
            ) from error

    def _read(self, file: h5py.File, key: str, start: int = 0, stop: int | None = None) -> NDArray:
        """Rows of one column: numbers as float32, flags as booleans."""
        values = file[key][start:stop]
        if _RANKS[key] == 1:
            values = values.reshape(-1)  # some files store (N, 1)
        if key in ("terminals", "timeouts"):
            return flags(values, self.name, key, start)
        with np.errstate(over="ignore"):  # infinite values are reported with the rest
            return values.astype(np.float32, copy=False)

    def _check_columns(self, file: h5py.File) -> tuple[int, int]:
        """Check the columns for presence, rank and length; returns the sizes of observations and actions."""
        found = {key: file.get(key) for key in _RANKS}
        shapes = {key: column.shape for key, column in found.items() if isinstance(column, h5py.Dataset)}
        got = f"--data.dataset: got {self.name} with"
        if missing := ", ".join(key for key in _REQUIRED if key not in shapes):
            raise UserError(f"{got}out {missing}, expected {', '.join(_REQUIRED)}, D4RL's layout; add {missing}")
        for key in shapes:
            if key not in ("terminals", "timeouts"):
                require_numbers(found[key].dtype, self.name, key)
        rows = shapes["observations"][0] if shapes["observations"] else 0
        for key, shape in shapes.items():
            rank = _RANKS[key]
            if (
                shape[:1] != (rows,)
                or 0 in shape[1:]
                or (len(shape) != rank and not (rank == 1 and shape == (rows, 1)))
            ):
                kind = "vectors" if rank == 2 else "numbers"
                raise UserError(f"{got} {key} of shape {shape}, expected {rows} rows of {kind}; mend the file")
        ours, nexts = shapes["observations"], shapes.get("next_observations")
        if nexts not in (None, ours):
            raise UserError(f"{got} next_observations of shape {nexts}, expected {ours} as observations; mend the file")
        self.has_next_observations = "next_observations" in shapes
        return shapes["observations"][1], shapes["actions"][1]

    def _surroundings(self, title: str, env_id: str | None, sizes: tuple[int, int]) -> None:
        """Spaces, environment and reference scores."""
        if env_id is None and (locomotion := LOCOMOTION.fullmatch(title)) is not None:
            env_id = _EVALUATED_IN[locomotion["family"]]
        self.reference = d4rl_scores(title) if is_d4rl_name(title) else None
        self.env_spec = None
        # D4RL scales the actions of all its environments to [-1, 1].
        self.observation_space = unbounded(sizes[0])
        self.action_space = gym.spaces.Box(-1.0, 1.0, (sizes[1],))
        if env_id is not None:
            self.env_spec = environment_spec(env_id)
            self.observation_space, self.action_space = environment_spaces(self.env_spec, self.name, sizes)
            if not is_d4rl_name(title):
                self.reference = reference_scores(self.env_spec.id)

    def _cut(self, file: h5py.File) -> None:
        """Where episodes end, and which rows have an ``s_{t+1}`` or need none: flags of shape (N,)."""
        self._terminations = flagged = self._read(file, "terminals")
        recorded = isinstance(file.get("timeouts"), h5py.Dataset)
        if recorded:
            flagged = flagged | self._read(file, "timeouts")
        shifted = self.has_next_observations and self._are_shifted(file, flagged)
        self._last = flagged.copy()
        if not recorded:
            limit = self.env_spec.max_episode_steps if self.env_spec is not None else None
            if self.has_next_observations and not shifted and _time_limits(flagged, limit).any():
                # next_observations of their own say where episodes end, and some may be shorter than the time limit
                shifted = not self._has_breaks(file, flagged)
                limit = limit if shifted else None
            self._last |= _time_limits(flagged, limit)
            cut = "at terminals alone" if limit is None else f"at terminals and every {limit} steps"
            self.defects += (f"timeouts: the file has none; episodes are cut {cut}",)
        if shifted:
            self.has_next_observations = False
            found = "at the ends of episodes they are the next episode's first observations, so none is used"
            self.defects += (f"next_observations: {found}",)
        self._opening_defects = self.defects
        self._last[-1:] = True
        self._kept = self._terminations | ~self._last | self.has_next_observations

    def _has_breaks(self, file: h5py.File, ended: NDArray[np.bool_]) -> bool:
        """Whether ``s_{t+1}`` of any row that ended no episode, flags of shape (N,), is not the next row's ``s_t``."""
        for start in range(0, len(ended), BLOCK):
            observations = self._read(file, "observations", start, start + BLOCK + 1)
            after = self._read(file, "next_observations", start, start + BLOCK)
            if len(_breaks(observations, after, ended[start : start + BLOCK])):
                return True
        return False

    def _are_shifted(self, file: h5py.File, ended: NDArray[np.bool_]) -> bool:
        """Whether ``s_{t+1}`` of rows that ended an episode, flags of shape (N,), is the next episode's first one."""
        ends = np.flatnonzero(ended[:-1])
        shifted = []
        for end in ends[:: max(1, len(ends) // _ENDS)].tolist():
            after = self._read(file, "next_observations", end, end + 1)
            shifted.append((after == self._read(file, "observations", end + 1, end + 2)).all())
        return sum(shifted) > max(2, len(shifted) / 2)  # a few may be so by chance


def _breaks(observations: NDArray, next_observations: NDArray, last: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rows inside an episode whose ``s_{t+1}``, shape (N, O), is not the next row's ``s_t`` but for rounding.

    The observations are those of the rows and of the one after them, if there is one, shape (N + 1, O) or (N, O).
    """
    following = observations[1:]
    next_observations, last = next_observations[: len(following)], last[: len(following)]
    rows = np.flatnonzero((next_observations != following).any(axis=1) & ~last)  # few: the exact comparison is cheap
    leads_on = np.isclose(next_observations[rows], following[rows], rtol=1e-4, atol=1e-5, equal_nan=True)
    return rows[~leads_on.all(axis=1)]


def _time_limits(terminations: NDArray[np.bool_], limit: int | None) -> NDArray[np.bool_]:
    """Where episodes reach the environment's time limit, counted from the last termination, shape (N,)."""
    reached = np.zeros(len(terminations), dtype=bool)
    if limit is not None:
        starts = [0, *(np.flatnonzero(terminations) + 1)]
        for start, stop in zip(starts, [*starts[1:], None]):
            reached[start + limit - 1 : stop : limit] = True
    return reached
