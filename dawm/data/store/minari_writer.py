"""Write Minari data sets: the one writer of imported, recorded and synthetic episodes.

Minari's own writer takes 1.7 ms and 15 kB for an episode of eight steps, because each column can grow and is stored in
a chunk of its own. Here the columns of a short episode lie inside their headers ("compact"), and h5py's low-level calls
create them: 0.4 ms and 2.4 kB, in files like any other to Minari.

Symbols: E episodes, T_e steps of an episode, N steps of all, O observation size, A action size.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from h5py import h5a, h5d, h5f, h5g, h5p, h5s, h5t
from numpy.typing import NDArray

from dawm.data.sources.catalog import dataset_folder
from dawm.data.sources.environments import spec_as_json
from dawm.data.sources.source import Source, columns
from dawm.data.store.staging import staged
from dawm.errors import UserError

__all__ = ["EpisodeColumns", "in_episodes", "write_dataset", "write_episodes"]

COMPACT_BYTES = 32_768  # HDF5 takes up to 64 kB in a header


class EpisodeColumns(NamedTuple):
    """Some episodes in order."""

    lengths: NDArray[np.int64]  # steps T_e, at least 1, shape (E,)
    observations: NDArray[np.float32]  # T_e + 1 rows for each episode, shape (N + E, O)
    actions: NDArray[np.floating]  # in the environment's units, shape (N, A)
    rewards: NDArray[np.float32]  # shape (N,)
    terminated: NDArray[np.bool_]  # whether each episode ended with a termination, else truncated, shape (E,)


def in_episodes(source: Source) -> Iterator[EpisodeColumns]:
    """The rows of a source as whole episodes; no more than a block, or one episode, is in memory at a time."""
    open_rows: list[NDArray[np.float32]] = []
    for block in source.blocks():
        ends = np.flatnonzero(block.last) + 1
        stop = ends[-1] if len(ends) else 0
        if stop:
            rows = np.concatenate([*open_rows, block.rows[:stop]])
            yield _columns(rows, ends + len(rows) - stop, source.sizes)
            open_rows = []
        open_rows.append(block.rows[stop:])


def _columns(rows: NDArray[np.float32], ends: NDArray[np.int64], sizes: tuple[int, int]) -> EpisodeColumns:
    """Packed rows of whole episodes, shape (N, D), as columns; ``ends`` are exclusive, shape (E,)."""
    parts, count = columns(rows, *sizes), len(ends)
    lengths = np.diff(ends, prepend=0)
    observations = np.empty((len(rows) + count, sizes[0]), np.float32)
    observations[np.arange(len(rows)) + np.repeat(np.arange(count), lengths)] = parts.observations
    observations[ends + np.arange(count)] = parts.next_observations[ends - 1]
    return EpisodeColumns(lengths, observations, parts.actions, parts.rewards, parts.terminations[ends - 1] > 0)


def write_dataset(
    output: str,
    episodes: Iterable[EpisodeColumns],
    *,
    env_spec: EnvSpec | None,
    observation_space: gym.spaces.Box,
    action_space: gym.spaces.Box,
    metadata: Mapping[str, Any],
    description: str,
    algorithm_name: str | None = None,
    author: str | None = "DAWM",
    overwrite: bool = False,
    report: Callable[[int], None] = lambda steps: None,
) -> tuple[int, int]:
    """Writes a Minari data set that appears once it is whole, and returns its numbers of episodes and steps.

    Raises `OutputExists` where there is one already that shall not be replaced. Only one part of the episodes is in
    memory at a time; ``report`` is called after each with the steps written so far. The spaces are flat; that of the
    observations is stored in single precision, as they are. ``metadata``, plain values, are read once the episodes are
    written.
    """
    low, high = (bound.astype(np.float32) for bound in (observation_space.low, observation_space.high))
    spaces = {"observation_space": gym.spaces.Box(low, high, dtype=np.float32), "action_space": action_space}
    about = {"description": description, "algorithm_name": algorithm_name, "author": author}
    try:
        with staged(output, overwrite) as folder:
            # Minari warns that it wishes for an e-mail address and a link
            with _datasets_path(folder), warnings.catch_warnings(action="ignore"):
                env = env_spec if spec_as_json(env_spec) else None  # Minari keeps specifications as JSON
                storage = minari.create_dataset_from_buffers(output, [], env=env, **spaces, **about).storage
            count, steps = write_episodes(storage.data_path / "main_data.hdf5", episodes, report)
            storage.update_metadata({**metadata, "total_episodes": count, "total_steps": steps})
            storage.update_metadata({"dataset_size": float(storage.get_size())})
    except OSError as error:
        key = "data.dataset" if output.startswith("embedded/") else "output"
        raise UserError(
            f"--{key}: got {output}, expected to write it in {dataset_folder()} ({error}); free the disk, or set "
            "MINARI_DATASETS_PATH to a folder you can write to"
        ) from error
    return count, steps


@contextmanager
def _datasets_path(folder: Path) -> Iterator[None]:
    """Points Minari at another folder for a while; its one setting is the environment variable."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        del os.environ["MINARI_DATASETS_PATH"]
        os.environ.update({} if before is None else {"MINARI_DATASETS_PATH": before})


