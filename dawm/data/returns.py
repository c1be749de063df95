"""Returns: discounted sums of rewards.

Symbols: N rows, E episodes, gamma the discount. The return-to-go of step t of an episode that ends after step T - 1 is
``g_t = r_t + gamma r_{t+1} + ... + gamma^(T-1-t) r_{T-1}``, and ``gamma^(T-t)`` times the value of the end where one is
given; the window form sums only the next ``window`` rewards (the two forms in DWM, arXiv 2402.03570).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["returns_in_blocks", "returns_to_go"]

BLOCK = 1 << 18  # rows to sum at once, if not one episode has more: bounds the memory, and fits into a cache


def returns_to_go(
    rewards: Tensor, ends: Tensor, discount: float, window: int | None = None, end_values: Tensor | None = None
) -> Tensor:
    """Return-to-go at every step, never summing across an episode's end, shape (N,), in the rewards' dtype.

    Args:
        rewards: Rewards of all episodes, one after the other, shape (N,).
        ends: Exclusive end row of each episode, ascending, shape (E,).
        discount: Gamma, in [0, 1].
        window: Sum only this many rewards; None sums to the episode's end.
        end_values: Value of what comes after the end of each episode, shape (E,); None for nothing.
    """
    if rewards.ndim != 1 or ends.ndim != 1:
        raise ValueError(f"rewards and ends must have one dimension, got {rewards.ndim} and {ends.ndim}")
    blocks = returns_in_blocks(rewards, ends, discount, window, end_values)
    return torch.cat([block.to(rewards.dtype) for block in blocks])


def returns_in_blocks(
    rewards: Tensor, ends: Tensor, discount: float, window: int | None = None, end_values: Tensor | None = None
) -> Iterator[Tensor]:
    """As `returns_to_go`, some whole episodes at a time, in double precision."""
    first, start = 0, 0
    while first < len(ends):
        after = max(first + 1, int(torch.searchsorted(ends, start + BLOCK, right=True)))
        stop = int(ends[after - 1])
        block, stops = rewards[start:stop].double(), ends[first:after] - start
        if end_values is not None:  # as if the last reward brought it
            block = block.index_add(0, stops - 1, discount * end_values[first:after].to(block))
        yield _sums(block, stops, discount, window)
        first, start = after, stop


def _sums(rewards: Tensor, ends: Tensor, discount: float, window: int | None) -> Tensor:
    """Return-to-go of some whole episodes, shape (N,), from rewards in double precision."""
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    left = torch.repeat_interleave(ends, lengths) - torch.arange(len(rewards), device=rewards.device)
    totals = rewards.clone()
    # Each pass doubles how many rewards a row has summed: its own `reach`, and those of the row after them.
    reach, longest = 1, int(lengths.max())
    while reach < longest and discount**reach > 0:
        further = torch.where(left[:-reach] > reach, totals[reach:], 0.0)
        totals[:-reach] += discount**reach * further
        reach *= 2
    if window is not None and window < longest:
        further = torch.where(left[:-window] > window, totals[window:], 0.0)
        totals[:-window] -= discount**window * further
    return totals
