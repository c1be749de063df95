"""The names of data sets: what is on this machine, what can be built, what Minari's server is known to have."""

import difflib
import json
import os
from pathlib import Path
from typing import Any

from minari.storage.datasets_root_dir import get_dataset_path

from dawm.errors import UserError, first_line

__all__ = ["EMBEDDED", "REMOTE", "dataset_folder", "local_datasets", "unknown_dataset"]

EMBEDDED = ("embedded/hopper/medium-replay", "embedded/hopper/medium", "embedded/hopper/expert")
"""Data sets that are built on this machine from behaviour policies inside the package."""

_MUJOCO_THREE = ("halfcheetah", "hopper", "walker2d", "humanoid", "ant")
_MUJOCO_TWO = ("invertedpendulum", "inverteddoublependulum", "reacher", "pusher", "swimmer")
_HANDS = ("pen", "door", "hammer", "relocate")
_ANTMAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
_POINTMAZES = ("open", "umaze", "medium", "large")

REMOTE = (
    *(f"mujoco/{task}/{kind}-v0" for task in _MUJOCO_THREE for kind in ("simple", "medium", "expert")),
    *(f"mujoco/{task}/{kind}-v0" for task in _MUJOCO_TWO for kind in ("medium", "expert")),
    *(f"D4RL/antmaze/{maze}-v1" for maze in _ANTMAZES),
    *(f"D4RL/{task}/{kind}-v2" for task in _HANDS for kind in ("human", "cloned", "expert")),
    *(f"D4RL/kitchen/{kind}-v2" for kind in ("complete", "partial", "mixed")),
    *(f"D4RL/pointmaze/{maze}{reward}-v2" for maze in _POINTMAZES for reward in ("", "-dense")),
)
"""Ids of vector-valued data sets on Minari's server, for suggestions only: the server may have more."""


def dataset_folder(dataset_id: str = "") -> Path:
    """Where Minari keeps a data set (without an id: all of them); a UserError if the place cannot be used."""
    try:
        return get_dataset_path(dataset_id)
    except OSError as error:
        raise UserError(
            f"--data.dataset: got {dataset_id!r}, expected a folder for Minari's data sets, but it cannot be used "
            f"({error}); set MINARI_DATASETS_PATH to a folder you can write to"
        ) from error


def local_datasets() -> dict[str, dict[str, Any]]:
    """Metadata of the Minari data sets on this machine by id, sorted; empty for those that cannot be read.

    Minari's own list fails for all data sets if one of them has a name without a version.
    """
    found, root = {}, dataset_folder()
    for path, folders, _ in os.walk(root, followlinks=True):
        if os.path.realpath(path) in map(os.path.realpath, Path(path).parents):  # a link to a folder above it
            folders.clear()
        elif "data" in folders:
            found[Path(path).relative_to(root).as_posix()] = _metadata(Path(path, "data", "metadata.json"))
            folders.clear()
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
    return dict(sorted(found.items()))


def _metadata(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def unknown_dataset(name: str, cause: Exception | None = None) -> UserError:
    """The error for an id that is neither here nor could be fetched; without a cause that was not tried."""
    tried = f" and could not be downloaded ({first_line(cause)})" if cause is not None else ""
    got = f"--data.dataset: got {name}, which is not on this machine{tried}, expected"
    if name in REMOTE:
        mend = 'run `pip install "minari[hf]"`' if isinstance(cause, ImportError) else "connect to the network"
        return UserError(f"{got} to find it on Minari's server; {mend}, or copy it into MINARI_DATASETS_PATH")
    # Those that cannot be read are no help.
    local = local_datasets().items()
    here = [other for other, metadata in local if metadata and other.removesuffix("-v0") not in EMBEDDED]
    near = difflib.get_close_matches(name, [*EMBEDDED, *here, *REMOTE], n=3, cutoff=0.4) or list(EMBEDDED)
    return UserError(f"{got} the name of a data set; the nearest names are {', '.join(near)}")
