"""The cache: packed rows of data sets that are larger than ``data.memory_limit``, in files that are mapped.

Such a data set is read once, block by block, into one file of packed rows; drawing a batch touches its rows alone, and
the operating system keeps them in memory as long as there is room. Smaller data sets are read from their own files.

Each data set has a folder named by a key: a hash of the sizes, times of change and samples of its files, of the action
bounds and of all else that the rows depend on, but not of their place. (A hash of whole files would take as long as
reading them.) A changed file has another key, and what was cached of its earlier content is removed. A folder holds in
``data`` the packed rows (``rows.f32``, float32 in the machine's byte order), their rewards once more, to sum without a
walk through all rows (``rewards.f32``), what is known of the episodes (``episodes.npz``), ``meta.json``, written last,
and returns-to-go, a file for each discount, window and value of the ends. ``data`` is staged beside its place and put
there by one rename.
All of the cache can be deleted at any time; who has it mapped keeps it until the process ends.

Symbols: N rows, E episodes, D columns of a packed row.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from dawm.data.progress import progress_bar
from dawm.data.returns import returns_in_blocks
from dawm.data.sources.source import Source
from dawm.data.store.staging import lock
from dawm.data.store.table import Assembly, Table, read_table
from dawm.errors import UserError
from dawm.files import expanded, whole, write_whole

__all__ = ["MEMORY_LIMIT", "default_folder", "load_table", "mapped_returns_to_go"]

MEMORY_LIMIT = 4.0  # GiB of rows that are held in memory by default
_FORMAT = 3
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_EPISODE_FIELDS = ("ends", "terminated", "end_observed", "episode_returns", "low", "high")
_PREFIX = ".staged-"


def default_folder() -> Path:
    """Where the cache is: ``$DAWM_CACHE``, else ``dawm`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own, caches = os.environ.get("DAWM_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return expanded(own) if own else (Path(caches) if caches else Path.home() / ".cache") / "dawm"


def load_table(sources: Sequence[Source], cache_dir: str | None = None, memory_limit: float = MEMORY_LIMIT) -> Table:
    """Rows of joined data sets, held in memory, or mapped from the cache if they are more than so many GiB."""
    size = sum(source.count for source in sources) * sources[0].width * 4
    if size <= memory_limit * 2**30:
        return read_table(sources)
    root = default_folder() if cache_dir is None else expanded(cache_dir)
    identity = _identity(sources)
    folder = root / hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    try:
        return _stored(folder) or _build(folder, sources, identity)
    except OSError as error:
        raise _unusable(root, size, error) from error


def mapped_returns_to_go(
    folder: Path, ends: Tensor, discount: float, window: int | None, end_values: Tensor | None = None
) -> Tensor:
    """As `dawm.data.returns.returns_to_go`, of mapped rows and mapped too; computed at the first time."""
    values = "" if end_values is None else f"-{hashlib.blake2b(end_values.numpy().data, digest_size=8).hexdigest()}"
    path, count = folder / "data" / f"returns-{discount!r}-{window}{values}.f32", int(ends[-1])
    try:
        if not path.is_file() or path.stat().st_size != 4 * count:
            rewards = _mapped(folder / "data" / "rewards.f32", (count,))
            with whole(path) as file:
                for block in returns_in_blocks(rewards, ends, discount, window, end_values):
                    file.write(block.float().numpy().data)
        return _mapped(path, (count,))
    except OSError as error:
        raise _unusable(folder.parent, 4 * count, error) from error


def _identity(sources: Sequence[Source]) -> dict[str, Any]:
    """All that the rows depend on, whatever their place."""
    return {
        "format": [_FORMAT, sys.byteorder],
        "bounds": sources[0].bounds,
        "settings": [source.settings for source in sources],
        "files": [[_sampled(file, source.path) for file in source.files] for source in sources],
    }


def _sampled(path: Path, root: Path) -> list[Any]:
    """Place below its data set's folder, size, time of change and a sample of a file."""
    digest, status = hashlib.blake2b(digest_size=16), path.stat()
    with path.open("rb", buffering=0) as file:
        for place in np.linspace(0, max(status.st_size - _SAMPLE_BYTES, 0), _SAMPLES, dtype=np.int64):
            file.seek(place)
            digest.update(file.read(_SAMPLE_BYTES))
    return [path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns, digest.hexdigest()]


def _stored(folder: Path) -> Table | None:
    """What the cache has, mapped; None if there is nothing, or it is damaged."""
    data = folder / "data"
    try:
        meta = json.loads((data / "meta.json").read_text())
        shape, path = (int(meta["rows"]), int(meta["columns"])), data / "rows.f32"
        if path.stat().st_size != 4 * math.prod(shape) or (data / "rewards.f32").stat().st_size != 4 * shape[0]:
            return None
        with np.load(data / "episodes.npz") as stored:
            episodes = {key: torch.from_numpy(stored[key]) for key in _EPISODE_FIELDS}
        if int(episodes["ends"][-1]) != shape[0]:
            return None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
        return None
    return Table(rows=_mapped(path, shape), fingerprint=meta["fingerprint"], cache=folder, **episodes)


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A file of float32 as a tensor that must not be written to."""
    # torch knows no read-only tensors and warns; a mapping that may be written to counts as memory in use
    with warnings.catch_warnings(action="ignore"):
        return torch.from_numpy(np.memmap(path, np.float32, "r", shape=shape))


def _build(folder: Path, sources: Sequence[Source], identity: dict[str, Any]) -> Table:
    """Read the sources into the cache, unless another process has while this one waited."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder, patience=math.inf) as locked:
        stored = _stored(folder)
        if stored is not None:
            return stored
        folder.mkdir(parents=True, exist_ok=True)  # all of the cache can be deleted at any time
        if locked:  # what is here is damaged, or a killed process left it
            for left in folder.iterdir():
                shutil.rmtree(left, ignore_errors=True)
        # The folder stays where this fails: others may wait for its lock, and who made it anew would lock another.
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=folder, ignore_cleanup_errors=True) as staged:
            _write(Path(staged), sources, identity)
            with contextlib.suppress(OSError):  # a process that could not be locked out was first: use its copy
                os.rename(staged, folder / "data")
        stored = _stored(folder)
    _remove_outdated(folder)
    if stored is None:
        raise OSError(errno.EIO, f"what was written to {folder} cannot be read")
    return stored


def _write(staged: Path, sources: Sequence[Source], identity: dict[str, Any]) -> None:
    """Write the files of a data set."""
    assembly = Assembly(sources)
    shape = assembly.count, assembly.width
    if shutil.disk_usage(staged).free < 4 * shape[0] * (shape[1] + 2):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    name, reward = "+".join(source.name for source in sources), sum(sources[0].sizes)
    with (
        whole(staged / "rows.f32") as rows,
        whole(staged / "rewards.f32") as rewards,
        progress_bar(f"Caching {name}", assembly.count) as bar,
    ):
        for block in assembly.blocks():
            rows.write(block.data)
            rewards.write(block[:, reward].tobytes())
            bar.advance(bar.task_ids[0], len(block))
    table = assembly.table(torch.empty(shape, device="meta"))
    with whole(staged / "episodes.npz") as file:
        np.savez(file, **{key: getattr(table, key).numpy() for key in _EPISODE_FIELDS})
    places = [str(source.path.resolve()) for source in sources]
    meta = {"rows": shape[0], "columns": shape[1], "fingerprint": table.fingerprint, "places": places, **identity}
    write_whole(staged / "meta.json", json.dumps(meta))


def _remove_outdated(folder: Path) -> None:
    """Remove what was cached of the same files with an earlier content."""
    found = {}
    for path in folder.parent.glob("*/data/meta.json"):
        with contextlib.suppress(OSError, ValueError):
            found[path.parent.parent] = json.loads(path.read_text())
    mine = found.pop(folder, {})
    for other, meta in found.items():
        if all(meta.get(key) == mine.get(key) for key in ("places", "bounds", "settings")):
            shutil.rmtree(other, ignore_errors=True)


def _unusable(root: Path, size: int, error: OSError) -> UserError:
    return UserError(
        f"--data.cache_dir: got {root}, expected room for {size / 2**30:.1f} GiB ({error.strerror or error}); name a "
        "folder with room, or raise --data.memory_limit"
    )
