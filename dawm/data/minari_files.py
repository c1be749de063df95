"""Read a Minari data set into flat rows.

An episode of T steps is stored as T + 1 observations and T actions, rewards and terminations, so that ``s_{t+1}`` of
every step is known. An episode ends where Minari ends it, and after every termination.

HDF5, Minari's usual format, is read straight into preallocated arrays, which is many times faster than building its
episode objects; other formats go through Minari.
"""

import logging
import re
import shutil
import warnings
from collections.abc import Iterator

import h5py
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray
from rich.console import Console

from dawm.data.names import dataset_folder, unknown_dataset
from dawm.data.recording import Recording
from dawm.data.scores import ReferenceScores, reference_scores
from dawm.data.spaces import action_box, environment_spaces, environment_spec, observation_box, observation_leaves
from dawm.errors import UserError

__all__ = ["REPEATED", "SOURCE", "read_minari"]

REPEATED = "last_observation_repeated"
"""Key of the metadata: true if last observations behind terminations were not recorded and repeat the ones before."""

SOURCE = "ref_score_source"
"""Key of the metadata: where the reference scores come from."""

Episode = tuple[list[NDArray], NDArray, NDArray, NDArray]
"""Leaves of the observation with T + 1 rows each; actions, rewards and terminations with T."""


def read_minari(dataset_id: str, name: str, env_id: str | None = None) -> Recording:
    """Read one data set, downloading it first if it is not on this machine.

    Args:
        dataset_id: Minari's id.
        name: What the user calls it, for messages.
        env_id: The environment to evaluate in; None: the one the data set names.
    """
    dataset = _open(dataset_id)
    paths = [path for path, _ in observation_leaves(dataset.observation_space, name)]
    observation_space = observation_box(dataset.observation_space, name)
    action_space = action_box(dataset.action_space, name)
    if env_id is None:
        # Minari shows the environment meant for evaluation only as a made one.
        env_spec = dataset._eval_env_spec or dataset.env_spec
    else:
        env_spec = environment_spec(env_id)
        environment_spaces(env_spec, name, (observation_space.shape[0], action_space.shape[0]))

    metadata = dataset.storage.metadata
    rows = int(metadata["total_steps"])
    observations = np.empty((rows, observation_space.shape[0]), np.float32)
    next_observations = np.empty_like(observations)
    actions = np.empty((rows, action_space.shape[0]), np.float32)
    rewards, terminations = np.empty(rows, np.float32), np.empty(rows, bool)
    last = np.zeros(rows, bool)

    read = _read_hdf5 if dataset.storage.FORMAT == "hdf5" else _read_any
    start, empty, folder = 0, 0, dataset.storage.data_path.parent
    try:
        for leaves, actions_, rewards_, terminations_ in read(dataset, paths, int(metadata["total_episodes"])):
            steps, column = len(rewards_), 0
            stop = start + steps
            if {len(leaf) - 1 for leaf in leaves} | {len(actions_), len(terminations_)} != {steps}:
                raise ValueError(f"columns of unequal length in the episode that begins at row {start}")
            for leaf in leaves:
                values = leaf.reshape(len(leaf), -1)
                columns = slice(column, column + values.shape[1])
                observations[start:stop, columns], next_observations[start:stop, columns] = values[:-1], values[1:]
                column += values.shape[1]
            actions[start:stop], rewards[start:stop], terminations[start:stop] = actions_, rewards_, terminations_
            if steps:
                last[stop - 1] = True
            else:
                empty += 1
            start = stop
        if start != rows:
            raise ValueError(f"{start} steps instead of {rows}")
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"data.dataset: {name} is damaged ({error}); delete {folder} and get it again") from error
    return Recording(
        name=name,
        observations=observations,
        actions=actions,
        rewards=rewards,
        next_observations=next_observations,
        terminations=terminations,
        ends=np.flatnonzero(last | terminations) + 1,
        observation_space=observation_space,
        action_space=action_space,
        env_spec=env_spec,
        reference=_reference(metadata, env_spec),
        next_observed=~terminations if metadata.get(REPEATED) else None,
        path=folder,
        defects=_defects(empty, np.flatnonzero(terminations & ~last)),
    )


def _defects(empty: int, going_on: NDArray[np.int64]) -> tuple[str, ...]:
    """What an episode should not be.

    Args:
        empty: Number of episodes without a step.
        going_on: Rows of terminations that are not the last step of their episode.
    """
    defects = []
    if empty:
        defects.append(f"episodes: {empty} without a step; they are left out")
    if len(going_on):
        defects.append(
            f"terminations: {len(going_on)} with further steps behind them in the same episode, "
            f"the first in row {going_on[0]}; another episode begins there"
        )
    return tuple(defects)


def _reference(metadata: dict, env_spec: EnvSpec | None) -> ReferenceScores | None:
    """The data set's own reference scores, else those of the tables."""
    minimum, maximum = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if minimum is not None and maximum is not None:
        source = f"data set's metadata, {metadata[SOURCE]}" if SOURCE in metadata else "data set's metadata"
        return ReferenceScores(float(minimum), float(maximum), source)
    return reference_scores(env_spec.id) if env_spec is not None else None


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
        line = (str(error).splitlines() or [""])[0] or type(error).__name__
        mend = "install what is missing" if isinstance(error, ImportError) else f"delete {folder} and get it again"
        raise UserError(f"data.dataset: Minari cannot open {dataset_id} ({line}); {mend}") from error


def _download(dataset_id: str) -> None:
    """Fetch a data set from Minari's server, or leave nothing of it."""
    # The server's client draws the bars of the download, but says nothing before, and tries for half a minute in vain.
    Console(stderr=True, soft_wrap=True).print(
        f"looking for {dataset_id} on Minari's server; without a network this takes half a minute", markup=False
    )
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # two lines for each attempt
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about newer versions of the data set
            minari.download_dataset(dataset_id)
    except BaseException as error:  # whatever the network, Hugging Face's client, Minari and the user's Ctrl-C throw
        shutil.rmtree(dataset_folder(dataset_id) / "data", ignore_errors=True)  # it was not there before
        if not isinstance(error, Exception):
            raise
        raise unknown_dataset(dataset_id, error) from error
    finally:
        logging.disable(disabled)


def _read_hdf5(dataset: minari.MinariDataset, paths: list[tuple[str, ...]], count: int) -> Iterator[Episode]:
    """Episodes by h5py's low-level calls, which take a third of the time of its objects: thousands are common."""
    keys = ["/".join(("observations", *path)).encode() for path in paths]

    def read(key: bytes, dtype: type | None = np.float32) -> NDArray:
        column = h5py.h5d.open(file.id, key)
        values = np.empty(column.shape, dtype or column.dtype)  # HDF5 converts numbers; asking for the type is slow
        column.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
        return values

    with h5py.File(dataset.storage.data_path / "main_data.hdf5", "r") as file:
        for index in range(count):
            group = b"episode_%d/" % index
            leaves = [read(group + key) for key in keys]
            yield leaves, read(group + b"actions"), read(group + b"rewards"), read(group + b"terminations", None)


def _read_any(dataset: minari.MinariDataset, paths: list[tuple[str, ...]], count: int) -> Iterator[Episode]:
    """Episodes by Minari's own reader, for every format."""
    for episode in dataset.iterate_episodes(range(count)):
        leaves = []
        for path in paths:
            values = episode.observations
            for key in path:
                values = values[key]
            leaves.append(np.asarray(values))
        yield leaves, np.asarray(episode.actions), np.asarray(episode.rewards), np.asarray(episode.terminations)
