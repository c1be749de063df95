"""Read a Minari data set into flat rows.

An episode of T steps is stored as T + 1 observations and T actions, rewards and terminations, so that ``s_{t+1}`` of
every step is known. An episode ends where Minari ends it, and after every termination. HDF5, Minari's usual format, is
read straight into packed rows, many times faster than by its episode objects; other formats go through Minari.
"""

import contextlib
import logging
import math
import re
import shutil
import warnings
from collections.abc import Iterator
from functools import reduce
from operator import getitem

import h5py
import minari
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from dawm.data.sources import spaces
from dawm.data.sources.catalog import dataset_folder, unknown_dataset
from dawm.data.sources.scores import ReferenceScores, reference_scores
from dawm.data.sources.source import BLOCK, Block, Source, columns, flags, require_numbers
from dawm.errors import UserError, first_line

__all__ = ["REPEATED", "SOURCE", "MinariSource"]

# Keys of the metadata.
REPEATED = "last_observation_repeated"  # last observations after terminations were not recorded, but are those before
SOURCE = "ref_score_source"  # where the reference scores come from

Piece = tuple[list[NDArray], NDArray, NDArray, NDArray, bool]
"""Steps of one episode: leaves of the observation with T + 1 rows each; actions, rewards and terminations with T; and
whether the episode ends there."""


