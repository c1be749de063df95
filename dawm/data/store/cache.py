"""The cache: packed rows of large data sets in files, so that they load in no time and need not fit into memory.

Reading a data set's own file converts and rearranges every number. Data sets of at least `CACHED_ROWS` rows are
therefore read once, block by block, into one file of packed rows; the next start takes the rows from there. Up to
``data.memory_limit`` they are read into memory; what is larger is mapped, and drawing a batch touches its rows alone,
which the operating system keeps in memory as long as there is room.

Each data set has a folder named by a key: a hash of the sizes, times of change and samples of its files, of the action
bounds and of all else that the rows depend on, but not of their place. (A hash of whole files would take as long as
reading them.) A changed file has another key, and what was cached of its earlier content is removed. A folder holds

* ``data/rows.f32``: packed rows, float32 in the machine's byte order, shape (N, D),
* ``data/rewards.f32``: its column of rewards once more, shape (N,), to sum without a walk through all rows,
* ``data/episodes.npz``: where episodes end and what is known of each,
* ``data/meta.json``: written last,
* ``data/returns-*.f32``: returns-to-go of mapped rows, shape (N,), one file for each discount and window.

A folder ``data`` is staged beside its place and put there by one rename. All of the cache can be deleted at any time;
who has it mapped keeps it until the process ends.

Symbols: N rows, E episodes, D columns of a packed row.
"""

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
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from dawm.data.returns import returns_in_blocks
from dawm.data.sources.source import Source
from dawm.data.store.staging import lock, progress_bar
from dawm.data.store.table import Assembly, Table, read_table
from dawm.errors import UserError

__all__ = ["CACHED_ROWS", "MEMORY_LIMIT", "default_folder", "load_table", "mapped_returns_to_go"]

CACHED_ROWS = 200_000
"""Data sets of fewer rows are read from their own files each time, which takes less than a second."""

MEMORY_LIMIT = 4.0
"""GiB of rows that are held in memory by default."""

_FORMAT = 1
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_EPISODE_FIELDS = ("ends", "terminated", "end_observed", "returns", "low", "high")
_PREFIX = ".staged-"


def default_folder() -> Path:
    """Where the cache is: ``$DAWM_CACHE``, else ``dawm`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own, caches = os.environ.get("DAWM_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(caches) if caches else Path.home() / ".cache") / "dawm"


def load_table(sources: Sequence[Source], cache_dir: str | None = None, memory_limit: float = MEMORY_LIMIT) -> Table:
    """Rows of a data set, from the cache where it is worth it.

    Args:
        sources: The data sets to join.
        cache_dir: Folder of the cache; None: `default_folder`.
        memory_limit: Rows of more than so many GiB are mapped, others held in memory.
    """
    size = sum(source.count for source in sources) * sources[0].width * 4
    held = size <= memory_limit * 2**30
    if held and sum(source.count for source in sources) < CACHED_ROWS:
        return read_table(sources)
    root = default_folder() if cache_dir is None else Path(cache_dir).expanduser()
    identity = _identity(sources)
    folder = root / hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    try:
        table = _stored(folder, held) or _build(folder, sources, identity, held)
    except OSError as error:
        if not held:
            raise _unusable(root, size, error) from error
        warnings.warn(
            f"data.cache_dir: {root} cannot be used ({_reason(error)}), so every start reads {sources[0].name} anew; "
            "set --data.cache_dir to a folder with room",
            stacklevel=2,
        )
        return read_table(sources)
    return table


def mapped_returns_to_go(folder: Path, ends: Tensor, discount: float, window: int | None) -> Tensor:
    """Return-to-go of mapped rows, mapped too, shape (N,); computed at the first time.

    Args:
        folder: The data set's folder in the cache.
        ends: Exclusive end row of each episode, shape (E,).
        discount: Gamma.
        window: Sum only this many rewards; None sums to the episode's end.
    """
    path, count = folder / "data" / f"returns-{discount!r}-{window}.f32", int(ends[-1])
    try:
        if not path.is_file() or path.stat().st_size != 4 * count:
            staged = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
            try:
                with (folder / "data" / "rewards.f32").open("rb") as rewards, (staged / path.name).open("wb") as file:

                    def read(start: int, stop: int) -> Tensor:
                        return torch.from_numpy(np.fromfile(rewards, np.float32, stop - start))

                    for block in returns_in_blocks(read, ends, discount, window):
                        file.write(block.float().numpy().data)
                (staged / path.name).replace(path)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
        return _mapped(path, (count,))
    except OSError as error:
        raise _unusable(folder.parent, 4 * count, error) from error


def _identity(sources: Sequence[Source]) -> dict[str, Any]:
    """All that the rows depend on, whatever their place."""
    space = sources[0].action_space
    return {
        "format": [_FORMAT, sys.byteorder],
        "bounds": [space.low.tolist(), space.high.tolist()],
        "settings": [source.settings for source in sources],
        "files": [[_look(file, source.path) for file in source.files] for source in sources],
    }


def _look(path: Path, root: Path) -> list[Any]:
    """Place below its data set's folder, size, time of change and a sample of a file."""
    digest, status = hashlib.blake2b(digest_size=16), path.stat()
    with path.open("rb", buffering=0) as file:
        for place in np.linspace(0, max(status.st_size - _SAMPLE_BYTES, 0), _SAMPLES, dtype=np.int64):
            file.seek(place)
            digest.update(file.read(_SAMPLE_BYTES))
    return [path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns, digest.hexdigest()]