def write_episodes(path: Path, parts: Iterable[EpisodeColumns], report: Callable[[int], None]) -> tuple[int, int]:
    """Writes (or replaces) the data file ``main_data.hdf5`` of Minari's storage, part by part, as `write_dataset`."""
    episodes = steps = 0
    with closing(h5f.create(str(path).encode(), h5f.ACC_TRUNC, fcpl=_timeless(h5p.FILE_CREATE))) as file:
        for part in parts:
            _write_part(file, part, first=episodes)
            episodes, steps = episodes + len(part.lengths), steps + len(part.rewards)
            report(steps)
        h5f.flush(file)
    return episodes, steps


def _write_part(file: h5f.FileID, part: EpisodeColumns, first: int) -> None:
    arrays = [np.ascontiguousarray(array) for array in (part.observations, part.actions, part.rewards)]
    observations, actions, rewards = arrays
    observation_type, action_type, reward_type = (h5t.py_create(array.dtype) for array in arrays)
    compact, plain = _timeless(h5p.DATASET_CREATE), _timeless(h5p.DATASET_CREATE)
    compact.set_layout(h5d.COMPACT)

    def column(group: h5g.GroupID, key: bytes, kind: h5t.TypeID, values: NDArray) -> None:
        layout = compact if values.nbytes <= COMPACT_BYTES else plain
        h5d.create(group, key, kind, _space(values.shape), layout).write(h5s.ALL, h5s.ALL, values)

    start, group_properties = 0, _timeless(h5p.GROUP_CREATE)
    for index, (length, terminated) in enumerate(zip(part.lengths.tolist(), part.terminated.tolist())):
        stop, before = start + length, start + index  # each episode has one observation more than steps
        group = h5g.create(file, b"episode_%d" % (first + index), gcpl=group_properties)
        for name, value in ((b"id", first + index), (b"total_steps", length)):
            h5a.create(group, name, h5t.STD_I64LE, _space(())).write(np.array(value, np.int64))
        column(group, b"observations", observation_type, observations[before : before + length + 1])
        column(group, b"actions", action_type, actions[start:stop])
        column(group, b"rewards", reward_type, rewards[start:stop])
        column(group, b"terminations", BOOL, _flags(length, terminated))
        column(group, b"truncations", BOOL, _flags(length, not terminated))
        start = stop


BOOL = h5t.py_create(np.dtype(bool), logical=True)


def _timeless(kind: h5p.PropClassID) -> Any:
    """Properties of a file, group or column without its time: the same episodes give the same bytes."""
    properties = h5p.create(kind)
    properties.set_obj_track_times(False)
    return properties


@cache
def _space(shape: tuple[int, ...]) -> h5s.SpaceID:
    return h5s.create_simple(shape) if shape else h5s.create(h5s.SCALAR)


@cache
def _flags(length: int, last: bool) -> NDArray[np.bool_]:
    flags = np.zeros(length, bool)
    flags[-1] = last
    return flags
