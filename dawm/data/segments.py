"""SegmentTable: all segments of H steps of some episodes, gathered by number.

Symbols: N rows, B batch, H horizon, O observation size, A action size.
"""

import torch
from torch import Tensor

from dawm.data.batches import take
from dawm.data.episodes import Episodes
from dawm.data.transitions import Segments, Transitions

__all__ = ["SegmentTable"]


class SegmentTable:
    """Every place where a segment can start, and how to gather segments from there.

    In an episode that ended with a termination a segment may start at any step: behind the termination it goes on with
    absorbing rows. In a truncated episode nothing is known behind the end, so a segment must fit inside.

    Args:
        episodes: The data set.
        episode_ids: The episodes to take segments from, shape (E,).
        packed: All transitions of the data set, packed, shape (N, D).
        returns_to_go: Return-to-go of every row, shape (N,).
        horizon: Steps of a segment H.
    """

    def __init__(
        self, episodes: Episodes, episode_ids: Tensor, packed: Tensor, returns_to_go: Tensor, horizon: int
    ) -> None:
        self._packed = packed
        self._returns_to_go = returns_to_go.to(packed.device)
        self._horizon = horizon
        self._sizes = episodes.transitions.observations.shape[1], episodes.transitions.actions.shape[1]
        starts, ends = episodes.starts[episode_ids], episodes.ends[episode_ids]
        room = torch.where(episodes.truncated[episode_ids], ends - horizon + 1, ends) - starts
        room = room.clamp(min=0)
        self._ends = torch.repeat_interleave(ends, room)
        first = torch.repeat_interleave(starts, room)
        place = torch.arange(len(first)) - torch.repeat_interleave(room.cumsum(0) - room, room)
        self._starts = first + place

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def starts(self) -> Tensor:
        """The row each segment starts at, shape (len(self),)."""
        return self._starts

    def gather(self, numbers: Tensor) -> Segments:
        """Segments by number.

        Args:
            numbers: Numbers below ``len(self)``, shape (..., B).

        Returns:
            Segments with fields of shape (..., B, ...).
        """
        starts, ends = self._starts[numbers].unsqueeze(-1), self._ends[numbers].unsqueeze(-1)
        rows = starts + torch.arange(self._horizon)
        valid = rows < ends
        steps = Transitions.unpack(take(self._packed, torch.minimum(rows, ends - 1)), *self._sizes)
        # Behind a termination the last row repeats: its next observation stays and so does its termination flag.
        # (Where a file did not record that observation it stands in as "no change"; nothing bootstraps from it.)
        observations = torch.cat([steps.observations[..., :1, :], steps.next_observations], dim=-2)
        mask = valid.to(self._packed)
        return Segments(
            observations=observations,
            actions=steps.actions * mask.unsqueeze(-1),
            rewards=steps.rewards * mask,
            terminations=steps.terminations,
            valid=mask,
            returns_to_go=take(self._returns_to_go.unsqueeze(-1), starts.squeeze(-1)).squeeze(-1),
        )
