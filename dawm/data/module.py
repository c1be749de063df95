"""TransitionDataModule: real and imagined transitions, mixed while batches are drawn.

All data stand in memory as tensors on the training device and are drawn there, in the main process: a gather of packed
rows is far cheaper than worker processes, and a refill of the imagined rows is visible in the next batch. Rows beyond
``memory_limit`` stay in a mapped file of the cache (`dawm.data.store.cache`), and are gathered from it on the CPU.

Symbols: N real rows, B batch size, K batches drawn at once, H horizon, O observation size, A action size.
"""

from typing import Any

import lightning as L
import torch
from gymnasium.envs.registration import EnvSpec
from torch import Tensor

from dawm.data.batches import BatchLoader, FixedBatches, Ranges, RowStream, derive_seed, take
from dawm.data.episodes import Episodes, load_episodes
from dawm.data.segments import SegmentTable
from dawm.data.sources.scores import ReferenceScores
from dawm.data.store.cache import MEMORY_LIMIT
from dawm.data.transitions import Segments, Transitions
from dawm.errors import UserError

__all__ = ["TransitionDataModule"]

VALIDATION_ROWS = 8192  # enough to see an error to two digits
VALIDATION_BATCH = 1024


class TransitionDataModule(L.LightningDataModule):
    """Loads a data set and draws batches for the three stages.

    Args:
        dataset: Minari id, embedded id, path of a D4RL-layout HDF5 file, or several of them joined with ``+``.
        env_id: Gymnasium environment to evaluate in; None takes the data set's own.
        horizon: Steps of a segment H, in environment steps.
        discount: Discount of the return-to-go.
        return_window: Rewards summed in the return-to-go; None sums to the episode's end.
        batch_size: Transitions per update and per rank (agent and inverse dynamics).
        segment_batch_size: Segments per update and per rank (world model).
        synthetic_fraction: Share of imagined rows in an agent's batch, in [0, 1]. 0 trains on real data alone.
        updates_per_step: Batches drawn at once K. Saves Lightning's cost per step; results do not depend on it.
        validation_fraction: Share of the episodes held out from the world model and the inverse dynamics, in (0, 1).
        seed: Seed of the split and of all draws; ranks draw different rows from it.
        cache_dir: Folder for the cache of large data sets; None: ``$DAWM_CACHE``, else ``~/.cache/dawm``.
        memory_limit: GiB of real rows to hold in memory, and on the training device, per process; the rows of a larger
            data set are mapped from the cache. Results do not depend on it.
    """

    def __init__(
        self,
        dataset: str = "embedded/hopper/medium-replay",
        env_id: str | None = None,
        horizon: int = 8,
        discount: float = 0.99,
        return_window: int | None = None,
        batch_size: int = 256,
        segment_batch_size: int = 256,
        synthetic_fraction: float = 0.5,
        updates_per_step: int = 20,
        validation_fraction: float = 0.1,
        seed: int = 0,
        cache_dir: str | None = None,
        memory_limit: float = MEMORY_LIMIT,
    ) -> None:
        super().__init__()
        _check("synthetic_fraction", synthetic_fraction, 0 <= synthetic_fraction <= 1, "a number from 0 to 1")
        _check("validation_fraction", validation_fraction, 0 < validation_fraction < 1, "a number between 0 and 1")
        _check("memory_limit", memory_limit, memory_limit >= 0, "a number of GiB, at least 0")
        _check("discount", discount, 0 <= discount <= 1, "a number from 0 to 1")
        sizes = {"horizon": horizon, "batch_size": batch_size, "segment_batch_size": segment_batch_size}
        sizes |= {"updates_per_step": updates_per_step, "return_window": 1 if return_window is None else return_window}
        for key, value in sizes.items():
            _check(key, value, value >= 1, "a whole number of at least 1")
        self.dataset = dataset
        self.env_id = env_id
        self.horizon = horizon
        self.discount = discount
        self.return_window = return_window
        self.batch_size = batch_size
        self.segment_batch_size = segment_batch_size
        self.synthetic_fraction = synthetic_fraction
        self.updates_per_step = updates_per_step
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.cache_dir = cache_dir
        self.memory_limit = memory_limit
        self._episodes: Episodes | None = None
        self._synthetic_count = 0

    # The data set

    def setup(self, stage: str | None = None) -> None:
        """Loads the data set once, and splits off the held-out episodes."""
        if self._episodes is not None:
            return
        episodes = load_episodes(self.dataset, self.env_id, self.cache_dir, self.memory_limit)
        longest = int(episodes.lengths.max())
        if longest < self.horizon:
            raise UserError(
                f"horizon: {self.horizon} steps, but the longest episode of {self.dataset!r} has {longest}; "
                f"set --horizon to {longest} or less"
            )
        self._episodes = episodes
        self._real_rows = episodes.rows
        self.returns_to_go = episodes.returns_to_go(self.discount, self.return_window)
        self._synthetic_rows = torch.empty(0, self._real_rows.shape[1])
        order = torch.randperm(len(episodes.ends), generator=torch.Generator().manual_seed(self.seed))
        held_out = min(max(1, round(self.validation_fraction * len(order))), len(order) - 1)
        self.validation_episodes, self.training_episodes = order[:held_out].sort()[0], order[held_out:].sort()[0]
        if held_out == 0:  # a single episode: nothing to hold out, validate on what is there
            self.validation_episodes = self.training_episodes

    @property
    def episodes(self) -> Episodes:
        """The real data set."""
        self.setup()
        assert self._episodes is not None
        return self._episodes

    @property
    def observation_size(self) -> int:
        """O."""
        return self.episodes.observation_space.shape[0]

    @property
    def action_size(self) -> int:
        """A."""
        return self.episodes.action_space.shape[0]

    @property
    def env_spec(self) -> EnvSpec | None:
        """How to make the evaluation environment."""
        return self.episodes.env_spec

    @property
    def reference(self) -> ReferenceScores | None:
        """What a score of 0 and of 100 stand for."""
        return self.episodes.reference

    def to(self, device: torch.device | str) -> None:
        """Moves what batches are drawn from; loaders made after this draw there.

        Args:
            device: The training device.
        """
        self._synthetic_rows = self._synthetic_rows.to(device)
        if self.episodes.cache is None:
            self._real_rows = self._real_rows.to(device)

    # Stage 1: segments for the world model

    def segment_loader(self, updates: int, rank: int = 0) -> BatchLoader:
        """Random segments of the training episodes: `Segments` with fields of shape (K, B, ...).

        Args:
            updates: Updates to draw for.
            rank: The process that draws; each draws different rows.
        """
        table = self._segment_table(self.training_episodes)
        stream = RowStream(derive_seed(self.seed, rank, "segments"))

        def draw(count: int) -> Segments:
            return table.gather(stream.draw(len(table), count, self.segment_batch_size)).to(self._synthetic_rows.device)

        return BatchLoader(draw, [(stream, self.segment_batch_size)], updates, self.updates_per_step)

    def validation_segment_loader(self, rank: int = 0, world_size: int = 1) -> FixedBatches:
        """A fixed sample of held-out segments, a share for each rank.

        Args:
            rank: This process.
            world_size: Number of processes.
        """
        table = self._segment_table(self.validation_episodes)
        parts = self._validation_sample(len(table), rank, world_size)
        return FixedBatches([table.gather(part).to(self._synthetic_rows.device) for part in parts])

    def _segment_table(self, episode_ids: Tensor) -> SegmentTable:
        table = SegmentTable(self.episodes, episode_ids, self._real_rows, self.returns_to_go, self.horizon)
        if len(table) == 0:
            raise UserError(
                f"horizon: no segment of {self.horizon} steps fits into the episodes of {self.dataset!r} chosen for "
                "training or validation; lower --horizon"
            )
        return table

    # Stage 2: pairs of observations for the inverse dynamics

    def transition_loader(self, updates: int, rank: int = 0) -> BatchLoader:
        """Random real transitions of the training episodes: `Transitions` with fields of shape (K, B, ...).

        Args:
            updates: Updates to draw for.
            rank: The process that draws; each draws different rows.
        """
        rows = self._pairs(self.training_episodes)
        stream = RowStream(derive_seed(self.seed, rank, "transitions"))

        def draw(count: int) -> Transitions:
            return self._gather(rows.find(stream.draw(len(rows), count, self.batch_size))[0])

        return BatchLoader(draw, [(stream, self.batch_size)], updates, self.updates_per_step)

    def validation_transition_loader(self, rank: int = 0, world_size: int = 1) -> FixedBatches:
        """A fixed sample of held-out transitions, a share for each rank.

        Args:
            rank: This process.
            world_size: Number of processes.
        """
        rows = self._pairs(self.validation_episodes)
        parts = self._validation_sample(len(rows), rank, world_size)
        return FixedBatches([self._gather(rows.find(part)[0]) for part in parts])

    def _pairs(self, episode_ids: Tensor) -> Ranges:
        """Rows whose next observation was recorded: without it nothing can be learnt of the action."""
        lengths = self.episodes.lengths - (~self.episodes.end_observed).long()
        rows = Ranges(self.episodes.starts[episode_ids], lengths[episode_ids])
        if len(rows) == 0:
            raise UserError(
                f"data.dataset: the episodes of {self.dataset!r} chosen for training or validation have no row with a "
                "recorded next observation, so no action can be learnt from them; record the next observations"
            )
        return rows

    # Stage 3: real and imagined transitions for the agent

    def train_dataloader(self) -> BatchLoader:
        """Mixed batches for the agent: `Transitions` with fields of shape (K, B, ...); (B, ...) for a plain module."""
        assert self.trainer is not None
        if self.trainer.max_steps < 0:
            raise UserError("trainer.max_steps is not set, so no updates would be made; set it")
        self.to(self.trainer.strategy.root_device)
        module: Any = self.trainer.lightning_module
        if hasattr(module, "train_loader"):
            return module.train_loader(self, self.trainer.max_steps, self.trainer.global_rank)
        if self.updates_per_step != 1:
            raise UserError(
                f"data.updates_per_step is {self.updates_per_step}, but a plain LightningModule trains on one batch "
                "per step; set --data.updates_per_step 1, or derive the agent from dawm.agents.OfflineAgent"
            )
        return self.mixed_loader(self.trainer.max_steps, self.trainer.global_rank, squeeze=True)

    def val_dataloader(self) -> Any:
        """TEMPORARY in this branch."""
        assert self.trainer is not None
        trainer = self.trainer
        module: Any = trainer.lightning_module
        loader = None
        if hasattr(module, "validation_loader"):
            loader = module.validation_loader(self, trainer.global_rank, trainer.world_size)
        return [] if loader is None else loader

    def mixed_loader(self, updates: int, rank: int = 0, squeeze: bool = False, seeds: int = 1) -> BatchLoader:
        """Batches of ``round(batch_size * synthetic_fraction)`` imagined rows, the rest real.

        Until the first refill all rows are real.

        Args:
            updates: Updates to draw for.
            rank: The process that draws; each draws different rows.
            squeeze: Leave out the first dimension of one batch.
            seeds: Agents trained side by side S, each with batches of its own: fields of shape (K, S, B, ...). The
                first agent's batches are those of a run with one.
        """
        streams = [self._mixed_streams(rank, seed) for seed in range(seeds)]
        synthetic_size = round(self.batch_size * self.synthetic_fraction)

        def draw(count: int) -> Transitions:
            # Each stream gives as many numbers per update whatever the mixture, so that resuming can skip them and
            # the real rows of a run do not depend on its imagined ones.
            size = max(self._synthetic_count, 1), count, max(synthetic_size, 1)
            real_rows = [real.draw(len(self._real_rows), count, self.batch_size) for real, _ in streams]
            synthetic_rows = [synthetic.draw(*size) for _, synthetic in streams]
            imagined = synthetic_size if self._synthetic_count else 0
            rows = self._take_real(_side_by_side(real_rows)[..., : self.batch_size - imagined])
            if imagined:
                rows = torch.cat([rows, take(self._synthetic_rows, _side_by_side(synthetic_rows))], dim=-2)
            rows = rows.squeeze(0) if squeeze else rows
            return Transitions.unpack(rows, self.observation_size, self.action_size)

        sizes = self.batch_size, max(synthetic_size, 1)
        counted = [(stream, size) for pair in streams for stream, size in zip(pair, sizes)]
        return BatchLoader(draw, counted, updates, self.updates_per_step)

    def _mixed_streams(self, rank: int, seed: int) -> tuple[RowStream, RowStream]:
        """The streams of real and of imagined rows of one of the agents trained side by side."""
        own = (seed,) if seed > 0 else ()
        return tuple(RowStream(derive_seed(self.seed, rank, kind, *own)) for kind in ("real", "synthetic"))  # type: ignore[return-value]

    def refill(self, transitions: Transitions) -> None:
        """Replaces the imagined rows in place; the next batch draws from them.

        Args:
            transitions: Imagined transitions, fields of shape (M, ...).
        """
        rows = transitions.pack().to(self._synthetic_rows.device)
        if len(self._synthetic_rows) < len(rows):
            self._synthetic_rows = torch.empty_like(rows)
        self._synthetic_rows[: len(rows)].copy_(rows)
        self._synthetic_count = len(rows)

    @property
    def synthetic(self) -> Transitions:
        """The imagined rows now in use (views), fields of shape (M, ...)."""
        rows = self._synthetic_rows[: self._synthetic_count]
        return Transitions.unpack(rows, self.observation_size, self.action_size)

    # Drawing

    def _take_real(self, rows: Tensor) -> Tensor:
        return take(self._real_rows, rows).to(self._synthetic_rows.device)

    def _gather(self, rows: Tensor) -> Transitions:
        return Transitions.unpack(self._take_real(rows), self.observation_size, self.action_size)

    def _validation_sample(self, size: int, rank: int, world_size: int) -> tuple[Tensor, ...]:
        """Batches of row numbers below `size`, drawn once; the ranks share them out."""
        rows = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))[:VALIDATION_ROWS]
        return rows[rank::world_size].split(VALIDATION_BATCH)


def _check(key: str, value: float, holds: bool, wanted: str) -> None:
    if not holds:
        raise UserError(f"data.{key} is {value}, but must be {wanted}; set --data.{key}")


def _side_by_side(rows: list[Tensor]) -> Tensor:
    """Row numbers of several seeds, shape (K, S, B); of one alone (K, B)."""
    return rows[0] if len(rows) == 1 else torch.stack(rows, dim=1)
