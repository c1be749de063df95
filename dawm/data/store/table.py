"""Table: the rows of a data set as training sees them, put together from its sources block by block.

Whether the rows go into memory or into a file of the cache is for the reader of `Assembly` to decide; it holds one
block, and besides it only what is needed for each episode.

Symbols: N rows, O observation size, A action size, E episodes, D = 2 O + A + 2 columns of a packed row.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dawm.data.sources.jumps import jumps
from dawm.data.sources.source import Block, Columns, Source, columns
from dawm.data.sources.spaces import scale_actions
from dawm.errors import UserError

__all__ = ["Assembly", "Table", "read_table"]

# How far an action lies outside its bounds, in halves of the Box's width.
_ROUNDING = 1e-3
_OTHER_UNITS = 1.0

_FINITE = "finite numbers; remove those episodes from the data set"
_IN_ONE_PIECE = "each episode in one piece; end an episode (timeouts, truncations) there"
_OWN_END = "the observation that the last action led to, as the agent learns from it; record it before the reset"
_CLIPPED = "they are clipped"
_INSIDE = "them inside; name the environment with the right bounds in --data.env_id, or clip the recorded actions"


@dataclass(frozen=True)
class Table:
    """All rows of a data set in order, and where its episodes end.

    The rows are packed (`dawm.data.transitions.Transitions.pack`), float32 on the CPU, actions in [-1, 1]. Never write
    to them: of a large data set they are a mapped file. ``end_observed`` is False where the last ``s_{t+1}`` of an
    episode was not recorded and is filled with ``s_t``. Only terminated rows of files without ``next_observations`` are
    so. They serve one-step TD, as they never bootstrap, but must not teach the dynamics or the inverse dynamics: the
    world model and the forward models learn of them reward and end alone.
    """

    rows: Tensor  # shape (N, D)
    ends: Tensor  # exclusive end row of each episode, shape (E,), int64
    terminated: Tensor  # whether each episode ended with a termination, shape (E,), bool
    end_observed: Tensor  # shape (E,), bool
    episode_returns: Tensor  # undiscounted, shape (E,)
    low: Tensor  # lowest value of each column, shape (D,)
    high: Tensor  # highest value, shape (D,)
    fingerprint: str  # hash of rows, ends and action bounds: the same for the same data in another file format
    cache: Path | None = None  # folder of the cache whose file the rows are mapped from; None: held in memory


class Assembly:
    """The rows of sources that have the same sizes and bounds, in order, checked, their actions scaled to [-1, 1]."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self.count, self.width = sum(source.count for source in sources), sources[0].width
        self._digest = hashlib.blake2b(digest_size=16)
        self._episodes: list[tuple[NDArray, ...]] = []
        self._low = np.full(self.width, np.inf, np.float32)
        self._high = -self._low
        self._running = 0.0  # return of the episode that continues in the next block

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Packed rows, shape (n, D); a UserError after a source's last block if its numbers cannot be used."""
        start = 0
        for source in self._sources:
            checks = _Checks(source)
            for block in source.blocks():
                if not len(block.rows):
                    continue
                parts = columns(block.rows, *source.sizes)
                checks.scale_and_check(block, parts)
                self._record(block, parts, start)
                self._digest.update(block.rows.data)
                start += len(block.rows)
                yield block.rows
            checks.finish()
        if start != self.count:
            raise RuntimeError(f"{start} rows were read, where {self.count} were announced")

    def table(self, rows: Tensor) -> Table:
        """The data set, once all blocks were taken and put into ``rows``, shape (N, D)."""
        ends, terminated, observed, returns = (torch.from_numpy(np.concatenate(part)) for part in zip(*self._episodes))
        space, digest = self._sources[0].action_space, self._digest.copy()
        digest.update(str((self.count, *self._sources[0].sizes)).encode() + ends.numpy().tobytes())
        digest.update(space.low.astype(np.float64).tobytes() + space.high.astype(np.float64).tobytes())
        low, high = torch.from_numpy(self._low), torch.from_numpy(self._high)
        return Table(rows, ends, terminated, observed, returns, low, high, digest.hexdigest())

    def _record(self, block: Block, parts: Columns, start: int) -> None:
        """Records where episodes end, and the range of each column."""
        last = np.flatnonzero(block.last)
        observed = np.ones(len(last), bool) if block.next_observed is None else block.next_observed[last]
        # in double precision: an episode may sum a thousand rewards
        episode: NDArray[np.int64] = np.cumsum(block.last) - block.last
        returns = np.bincount(episode, parts.rewards, minlength=len(last) + 1)
        returns[0] += self._running
        self._running = returns[len(last)]
        returns = returns[: len(last)].astype(np.float32)
        self._episodes.append((start + last + 1, parts.terminations[last] != 0, observed, returns))
        np.minimum(self._low, block.rows.min(axis=0), out=self._low)
        np.maximum(self._high, block.rows.max(axis=0), out=self._high)