def _stored(folder: Path, held: bool) -> Table | None:
    """What the cache has; None if there is nothing, or it is damaged."""
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
    if held:
        rows = torch.empty(shape)
        with path.open("rb", buffering=0) as file:
            place, view = 0, rows.numpy().data.cast("B")
            while place < len(view):  # one call reads 2 GiB at most
                place += file.readinto(view[place:]) or len(view)
    else:
        rows = _mapped(path, shape)
    return Table(rows=rows, fingerprint=meta["fingerprint"], folder=None if held else folder, **episodes)


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A file of float32 as a tensor that must not be written to."""
    with warnings.catch_warnings():
        # torch knows no read-only tensors and warns; a mapping that may be written to counts as memory in use
        warnings.filterwarnings("ignore", ".*not writable.*")
        return torch.from_numpy(np.memmap(path, np.float32, "r", shape=shape))


def _build(folder: Path, sources: Sequence[Source], identity: dict[str, Any], held: bool) -> Table:
    """Read the sources into the cache, unless another process has while this one waited."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock(folder, patience=math.inf) as locked:
            stored = _stored(folder, held)
            if stored is not None:
                return stored
            if locked:  # what is here is damaged, or a killed process left it
                for left in folder.iterdir():
                    shutil.rmtree(left, ignore_errors=True)
            staged = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
            try:
                table = _write(staged, sources, identity, held)
                try:
                    staged.rename(folder / "data")
                except OSError:  # a process that could not be locked out was first: use its copy
                    if _stored(folder, held=False) is None:
                        raise
            finally:
                shutil.rmtree(staged, ignore_errors=True)
        _remove_outdated(folder, identity, sources)
    finally:
        if not (folder / "data").exists():
            shutil.rmtree(folder, ignore_errors=True)
    if table.rows.is_meta:
        return replace(table, rows=_mapped(folder / "data" / "rows.f32", tuple(table.rows.shape)), folder=folder)
    return table


def _write(staged: Path, sources: Sequence[Source], identity: dict[str, Any], held: bool) -> Table:
    """Write the files of a data set; its rows are in the table where they are to be held, else a stand-in is."""
    assembly, place = Assembly(sources), 0
    shape = assembly.count, assembly.width
    if shutil.disk_usage(staged).free < 4 * shape[0] * (shape[1] + 2):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    rows = torch.empty(shape, device="cpu" if held else "meta")
    name, reward = "+".join(source.name for source in sources), sum(sources[0].sizes)
    with (
        (staged / "rows.f32").open("wb", buffering=0) as file,
        (staged / "rewards.f32").open("wb") as rewards,
        progress_bar(f"Caching {name}", assembly.count, visible=sys.stderr.isatty() and not held) as bar,
    ):
        for block in assembly.blocks():
            view = block.data.cast("B")
            written = 0
            while written < len(view):  # a disk that fills up takes a part first
                written += file.write(view[written:])
            rewards.write(block[:, reward].tobytes())
            if held:
                rows[place : place + len(block)] = torch.from_numpy(block)
            place += len(block)
            bar.update(bar.task_ids[0], completed=place)
        rewards.flush()
        os.fsync(file.fileno())
        os.fsync(rewards.fileno())
    table = assembly.table(rows)
    with (staged / "episodes.npz").open("wb") as file:
        np.savez(file, **{key: getattr(table, key).numpy() for key in _EPISODE_FIELDS})
        file.flush()
        os.fsync(file.fileno())
    meta = {
        "rows": shape[0],
        "columns": shape[1],
        "fingerprint": table.fingerprint,
        "places": _places(sources),
        **identity,
    }
    (staged / "meta.json").write_text(json.dumps(meta))
    return table


def _places(sources: Sequence[Source]) -> list[str]:
    return [str(source.path.resolve()) for source in sources]


def _remove_outdated(folder: Path, identity: dict[str, Any], sources: Sequence[Source]) -> None:
    """Remove what was cached of the same files with an earlier content."""
    wanted = {"places": _places(sources), "bounds": identity["bounds"]}
    for meta in folder.parent.glob("*/data/meta.json"):
        try:
            found = json.loads(meta.read_text())
        except (OSError, ValueError):
            continue
        if meta.parent.parent != folder and all(found.get(key) == value for key, value in wanted.items()):
            shutil.rmtree(meta.parent.parent, ignore_errors=True)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _unusable(root: Path, size: int, error: OSError) -> UserError:
    return UserError(
        f"data.cache_dir: {size / 2**30:.1f} GiB cannot be cached in {root} ({_reason(error)}); "
        "set --data.cache_dir to a folder with room, or raise --data.memory_limit"
    )
