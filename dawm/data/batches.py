"""Drawing batches: seeded streams of row numbers, and the loaders that Lightning iterates over.

Symbols: K updates drawn at once, B batch size, E ranges.

A stream is a function of its seed alone, and each update takes a fixed count of numbers from it. So results do not
depend on K, and a resumed run skips what the interrupted one has used: a checkpoint holds its position, one number.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

__all__ = ["BatchLoader", "FixedBatches", "Ranges", "RowStream", "WeightedRows", "derive_seed", "take"]

SKIP_CHUNK = 1 << 22


def derive_seed(*parts: int | str) -> int:
    """A seed of its own for each purpose: a hash of the parts, such as the experiment's seed, the rank and a word."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6])


class WeightedRows:
    """Rows drawn as often as their weights say, shape (N,), float64, at least 0 and not all 0.

    The weights are kept as runs of equal ones, such as the rows of an episode, so that a search among few runs finds a
    row, and rows beyond memory do not bring weights beyond memory.
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights, self._counts = weights.unique_consecutive(return_counts=True)
        self._starts = self._counts.cumsum(0) - self._counts
        self._stops = (self._weights * self._counts).cumsum(0)  # of the runs, in cumulative weight

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Row numbers of a shape; each takes one number in double precision from the generator."""
        places = torch.rand(*shape, dtype=torch.float64, generator=generator) * self._stops[-1]
        run = torch.searchsorted(self._stops, places, right=True)  # a run of weight 0 stops where it starts
        count, weight = self._counts[run], self._weights[run]
        row = ((places - self._stops[run]) / weight + count).long()
        return self._starts[run] + row.clamp(min=0).minimum(count - 1)  # rounding may lead out of the run


class RowStream:
    """An endless stream of row numbers, uniform, or drawn by weight.

    ``high`` is the number of rows, or one near it: of 2^28 and more the generator gives numbers of another kind, and
    `skip` has to pass over the same.
    """

    def __init__(self, seed: int, weighted: WeightedRows | None = None, high: int = 1) -> None:
        self._generator, self._weighted, self._high = torch.Generator().manual_seed(seed), weighted, high

    def draw(self, high: int, updates: int, batch_size: int) -> Tensor:
        """The next row numbers in [0, high), shape (K, B)."""
        if self._weighted is not None:
            return self._weighted.draw((updates, batch_size), self._generator)
        return torch.randint(high, (updates, batch_size), generator=self._generator)

    def skip(self, count: int) -> None:
        """Passes over row numbers already used."""
        for start in range(0, count, SKIP_CHUNK):
            self.draw(self._high, 1, min(SKIP_CHUNK, count - start))


class Ranges:
    """Ranges of rows by their starts and lengths, shapes (E,): a list of rows that takes no memory."""

    def __init__(self, starts: Tensor, lengths: Tensor) -> None:
        self._stops = lengths.cumsum(0)
        self._shifts = starts - (self._stops - lengths)

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def find(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Rows by number, and the positions in ``starts`` of the ranges they belong to, each of the numbers' shape."""
        which = torch.searchsorted(self._stops, numbers.contiguous(), right=True)
        return numbers + self._shifts[which], which


@dataclass(eq=False)
class BatchLoader:
    """Yields K batches at once, for a stated number of updates; Lightning can resume it."""

    draw: Callable[[int], Any]  # the batches of the next so many updates
    streams: Sequence[tuple[RowStream, int]]  # what `draw` reads, each with the count of numbers it takes per update
    updates: int  # to draw for, all in all
    updates_per_step: int  # updates K that one item serves
    drawn: int = field(default=0, init=False)

    def __len__(self) -> int:
        return ceil(self.updates / self.updates_per_step)

    def __iter__(self) -> Iterator[Any]:
        while self.drawn < self.updates:
            # to the next multiple of K, also after an end or a resume in between: what runs every N updates runs there
            count = min(self.updates_per_step - self.drawn % self.updates_per_step, self.updates - self.drawn)
            self.drawn += count
            yield self.draw(count)

    def state_dict(self) -> dict[str, int]:
        """The number of updates drawn for."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resumes after the updates already drawn for."""
        for stream, numbers in self.streams:
            stream.skip((state["drawn"] - self.drawn) * numbers)
        self.drawn = state["drawn"]


@dataclass(eq=False)
class FixedBatches:
    """The same batches in every epoch, for validation."""

    batches: Sequence[Any]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def take(table: Tensor, rows: Tensor) -> Tensor:
    """Rows by number, shape (..., D), from packed rows (N, D) in one gather; the numbers may be on any device."""
    rows = rows.to(table.device, non_blocking=True)
    if table.device.type == "cpu":
        # sums over bags of one row each: unlike index_select it fetches rows into the cache ahead of their turn
        taken = embedding_bag(rows.reshape(-1, 1), table, mode="sum")
    else:
        taken = table.index_select(0, rows.reshape(-1))
    return taken.view(*rows.shape, table.shape[1])