def read_table(sources: Sequence[Source]) -> Table:
    """Read into memory."""
    assembly = Assembly(sources)
    rows, start = torch.empty(assembly.count, assembly.width), 0
    for block in assembly.blocks():
        rows[start : start + len(block)] = torch.from_numpy(block)
        start += len(block)
    return assembly.table(rows)


class _Checks:
    """What is wrong in the numbers of a source: reported once for all of its rows."""

    def __init__(self, source: Source) -> None:
        self._source, self._rows, self._excess, self._continues = source, 0, 0.0, False
        self._wrong: dict[tuple[str, str], list[int]] = {}  # what and what to do: how many, the first one's row

    def scale_and_check(self, block: Block, parts: Columns) -> None:
        """Scales the actions of a block in place, and records what is wrong in it."""
        if not np.isfinite(block.rows).all():
            for key, values in parts._asdict().items():
                bad = ~np.isfinite(values).reshape(len(values), -1)
                for column in np.flatnonzero(bad.any(axis=0)):
                    where = f"{key}[{column}]" if values.ndim > 1 else key
                    self._note(f"NaN or infinite values in {where}", _FINITE, np.flatnonzero(bad[:, column]))
        else:
            steps = parts.observations, parts.next_observations, block.last, parts.terminations != 0
            jumped = jumps(*steps, continues=self._continues)
            at_end = block.last[jumped]
            self._note("jumps of the observations inside episodes", _IN_ONE_PIECE, jumped[~at_end])
            self._note("jumps of the observations at the ends of episodes", _OWN_END, jumped[at_end])
        actions = torch.from_numpy(parts.actions)
        actions.copy_(scale_actions(actions, self._source.action_space))
        excess = actions.abs().amax(dim=-1).numpy() - 1.0
        self._note(f"actions outside {self._source.action_space}", _CLIPPED, np.flatnonzero(excess > _ROUNDING))
        self._excess = max(self._excess, float(excess.max()))
        actions.clamp_(-1.0, 1.0)
        self._rows += len(block.rows)
        self._continues = not block.last[-1]

    def finish(self) -> None:
        """Raises a UserError for what cannot be used, and warns of what was changed."""
        for (what, advice), (count, first) in self._wrong.items():
            message = f"--data.dataset: got {self._source.name} with {count} {what}, the first in row {first}"
            if advice != _CLIPPED:
                raise UserError(f"{message}, expected {advice}")
            if self._excess > _OTHER_UNITS:
                raise UserError(f"{message}, expected {_INSIDE}")
            warnings.warn(f"{message}; {advice}", stacklevel=2)
        for defect in self._source.defects:
            warnings.warn(f"--data.dataset: {self._source.name}: {defect}", stacklevel=2)

    def _note(self, what: str, advice: str, rows: NDArray[np.int64]) -> None:
        if len(rows):
            self._wrong.setdefault((what, advice), [0, self._rows + int(rows[0])])[0] += len(rows)
