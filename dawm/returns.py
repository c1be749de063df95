"""Returns: discounted sums of rewards.

Symbols: N rows, E episodes, gamma the discount. The return-to-go of step t of an episode that ends after step T - 1 is
``g_t = r_t + gamma r_{t+1} + ... + gamma^(T-1-t) r_{T-1}``. Nothing is added behind a truncated end, as in D4RL's
loaders; the window form sums only the next ``window`` rewards (the two forms in DWM, arXiv 2402.03570).
"""

import torch
from torch import Tensor

__all__ = ["returns_to_go"]


def returns_to_go(rewards: Tensor, ends: Tensor, discount: float, window: int | None = None) -> Tensor:
    """Return-to-go at every step, never summing across an episode's end.

    Args:
        rewards: Rewards of all episodes, one after the other, shape (N,).
        ends: Exclusive end row of each episode, ascending, shape (E,).
        discount: Gamma, in [0, 1].
        window: Sum only this many rewards; None sums to the episode's end.

    Returns:
        Return-to-go, shape (N,), in the rewards' dtype.
    """
    if rewards.ndim != 1 or ends.ndim != 1:
        raise ValueError(f"rewards and ends must have one dimension, got {rewards.ndim} and {ends.ndim}")
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    lengths = ends - starts
    longest = int(lengths.max())
    totals = torch.zeros(len(rewards), dtype=torch.float64, device=rewards.device)
    # All episodes walk backwards together: after step k the row `ends - 1 - k` of each one holds its sum.
    running = torch.zeros(len(ends), dtype=torch.float64, device=rewards.device)
    for k in range(longest):
        alive = lengths > k
        rows = (ends - 1 - k)[alive]
        running[alive] = rewards[rows].double() + discount * running[alive]
        totals[rows] = running[alive]
    if window is not None:
        row_ends = torch.repeat_interleave(ends, lengths)
        later = torch.arange(len(rewards), device=rewards.device) + window
        inside = later < row_ends
        totals[inside] -= discount**window * totals[later[inside]].clone()
    return totals.to(rewards.dtype)
