"""Files that are written whole or not at all."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dawm.errors import UserError

__all__ = ["expanded", "hash_of", "whole", "writable", "write_whole"]


@contextmanager
def whole(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write that takes its place by one rename, once the block ends without an error.

    It is synced to the disk first. A kill at any moment leaves the old file or the new one, never half a file.

    Args:
        path: Where it goes.
        previous: Where the file that was there before is kept; None replaces it.

    Yields:
        The file, open for writing bytes; it has a name of its own for each process.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all.

    Args:
        path: Where to.
        text: What.
    """
    with whole(path) as file:
        file.write(text.encode())


def hash_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits.

    Args:
        path: Of the file.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()


def expanded(path: str | os.PathLike) -> Path:
    """A path with ``~`` and environment variables replaced.

    Args:
        path: As a user typed it.
    """
    return Path(os.path.expanduser(os.path.expandvars(path)))


def writable(folder: Path, key: str = "output_dir") -> Path:
    """A folder, created if need be, or a UserError where nothing can be written to it.

    Args:
        folder: The folder.
        key: The setting that names it, for messages.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        expected = f"a folder to write to ({error.strerror})"
        raise UserError(f"--{key}: got {folder}, expected {expected}; set another") from None
    return folder
