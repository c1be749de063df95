"""Embedded data sets: real rollouts, built on this machine from behaviour policies inside the package.

No download is needed. Each data set is a true Minari data set, and after its building like any other
(``minari show embedded/hopper/medium-replay-v0``). `dawm.data.sources.behaviour` says what is in them,
`dawm.data.store.staging` how a build stays invisible until it is complete.
"""

import sys

from dawm.data.sources.behaviour import record
from dawm.data.sources.catalog import EMBEDDED, dataset_folder, unknown_dataset
from dawm.data.store.staging import is_complete, progress_bar, staged
from dawm.errors import UserError

__all__ = ["STEPS", "build"]

STEPS = 40_000
"""Steps of each data set; the last episode is played to its end."""


def build(
    name: str, seed: int = 0, steps: int | None = None, progress: bool | None = None, overwrite: bool = False
) -> str:
    """Build an embedded data set, unless it is there already.

    Args:
        name: One of `dawm.data.sources.catalog.EMBEDDED`, with or without the version ``-v0``.
        seed: Seed of the episodes' starts and of the actions' noise.
        steps: Least number of steps; None: `STEPS`.
        progress: Whether to show a progress bar; None: if the standard error stream is a terminal.
        overwrite: Whether to build it again if it is there.

    Returns:
        Minari's id: the name with ``-v0``; another seed or number of steps than the default becomes part of it.
    """
    name = name.removesuffix("-v0")
    if name not in EMBEDDED:
        raise unknown_dataset(name)
    steps = STEPS if steps is None else steps
    variant = (f"-seed{seed}" if seed else "") + (f"-steps{steps}" if steps != STEPS else "")
    # Minari 0.5 demands a version: it fails on every data set of the machine if one of them has none.
    dataset_id = f"{name}{variant}-v0"
    if overwrite or not is_complete(dataset_id):
        try:
            _build(name, dataset_id, seed, steps, sys.stderr.isatty() if progress is None else progress, overwrite)
        except OSError as error:
            raise UserError(
                f"data.dataset: {name} cannot be built in {dataset_folder()} ({error}); "
                "set MINARI_DATASETS_PATH to a folder you can write to"
            ) from error
    return dataset_id


def _build(name: str, dataset_id: str, seed: int, steps: int, progress: bool, overwrite: bool) -> None:
    with staged(dataset_id, overwrite) as folder:
        if folder is None:
            return
        with progress_bar(f"Building {name}", steps, progress) as bar:
            record(folder, name, dataset_id, seed, steps, lambda played: bar.update(bar.task_ids[0], completed=played))
