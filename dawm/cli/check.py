"""Look for defects in a data set: what would mislead training without stopping it.

Symbols: N rows, O observation size, A action size.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from dawm.data.episodes import read_recordings
from dawm.data.sources.jumps import jumps
from dawm.data.sources.source import Recording

__all__ = ["check_dataset", "find_defects"]

_ROUNDING = 1e-3  # of a bound, in halves of the Box's width
_JUMP = 25.0  # usual steps; half of what is refused by `fit`


def check_dataset(console: Console, dataset: str, env_id: str | None = None) -> int:
    """Look for defects and print each on a line; "no defects" if there are none.

    Args:
        console: Where to draw.
        dataset: A Minari id, an embedded id, the path of an HDF5 file in D4RL's layout, or several joined with +.
        env_id: Gymnasium environment of the data, for its bounds and its time limit; None takes the data set's own.

    Returns:
        Number of defects.
    """
    recordings = read_recordings(dataset, env_id)
    count = 0
    for recording in recordings:
        name = f"{recording.source.name}: " if len(recordings) > 1 else ""
        for defect in find_defects(recording):
            console.print(Text(name + defect), soft_wrap=True)
            count += 1
    if not count:
        console.print("no defects")
    return count


def find_defects(recording: Recording) -> Iterator[str]:
    """Every defect of a recording, one line each."""
    yield from recording.source.defects
    if not len(recording.rewards):
        yield "steps: there are none"
        return
    for defects in (_not_finite, _outside, _jumps, _constant, _too_long, _repeated):
        yield from defects(recording)


def _not_finite(recording: Recording) -> Iterator[str]:
    for key in ("observations", "actions", "rewards", "next_observations"):
        values = getattr(recording, key)
        bad = ~np.isfinite(values).reshape(len(values), -1)
        if key == "next_observations" and bad.any():
            # Those that were observed in the next row are reported already.
            again = ~np.isfinite(recording.observations[1:])
            bad[:-1] &= ~(again & ~_last(recording)[:-1, None])
            bad[~recording.next_observed] = False
        for column in np.flatnonzero(bad.any(axis=0)):
            where = f"{key}[{column}]" if values.ndim > 1 else key
            rows = np.flatnonzero(bad[:, column])
            yield f"{where}: {len(rows)} NaN or infinite values, the first in row {rows[0]}"


def _last(recording: Recording) -> NDArray[np.bool_]:
    """Whether a row is the last of its episode, shape (N,)."""
    last = np.zeros(len(recording.rewards), bool)
    last[recording.ends - 1] = True
    return last


def _outside(recording: Recording) -> Iterator[str]:
    for key in ("observation", "action"):
        values, box = getattr(recording, f"{key}s"), getattr(recording.source, f"{key}_space")
        half = (box.high.astype(np.float64) - box.low) / 2
        slack = np.where(np.isfinite(half), _ROUNDING * half, 0.0)
        bad = (values < box.low - slack) | (values > box.high + slack)
        rows = np.flatnonzero(bad.any(axis=1))
        if len(rows):
            columns = ", ".join(map(str, np.flatnonzero(bad.any(axis=0))))
            yield f"{key}s: {len(rows)} rows outside the space in columns {columns}, the first in row {rows[0]}"


def _jumps(recording: Recording) -> Iterator[str]:
    ended = recording.terminations
    rows = jumps(recording.observations, recording.next_observations, _last(recording), ended, _JUMP)
    if len(rows):
        yield (
            f"observations: {len(rows)} jumps inside episodes, of {_JUMP:.0f} times the usual step or more, the first "
            f"after row {rows[0]}; perhaps an episode ends there"
        )


def _constant(recording: Recording) -> Iterator[str]:
    if len(recording.rewards) < 2:
        return
    for key in ("observations", "actions", "rewards"):
        values = getattr(recording, key).reshape(len(recording.rewards), -1)
        for column in np.flatnonzero((values == values[0]).all(axis=0)):
            where = f"{key}[{column}]" if key != "rewards" else key
            yield f"{where}: always {values[0, column]:g}"


def _too_long(recording: Recording) -> Iterator[str]:
    if recording.source.env_spec is None or recording.source.env_spec.max_episode_steps is None:
        return
    limit, lengths = recording.source.env_spec.max_episode_steps, np.diff(recording.ends, prepend=0)
    for first in np.flatnonzero(lengths > limit)[:1]:
        yield (
            f"episodes: {(lengths > limit).sum()} longer than the {limit} steps of {recording.source.env_spec.id}, "
            f"the first in row {recording.starts[first]}, of {lengths[first]} steps"
        )


def _repeated(recording: Recording) -> Iterator[str]:
    seen: dict[bytes, int] = {}
    again = []
    for episode, (start, end) in enumerate(zip(recording.starts, recording.ends)):
        digest = hashlib.blake2b(recording.observations[start:end].tobytes(), digest_size=16)
        digest.update(recording.actions[start:end].tobytes())
        first = seen.setdefault(digest.digest(), episode)
        if first != episode:
            again.append((episode, first))
    if again:
        episode, first = again[0]
        yield (
            f"episodes: {len(again)} the same as an earlier one, the first in row {recording.starts[episode]}, "
            f"the same as that in row {recording.starts[first]}"
        )
