"""Chunks of episodes in files, until there are enough of them for a data set.

They lie in a hidden folder beside the data sets, which lists of data sets pass over, and are written whole or not at
all: whoever was interrupted finds there what was done, and resumes.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from dawm.data.sources.catalog import dataset_folder
from dawm.data.store.minari_writer import EpisodeColumns
from dawm.errors import UserError, first_line
from dawm.files import whole, write_whole

__all__ = ["Parts"]


class Parts:
    """The chunks made so far for one data set; iterating reads one at a time.

    Args:
        output: Minari id of the data set.
        settings: All that the chunks depend on, as plain values.
        overwrite: Whether to give up what was begun with other settings; else that is a UserError.
    """

    def __init__(self, output: str, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.folder = dataset_folder() / f".dawm-parts-{hashlib.sha256(output.encode()).hexdigest()[:16]}"
        self.counts: Counter[str] = Counter()
        self._settings = json.dumps(settings)
        self._paths = sorted(self.folder.glob("*.npz"))
        if self._paths:
            begun, wanted = json.loads((self.folder / "settings.json").read_text()), json.loads(self._settings)
            other = [key for key in wanted if begun.get(key) != wanted[key]]
            if other and not overwrite:
                raise UserError(
                    f"--output: got {output}, begun with {other[0]} {begun.get(other[0])}, not {wanted[other[0]]}, "
                    "expected the same settings; resume with those, choose another name, or --overwrite true"
                )
            if other:
                self.remove()
        for path in self._paths:
            self.counts.update(json.loads(str(_read(path)["counts"])))

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[EpisodeColumns]:
        for path in self._paths:
            part = _read(path)
            yield EpisodeColumns(*(part[key] for key in EpisodeColumns._fields))

    def append(self, columns: EpisodeColumns, counts: Counter[str]) -> None:
        """Writes one more chunk to the disk.

        Args:
            columns: The episodes.
            counts: What to add to the counts; the counts of all chunks are kept with them.
        """
        if not self._paths:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / "settings.json", self._settings)
        path = self.folder / f"{len(self._paths):06d}.npz"
        with whole(path) as file:
            np.savez(file, counts=np.array(json.dumps(counts)), **columns._asdict())
        self._paths.append(path)
        self.counts.update(counts)

    def remove(self) -> None:
        """Removes the files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._paths = []


def _read(path: Path) -> dict[str, NDArray]:
    """A chunk's arrays; nothing in it is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as part:
            return {key: part[key] for key in ("counts", *EpisodeColumns._fields)}
    except (BadZipFile, ValueError, KeyError, EOFError) as error:
        raise UserError(
            f"--output: got {path}, expected a chunk, but it cannot be read ({first_line(error)}); delete {path.parent}"
        ) from None
