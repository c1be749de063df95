"""Mixture: real rows and the synthetic ones beside them, and how one batch is drawn from both.

Symbols: N real rows, M synthetic rows, D columns of a packed row, K batches drawn at once, S seeds, B batch size.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from dawm.data.batches import BatchLoader, RowStream, WeightedRows, derive_seed, take
from dawm.data.transitions import Transitions

__all__ = ["Mixture"]


class Mixture:
    """Packed rows (N, D) to draw from, on the training device; if they are a mapped file, gathered on the CPU.

    The real rows are drawn by ``weights``, shape (N,), float64; None draws uniformly. In the batches, rows that
    terminate have ``termination_reward`` in place of their own reward; None leaves it.
    """

    def __init__(
        self,
        real: Tensor,
        sizes: tuple[int, int],
        mapped: bool,
        weights: Tensor | None = None,
        termination_reward: float | None = None,
    ) -> None:
        self._termination_reward = termination_reward
        self.real, self._sizes, self._mapped = real, sizes, mapped
        self._weighted = None if weights is None else WeightedRows(weights)
        self.device = torch.device("cpu")
        self._synthetic = real.new_empty(0, real.shape[1])
        self._counts: Sequence[int] = ()  # synthetic rows of each block; the blocks follow one another

    def to(self, device: torch.device | str) -> None:
        """Moves what is drawn from to a device."""
        self.device = torch.device(device)
        self._synthetic = self._synthetic.to(device)
        if not self._mapped:
            self.real = self.real.to(device)

    def refill(self, *blocks: Transitions) -> None:
        """Replaces the synthetic rows in place: one block for all agents, or one for each."""
        rows = torch.cat([block.pack() for block in blocks]).to(self.device)
        if len(self._synthetic) < len(rows) or self._synthetic.shape[1] != rows.shape[1]:
            self._synthetic = torch.empty_like(rows)
        self._synthetic[: len(rows)].copy_(rows)
        self._counts = [len(block) for block in blocks]

    def _blocks(self, agents: int) -> list[tuple[int, int]]:
        """First row and number of the synthetic rows that each agent draws from."""
        if len(self._counts) not in (0, 1, agents):
            raise ValueError(f"one block of synthetic rows or {agents} are needed, got {len(self._counts)}")
        blocks = [(sum(self._counts[:index]), count) for index, count in enumerate(self._counts)] or [(0, 0)]
        return blocks if len(blocks) == agents else blocks * agents

    @property
    def synthetic(self) -> Transitions:
        """The synthetic rows now in use (views), fields of shape (M, ...)."""
        return Transitions.unpack(self._synthetic[: sum(self._counts)], *self._sizes)

    def gather(self, rows: Tensor) -> Transitions:
        """Real rows by number, on the training device, fields of shape (*rows.shape, ...)."""
        return self._unpack(take(self.real, rows).to(self.device), rows.shape[-1])

    def _unpack(self, rows: Tensor, real: int) -> Transitions:
        """Batches of packed rows, shape (..., B, D), the first so many of each batch real."""
        first = (torch.arange(rows.shape[-2], device=self.device) < real).float()
        return replace(Transitions.unpack(rows, *self._sizes), real=first.expand(rows.shape[:-1]))

    def loader(
        self, batch_size: int, fraction: float, updates: int, updates_per_step: int, seed: int, rank: int, seeds: int
    ) -> BatchLoader:
        """Batches of ``round(batch_size * fraction)`` synthetic rows, the rest real; all real until the first refill.

        ``seed`` and ``rank`` set the draws apart. So many ``seeds`` of an agent get fields of shape (K, S, B, ...), one
        gets (K, B, ...). The real rows come first.
        """
        own = [(number,) if number else () for number in range(seeds)]  # the first draws as one that is alone
        reals = [RowStream(derive_seed(seed, rank, "real", *o), self._weighted, len(self.real)) for o in own]
        synthetics = [RowStream(derive_seed(seed, rank, "synthetic", *o)) for o in own]
        synthetic_size = round(batch_size * fraction)
        size = max(synthetic_size, 1)  # numbers that a stream of synthetic rows gives per update

        def draw(count: int) -> Transitions:
            # Each stream gives as many numbers per update whatever the mixture, so that resuming can skip them and
            # the real rows of a run do not depend on its synthetic ones.
            blocks = self._blocks(seeds)
            real = torch.stack([stream.draw(len(self.real), count, batch_size) for stream in reals], dim=1)
            drawn = zip(synthetics, blocks)
            synthetic = torch.stack([first + s.draw(max(rows, 1), count, size) for s, (first, rows) in drawn], dim=1)
            mixed = synthetic_size if all(rows for _, rows in blocks) else 0
            rows = take(self.real, real[..., : batch_size - mixed]).to(self.device)
            if mixed:
                imagined = take(self._synthetic, synthetic)
                rows = pad(rows, (0, imagined.shape[-1] - rows.shape[-1]), value=1)  # a recorded row spans one step
                rows = torch.cat([rows, imagined], dim=-2)
            batch = self._unpack(rows.squeeze(1) if seeds == 1 else rows, batch_size - mixed)
            if (reward := self._termination_reward) is None:
                return batch
            return replace(batch, rewards=batch.rewards.masked_fill(batch.terminations > 0.5, reward))

        counted = [*((stream, batch_size) for stream in reals), *((stream, size) for stream in synthetics)]
        return BatchLoader(draw, counted, updates, updates_per_step)
