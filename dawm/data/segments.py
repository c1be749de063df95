"""SegmentTable: all segments of H steps of some episodes, gathered by number.

Symbols: N rows, B batch, H horizon, O observation size, A action size.
"""

import torch
from torch import Tensor

from dawm.data.batches import Ranges, take
from dawm.data.episodes import Episodes
from dawm.data.transitions import Segments, Transitions

__all__ = ["SegmentTable"]


class SegmentTable:
    """Every place where a segment can start, and how to gather segments from there.

    In an episode that ended with a termination a segment may start at any step: after the termination it continues with
    absorbing rows. In a truncated episode nothing is known beyond the end, so a segment must fit inside.

    Segments of H steps are taken from the episodes ``episode_ids``, shape (E,); ``packed``, shape (N, D), and
    ``returns_to_go``, shape (N,), are of all rows.
    """

    def __init__(
        self, episodes: Episodes, episode_ids: Tensor, packed: Tensor, returns_to_go: Tensor, horizon: int
    ) -> None:
        self._packed, self._returns_to_go, self._horizon = packed, returns_to_go, horizon
        self._sizes = episodes.sizes
        starts, self._ends = episodes.starts[episode_ids], episodes.ends[episode_ids]
        observed = episodes.end_observed[episode_ids]
        self._end_observed = None if bool(observed.all()) else observed
        stops = torch.where(episodes.truncated[episode_ids], self._ends - horizon + 1, self._ends)
        self._starts = Ranges(starts, (stops - starts).clamp(min=0))

    def __len__(self) -> int:
        return len(self._starts)

    def gather(self, numbers: Tensor) -> Segments:
        """Segments with fields of shape (..., B, ...) by number, shape (..., B), below ``len(self)``."""
        first, which = self._starts.find(numbers)
        starts, ends = first.unsqueeze(-1), self._ends[which].unsqueeze(-1)
        rows = starts + torch.arange(self._horizon)
        valid = rows < ends
        steps = Transitions.unpack(take(self._packed, torch.minimum(rows, ends - 1)), *self._sizes)
        # After a termination the last row repeats: its next observation stays and so does its termination flag.
        observations = torch.cat([steps.observations[..., :1, :], steps.next_observations], dim=-2)
        mask = valid.to(self._packed)
        returns_to_go = take(self._returns_to_go.unsqueeze(-1), first).squeeze(-1).to(mask.device)
        actions, rewards = steps.actions * mask.unsqueeze(-1), steps.rewards * mask
        observed = None
        if self._end_observed is not None:
            observed = ((rows < ends - 1) | self._end_observed[which].unsqueeze(-1)).to(mask)
        return Segments(observations, actions, rewards, steps.terminations, mask, returns_to_go, observed)
