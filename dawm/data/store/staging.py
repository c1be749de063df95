"""Staging: a Minari data set that is invisible until it is complete.

It is written in a hidden folder beside the data sets, which one rename puts in place. So interrupted work leaves no
data set at all, and what a killed process leaves hidden is removed by the next.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from minari.dataset.minari_dataset import parse_dataset_id
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from dawm.data.sources.catalog import dataset_folder
from dawm.errors import UserError

__all__ = ["OutputExists", "check_output", "datasets_path", "is_complete", "lock", "progress_bar", "staged"]

_PREFIX = ".dawm-build-"
_PATIENCE = 120.0  # seconds to wait for another process, which needs a tenth of them


class OutputExists(UserError):
    """A data set of that id is there already, and shall not be replaced."""

    def __init__(self, output: str) -> None:
        super().__init__(
            f"--output: got {output}, expected a new id, but {output} is there already; choose another, or --overwrite "
            "true"
        )


def check_output(output: str, overwrite: bool) -> None:
    """Raise a UserError where a data set cannot be written under an id.

    Args:
        output: Minari's id.
        overwrite: Whether a data set of that id may be replaced.
    """
    try:
        parse_dataset_id(output)
    except (ValueError, TypeError) as error:  # a TypeError where the version is missing
        raise UserError(
            f"--output: got {output!r}, not a Minari id, expected one; write it as namespace/name-v0"
        ) from error
    if output.startswith("embedded/"):
        raise UserError(
            f"--output: got {output}, which would look like one of the embedded, expected another namespace; choose one"
        )
    if is_complete(output) and not overwrite:
        raise OutputExists(output)


def is_complete(dataset_id: str) -> bool:
    """Whether the data set is in place; a staged one only ever appears whole."""
    return (dataset_folder(dataset_id) / "data" / "metadata.json").is_file()


@contextlib.contextmanager
def staged(dataset_id: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to write the data set in, and put it in place if the block ends without an error.

    Raises `OutputExists` if the data set is there already and shall not be replaced.

    Args:
        dataset_id: Minari's id.
        overwrite: Whether to replace a data set of that id, at the very end.

    Yields:
        The folder to use in place of Minari's own.
    """
    root = dataset_folder()
    with lock(root) as locked:
        if is_complete(dataset_id) and not overwrite:  # perhaps another process has built it while this one waited
            raise OutputExists(dataset_id)
        _remove_stale(root, older_than=0.0 if locked else 3600.0)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        try:
            yield folder
            _move(folder, root, dataset_id, overwrite)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def datasets_path(folder: Path) -> Iterator[None]:
    """Point Minari at another folder for a while; its one setting is the environment variable."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


@contextlib.contextmanager
def lock(root: Path, patience: float = _PATIENCE) -> Iterator[bool]:
    """Let one process at a time build in a folder; yields whether the lock was obtained.

    The folder itself is locked, so that no lock file is left, and the kernel frees the lock when a process is
    killed. Where such locks do not exist (Windows, some network drives), nothing is locked: the rename decides.

    Args:
        root: The folder.
        patience: Seconds to wait for another process.
    """
    try:
        import fcntl

        descriptor = os.open(root, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        locked, deadline = False, time.monotonic() + patience
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


def progress_bar(description: str, total: int, visible: bool) -> Progress:
    """A progress bar of one task, in steps, with rate and time left, on the standard error stream."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not visible,
    )
    bar.add_task(description, total=total)
    return bar


class _Rate(ProgressColumn):
    """Steps a second; empty until they are known."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


def _move(folder: Path, root: Path, dataset_id: str, overwrite: bool) -> None:
    """Put a finished data set in place, with Minari's description files of the folders above it."""
    namespace = Path(dataset_id).parent
    (root / namespace).mkdir(parents=True, exist_ok=True)
    for above in (namespace, *namespace.parents)[:-1]:
        source, target = (place / above / "namespace_metadata.json" for place in (folder, root))
        if source.is_file() and not target.exists():
            source.replace(target)
    target, replaced = root / dataset_id, folder / ".replaced"
    if overwrite and target.exists():
        target.rename(replaced)
    try:
        (folder / dataset_id).rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
            raise
        if not is_complete(dataset_id):  # else a process that could not be locked out was first: use its copy
            raise


def _remove_stale(root: Path, older_than: float) -> None:
    """Remove what killed builds left: with the lock held every hidden folder is stale, without it only old ones are."""
    for folder in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime >= older_than:
                shutil.rmtree(folder, ignore_errors=True)