class MinariSource(Source):
    """One data set on this machine, downloaded first if it is not there.

    ``env_id`` names another environment to evaluate in than the data set's. Its actions may be in other units:
    ``action_space`` is always the data's own.
    """

    def __init__(self, dataset_id: str, name: str, env_id: str | None = None) -> None:
        self.name, self._dataset = name, (dataset := _open(dataset_id))
        got = f"--data.dataset: got {name}"
        leaves = spaces.observation_leaves(dataset.observation_space, got)
        self._paths, self._widths = [path for path, _ in leaves], [box.low.size for _, box in leaves]
        self.observation_space = spaces.observation_box(dataset.observation_space, got)
        self.action_space = spaces.action_box(dataset.action_space, got)
        if env_id is None:
            # Minari shows the environment meant for evaluation only as a made one.
            self.env_spec = dataset._eval_env_spec or dataset.env_spec
        else:
            self.env_spec = spaces.environment_spec(env_id)
            spaces.environment_spaces(self.env_spec, name, self.sizes)
        metadata = dataset.storage.metadata
        self.reference = reference_scores(self.env_spec.id) if self.env_spec is not None else None
        minimum, maximum = metadata.get("ref_min_score"), metadata.get("ref_max_score")
        if minimum is not None and maximum is not None:
            source = f"data set's metadata, {metadata[SOURCE]}" if SOURCE in metadata else "data set's metadata"
            self.reference = _reference(minimum, maximum, source, name)
        self.count, self._episodes = int(metadata["total_steps"]), int(metadata["total_episodes"])
        self._repeated = bool(metadata.get(REPEATED))
        self.path = dataset.storage.data_path.parent
        held = (self.path / "data").rglob("*")
        self.files = sorted(file for file in held if file.is_file() and file.name != "metadata.json")
        self.settings = f"{self.count} steps, {self._episodes} episodes, {self._paths}, {REPEATED} {self._repeated}"

    def blocks(self) -> Iterator[Block]:
        """All rows in order."""
        read = _read_hdf5 if self._dataset.storage.FORMAT == "hdf5" else _read_any
        empty, early, start, filled = 0, [np.zeros(0, np.int64)], 0, 0
        rows, last = self._buffers(0)
        self.defects = ()
        try:
            for piece in read(self._dataset, self._paths, self._episodes):
                observations, actions, rewards, terminations, ends = self._checked(piece, start + filled)
                steps = len(rewards)
                if filled + steps > len(rows):
                    if start + filled > self.count:
                        break
                    yield self._block(rows[:filled], last[:filled])
                    start, filled = start + filled, 0
                    rows, last = self._buffers(steps)
                stop = filled + steps
                parts = columns(rows[filled:stop], *self.sizes)
                parts.observations[:], parts.next_observations[:] = observations[:-1], observations[1:]
                parts.actions[:], parts.rewards[:], parts.terminations[:] = actions, rewards, terminations
                last[filled:stop] = terminations
                early.append(start + filled + np.flatnonzero(terminations[: steps - 1] if ends else terminations))
                if steps and ends:
                    last[stop - 1] = True
                empty, filled = empty + (not steps), stop
        except (KeyError, ValueError, OSError) as error:
            raise UserError(
                f"--data.dataset: got {self.name}, expected whole data, but it is damaged ({error}); "
                f"delete {self.path} and get it again"
            ) from error
        if start + filled != self.count:
            raise UserError(
                f"--data.dataset: got {self.name} with {start + filled} steps, expected the {self.count} of its "
                "metadata; correct total_steps there, or get it again"
            )
        if empty:
            self.defects += (f"episodes: {empty} without a step; they are left out",)
        if len(unended := np.concatenate(early)):
            self.defects += (
                f"terminations: {len(unended)} with further steps after them in the same episode, "
                f"the first in row {unended[0]}; another episode begins there",
            )
        yield self._block(rows[:filled], last[:filled])

    def _checked(self, piece: Piece, row: int) -> tuple[NDArray, NDArray, NDArray, NDArray, bool]:
        """The same with observations (T + 1, O), actions (T, A), the rest (T,); a UserError if they are not so."""
        leaves, actions, rewards, terminations, ends = piece
        steps = len(rewards)

        def flat(key: str, column: NDArray, count: int, width: int) -> NDArray:
            if len(column) != count or column.size != count * width:
                expected = (count, width) if key in ("observations", "actions") else (count,)
                raise UserError(
                    f"--data.dataset: got {self.name} with {key} of shape {column.shape} in the episode of row {row}, "
                    f"expected {expected}, as there are {steps} rewards; record it in that shape"
                )
            if key != "terminations":
                require_numbers(column.dtype, self.name, key)
            return column.reshape(count, width)

        flat_leaves = [flat("observations", leaf, steps + 1, width) for leaf, width in zip(leaves, self._widths)]
        observations = flat_leaves[0] if len(flat_leaves) == 1 else np.concatenate(flat_leaves, axis=1)
        actions = flat("actions", actions, steps, self.sizes[1])
        rewards, terminations = flat("rewards", rewards, steps, 1), flat("terminations", terminations, steps, 1)
        return observations, actions, rewards[:, 0], flags(terminations[:, 0], self.name, "terminations", row), ends

    def _buffers(self, steps: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Room for a block that begins with so many steps."""
        size = max(steps, min(BLOCK, self.count))
        return np.empty((size, self.width), np.float32), np.zeros(size, bool)

    def _block(self, rows: NDArray[np.float32], last: NDArray[np.bool_]) -> Block:
        return Block(rows, last, rows[:, -1] == 0 if self._repeated else None)


def _reference(minimum: object, maximum: object, source: str, name: str) -> ReferenceScores:
    """The reference scores of a data set's metadata, or a UserError where nothing can be scored by them."""
    with contextlib.suppress(TypeError, ValueError):
        low, high = float(minimum), float(maximum)  # type: ignore[arg-type]
        if -math.inf < low < high < math.inf:
            return ReferenceScores(low, high, source)
    raise UserError(
        f"--data.dataset: got {name} with ref_min_score {minimum!r} and ref_max_score {maximum!r}, expected a lower "
        "and a higher return; correct its metadata"
    )


def _open(dataset_id: str) -> minari.MinariDataset:
    """Minari's data set, downloaded if it is not on this machine."""
    folder = dataset_folder(dataset_id)
    if not (folder / "data").exists():
        if re.search(r"-v\d+$", dataset_id) is None or dataset_id.startswith("embedded/"):
            raise unknown_dataset(dataset_id)  # every data set on a server has a version
        _download(dataset_id)
    try:
        return minari.load_dataset(dataset_id)
    except Exception as error:  # Minari asserts, raises ValueError, and passes on what JSON and HDF5 throw
        mend = "install what is missing" if isinstance(error, ImportError) else f"put a whole copy in {folder}"
        raise UserError(
            f"--data.dataset: got {dataset_id}, which Minari cannot open ({first_line(error)}), expected a Minari data "
            f"set; {mend}"
        ) from error


def _download(dataset_id: str) -> None:
    """Fetch a data set from Minari's server, or leave nothing of it."""
    # The server's client draws the bars of the download, but says nothing before, and tries for half a minute in vain.
    Console(stderr=True, soft_wrap=True).print(
        f"looking for {dataset_id} on Minari's server; without a network this takes half a minute", markup=False
    )
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # two lines for each attempt
    try:
        with warnings.catch_warnings(action="ignore"):  # about newer versions of the data set
            minari.download_dataset(dataset_id)
    except BaseException as error:  # whatever the network, Hugging Face's client, Minari and the user's Ctrl-C throw
        shutil.rmtree(dataset_folder(dataset_id) / "data", ignore_errors=True)  # it was not there before
        if not isinstance(error, Exception):
            raise
        raise unknown_dataset(dataset_id, error) from error
    finally:
        logging.disable(disabled)


def _read_hdf5(dataset: minari.MinariDataset, paths: list[tuple[str, ...]], count: int) -> Iterator[Piece]:
    """Episodes by h5py's low-level calls, which take a third of the time of its objects: thousands are common."""
    keys = ["/".join(("observations", *path)).encode() for path in paths]

    def read(key: bytes, start: int = 0, stop: int | None = None, dtype: type | None = np.float32) -> NDArray:
        column, selected, memory = h5py.h5d.open(file.id, key), h5py.h5s.ALL, h5py.h5s.ALL
        shape = column.shape
        if start > 0 or stop is not None:
            shape = ((shape[0] if stop is None else stop) - start, *shape[1:])
            selected, memory = column.get_space(), h5py.h5s.create_simple(shape)
            selected.select_hyperslab((start, *(0 for _ in shape[1:])), shape)
        values = np.empty(shape, dtype or column.dtype)  # HDF5 converts numbers; asking for the type is slow
        try:
            column.read(memory, selected, values)
        except (OSError, TypeError):
            require_numbers(column.dtype, dataset.spec.dataset_id, key.decode())
            raise
        return values

    with h5py.File(dataset.storage.data_path / "main_data.hdf5", "r") as file:
        for index in range(count):
            group = b"episode_%d/" % index
            steps = h5py.h5d.open(file.id, group + b"rewards").shape[0]
            for start in range(0, max(steps, 1), BLOCK):
                # up to the end of each column, so that one of another length is noticed
                stop, after = (start + BLOCK, start + BLOCK + 1) if start + BLOCK < steps else (None, None)
                leaves = [read(group + key, start, after) for key in keys]
                actions, rewards = read(group + b"actions", start, stop), read(group + b"rewards", start, stop)
                terminations = read(group + b"terminations", start, stop, None)
                yield leaves, actions, rewards, terminations, stop is None


def _read_any(dataset: minari.MinariDataset, paths: list[tuple[str, ...]], count: int) -> Iterator[Piece]:
    """Episodes by Minari's own reader, for every format."""
    for episode in dataset.iterate_episodes(range(count)):
        leaves = [np.asarray(reduce(getitem, path, episode.observations)) for path in paths]
        yield leaves, np.asarray(episode.actions), np.asarray(episode.rewards), np.asarray(episode.terminations), True
