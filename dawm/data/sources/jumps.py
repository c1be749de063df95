"""Jumps: steps inside an episode that no dynamics explains, as where two episodes were joined without a flag.

Symbols: N rows, O observation size.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["jumps"]

_SAMPLE = 4096  # rows from which to tell how far a usual step goes


def jumps(
    observations: NDArray, next_observations: NDArray, last: NDArray[np.bool_], ended: NDArray[np.bool_],
    factor: float = 50.0, continues: bool = False,
) -> NDArray[np.int64]:  # fmt: skip
    """Rows from which the observation jumps, ascending.

    A jump is a single step in which at least half of the dimensions that move, and three at least, move by ``factor``
    times what they usually do (the 95 % quantile), while the steps before and after it are usual ones. So neither
    contacts, which last or move few dimensions, nor glitches, which come back, nor the start of a movement are jumps.
    The step before the first row, if an episode ``continues`` there, and the one after the last, unless an episode ends
    there, are not known and may be as large: beside them nothing counts as a jump.

    Observations ``s_t`` of consecutive rows and ``s_{t+1}`` have the shape (N, O); ``last``, shape (N,), says whether
    a row is the last of its episode, ``ended`` whether the task ended there: then ``s_{t+1}`` is free to be anything.
    """
    with np.errstate(invalid="ignore"):
        steps = np.abs(next_observations - observations)
    sample = slice(None, None, max(1, len(last) // _SAMPLE))
    usual = np.quantile(steps[sample], 0.95, axis=0)
    moving = usual > 1e-4 * observations[sample].std(axis=0)
    if moving.sum() < 3:  # an angle that wraps around is no jump
        return np.zeros(0, np.int64)
    scale = np.where(moving, 1.0 / np.maximum(usual, 1e-30), 0.0)
    # the mean over the dimensions, which is cheap: where the median is above the factor, it is above half of that
    size = steps @ (scale / moving.sum()).astype(np.float32)
    rows = np.flatnonzero(size > factor / 2)
    rows = rows[np.median(steps[rows][:, moving] * scale[moving], axis=1) > factor] if len(rows) else rows
    around, first = np.pad(size, 1, constant_values=np.inf), np.append(not continues, last[:-1])
    before, after = np.where(first[rows], 0.0, around[rows]), np.where(last[rows], 0.0, around[rows + 2])
    return rows[(np.maximum(before, after) < size[rows] / 4) & ~ended[rows]]
