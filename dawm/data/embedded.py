"""Embedded data sets: real rollouts, built on this machine from behaviour policies inside the package.

No download is needed. Each data set is a true Minari data set, and after its building like any other
(``minari show embedded/hopper/medium-replay-v0``). `dawm.data.behaviour` says what is in them.

A build is invisible until it is complete: it happens in a hidden folder beside the data sets, which one rename puts in
place. So an interrupted build leaves no data set at all, and what a killed one leaves hidden is removed by the next.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from dawm.data.behaviour import record
from dawm.data.minari_files import dataset_folder
from dawm.data.names import EMBEDDED, unknown_dataset
from dawm.errors import UserError

__all__ = ["STEPS", "build"]

STEPS = 40_000
"""Steps of each data set; the last episode is played to its end."""

_STAGING = ".dawm-build-"
_PATIENCE = 120.0  # seconds to wait for another process, which needs a tenth of them


def build(name: str, seed: int = 0, steps: int | None = None, progress: bool | None = None) -> str:
    """Build an embedded data set, unless it is there already.

    Args:
        name: One of `dawm.data.names.EMBEDDED`, with or without the version ``-v0``.
        seed: Seed of the episodes' starts and of the actions' noise.
        steps: Least number of steps; None: `STEPS`.
        progress: Whether to show a progress bar; None: if the standard error stream is a terminal.

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
    if not _complete(dataset_id):
        try:
            _build(name, dataset_id, seed, steps, sys.stderr.isatty() if progress is None else progress)
        except OSError as error:
            raise UserError(
                f"data.dataset: {name} cannot be built in {dataset_folder()} ({error}); "
                "set MINARI_DATASETS_PATH to a folder you can write to"
            ) from error
    return dataset_id


def _complete(dataset_id: str) -> bool:
    """Whether the data set is in place; it only ever appears whole."""
    return (dataset_folder(dataset_id) / "data" / "metadata.json").is_file()


def _build(name: str, dataset_id: str, seed: int, steps: int, progress: bool) -> None:
    """Record into a hidden folder on the same file system, then put the result in place with one rename."""
    root = dataset_folder()
    with _lock(root) as locked:
        if _complete(dataset_id):  # another process has built it while this one waited
            return
        _remove_stale(root, older_than=0.0 if locked else 3600.0)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=root))
        try:
            with _bar(name, steps, progress) as bar:
                record(
                    staging, name, dataset_id, seed, steps, lambda played: bar.update(bar.task_ids[0], completed=played)
                )
            _move(staging, root, dataset_id)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _move(staging: Path, root: Path, dataset_id: str) -> None:
    """Put a finished data set in place, with Minari's description files of the folders above it."""
    namespace = Path(dataset_id).parent
    (root / namespace).mkdir(parents=True, exist_ok=True)
    for folder in (namespace, *namespace.parents[:-1]):
        source, target = (place / folder / "namespace_metadata.json" for place in (staging, root))
        if source.is_file() and not target.exists():
            source.replace(target)
    try:
        (staging / dataset_id).rename(root / dataset_id)
    except OSError:
        if not _complete(dataset_id):  # else a process that could not be locked out was first: use its copy
            raise


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[bool]:
    """Let one process at a time build in a folder; yields whether the lock was obtained.

    The folder itself is locked, so that no lock file stays behind, and the kernel frees the lock when a process is
    killed. Where such locks do not exist (Windows, some network drives), building goes on without: the rename decides.
    """
    try:
        import fcntl

        descriptor = os.open(root, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        locked, deadline = False, time.monotonic() + _PATIENCE
        while not locked and time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                break
        yield locked
    finally:
        os.close(descriptor)


def _remove_stale(root: Path, older_than: float) -> None:
    """Remove what killed builds left: with the lock held every hidden folder is stale, without it only old ones are."""
    for folder in root.glob(f"{_STAGING}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime >= older_than:
                shutil.rmtree(folder, ignore_errors=True)


class _Rate(ProgressColumn):
    """Steps a second; empty until they are known."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.0f} steps/s" if task.speed else "")


def _bar(name: str, steps: int, visible: bool) -> Progress:
    """A progress bar with rate and time left, on the standard error stream."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not visible,
    )
    bar.add_task(f"Building {name}", total=steps)
    return bar
