"""The names of data sets: what is on this machine, what can be built, what Minari's server is known to have."""

import difflib
import warnings

import minari

from dawm.errors import UserError

__all__ = ["EMBEDDED", "REMOTE", "local_datasets", "unknown_dataset"]

EMBEDDED = ("embedded/hopper/medium-replay", "embedded/hopper/medium", "embedded/hopper/expert")
"""Data sets that are built on this machine from behaviour policies inside the package."""

_MUJOCO_THREE = ("halfcheetah", "hopper", "walker2d", "humanoid", "ant")
_MUJOCO_TWO = ("invertedpendulum", "inverteddoublependulum", "reacher", "pusher", "swimmer")
_ANTMAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
_POINTMAZES = ("open", "umaze", "medium", "large")

REMOTE = (
    *(f"mujoco/{robot}/{kind}-v0" for robot in _MUJOCO_THREE for kind in ("simple", "medium", "expert")),
    *(f"mujoco/{robot}/{kind}-v0" for robot in _MUJOCO_TWO for kind in ("medium", "expert")),
    *(f"D4RL/antmaze/{maze}-v1" for maze in _ANTMAZES),
    *(
        f"D4RL/{task}/{kind}-v2"
        for task in ("pen", "door", "hammer", "relocate")
        for kind in ("human", "cloned", "expert")
    ),
    *(f"D4RL/kitchen/{kind}-v2" for kind in ("complete", "partial", "mixed")),
    *(f"D4RL/pointmaze/{maze}{reward}-v2" for maze in _POINTMAZES for reward in ("", "-dense")),
)
"""Ids of vector-valued data sets on Minari's server, for suggestions only: the server may have more."""


def local_datasets() -> list[str]:
    """Ids of the Minari data sets on this machine; damaged ones are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return sorted(minari.list_local_datasets())
        except Exception:  # one folder with a name that Minari cannot parse makes it fail for all
            return []


def unknown_dataset(name: str, cause: Exception | None = None) -> UserError:
    """The error for a name that is neither here nor could be fetched.

    Args:
        name: The id asked for.
        cause: Why downloading failed; None: it was not tried.
    """
    line = (str(cause).splitlines() or [""])[0] or type(cause).__name__
    tried = f" and could not be downloaded ({line})" if cause is not None else ""
    if name in REMOTE:
        mend = 'run `pip install "minari[hf]"`' if isinstance(cause, ImportError) else "connect to the network"
        return UserError(
            f"data.dataset: {name} is not on this machine{tried}; {mend}, or copy it into MINARI_DATASETS_PATH"
        )
    here = [other for other in local_datasets() if other.removesuffix("-v0") not in EMBEDDED]
    near = difflib.get_close_matches(name, [*EMBEDDED, *here, *REMOTE], n=3, cutoff=0.4) or list(EMBEDDED)
    return UserError(f"data.dataset: {name!r} is not on this machine{tried}; the nearest names are {', '.join(near)}")
