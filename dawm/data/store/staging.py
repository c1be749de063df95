"""Staging: a Minari data set that is invisible until it is complete.

It is written in a hidden folder beside the data sets, and put in place by one rename. So interrupted work leaves no
data set at all. Who writes holds the lock of the hidden folder: one without, left by a killed process, is removed.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from minari.dataset.minari_dataset import parse_dataset_id

from dawm.data.sources.catalog import dataset_folder
from dawm.errors import UserError

__all__ = ["OutputExists", "check_output", "is_complete", "lock", "staged"]

_PREFIX = ".dawm-build-"


class OutputExists(UserError):
    """A data set of that id is there already, and shall not be replaced."""

    def __init__(self, output: str) -> None:
        got = f"--output: got {output}, expected a new id, but {output} is there already"
        super().__init__(f"{got}; choose another, or --overwrite true")


def check_output(output: str, overwrite: bool) -> None:
    """Raise a UserError where a data set cannot be written under an id."""
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
    """Yields a folder to write the data set in, and puts it in place if the block ends without an error.

    Raises `OutputExists`, before the block or after it, if the data set is there already and shall not be replaced.
    """
    root = dataset_folder()
    with contextlib.ExitStack() as writing:
        with lock(root) as locked:
            if is_complete(dataset_id) and not overwrite:
                raise OutputExists(dataset_id)
            for left in root.glob(f"{_PREFIX}*") if locked else ():
                with lock(left, patience=0.0) as stale:
                    if stale:
                        shutil.rmtree(left, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
            writing.enter_context(lock(folder))
            writing.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder
        with lock(root):
            _move(folder, root, dataset_id, overwrite)


@contextlib.contextmanager
def lock(folder: Path, patience: float = 120.0) -> Iterator[bool]:
    """Hold a folder's lock, for which others are waited so many seconds; yields whether it was obtained.

    The folder itself is locked, so that no lock file is left, and the kernel frees the lock when a process is
    killed. Where such locks do not exist (Windows, some network drives), nothing is locked: the rename decides.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    locked, deadline = False, time.monotonic() + patience
    try:
        while not locked:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.1)
            except OSError:
                break
        yield locked
    finally:
        os.close(descriptor)


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
    except OSError as error:
        if replaced.exists():
            replaced.rename(target)
        elif is_complete(dataset_id):  # another process was faster
            raise OutputExists(dataset_id) from error
        raise
