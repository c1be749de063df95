"""TransitionDataModule: real and synthetic transitions, mixed while batches are drawn.

All data are held as tensors on the training device and are drawn there, in the main process: a gather of packed rows is
far cheaper than worker processes, and a refill of the synthetic rows is visible in the next batch. Rows beyond
``memory_limit`` stay in a mapped file of the cache (`dawm.data.store.cache`), and are gathered from it on the CPU.

Symbols: N real rows, B batch size, K batches drawn at once, H horizon, O observation size, A action size.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from gymnasium.envs.registration import EnvSpec
from torch import Tensor

from dawm.data.batches import BatchLoader, FixedBatches, Ranges, RowStream, derive_seed
from dawm.data.bootstrap import bootstrapped_returns_to_go, can_bootstrap
from dawm.data.episodes import Episodes, load_episodes
from dawm.data.mixture import Mixture
from dawm.data.segments import SegmentTable
from dawm.data.sources.scores import ReferenceScores
from dawm.data.store.cache import MEMORY_LIMIT
from dawm.data.transitions import Segments, Transitions
from dawm.data.weights import RowWeights, checked
from dawm.errors import require

__all__ = ["TransitionDataModule"]

VALIDATION_ROWS = 8192  # enough to see an error to two digits
VALIDATION_BATCH = 1024

Gather = Callable[[Tensor], Any]  # batches by the numbers of what they are drawn from


class TransitionDataModule(L.LightningDataModule):
    """Loads a data set and draws batches for whatever is trained.

    A module may say what it trains on with ``train_loader(data, updates, rank)`` and
    ``validation_loader(data, rank, world_size)``, as the world model, the inverse dynamics and the agents do. Any other
    LightningModule gets batches of transitions, one per training step.

    Args:
        dataset: Minari id, embedded id, path of a D4RL-layout HDF5 file, or several of them joined with ``+``.
        env_id: Gymnasium environment to evaluate in; None takes the data set's own.
        horizon: Steps of a segment H, in environment steps.
        discount: Discount of the return-to-go.
        return_window: Rewards summed in the return-to-go; None sums to the episode's end.
        bootstrap_truncated: Add to the return-to-go what is expected after a truncated end; None does so where it can:
            with truncated episodes, a discount between 0 and 1, and no window.
        batch_size: Transitions per update and per rank (agent and inverse dynamics).
        segment_batch_size: Segments per update and per rank (world model).
        synthetic_fraction: Fraction of synthetic rows in an agent's batch, in [0, 1]. 0 trains on real data alone.
        real_weights: How often the agent draws each real row, and a rollout starts from it; None draws uniformly.
        termination_reward: Reward of rows that terminate, in place of their own, for the agent alone; None leaves it.
        episode_fraction: Fraction of the data set's episodes to use, for everything, in (0, 1]; ``seed`` draws them.
        updates_per_step: Batches drawn at once K. Saves Lightning's cost per step; results do not depend on it.
        validation_fraction: Fraction of the episodes held out from world model and inverse dynamics, in (0, 1).
        seed: Seed of the split and of all draws; ranks draw different rows from it.
        cache_dir: Folder for the cache of large data sets; None: ``$DAWM_CACHE``, else ``~/.cache/dawm``.
        memory_limit: GiB of real rows to hold in memory, and on the training device, per process; the rows of a larger
            data set are mapped from the cache. Results do not depend on it.
        max_episode_steps: Time limit of the evaluation environment; None leaves it the one it has.
    """

    def __init__(
        self,
        dataset: str = "embedded/hopper/medium-replay",
        env_id: str | None = None,
        horizon: int = 8,
        discount: float = 0.99,
        return_window: int | None = None,
        bootstrap_truncated: bool | None = None,
        batch_size: int = 256,
        segment_batch_size: int = 256,
        synthetic_fraction: float = 0.5,
        real_weights: RowWeights | None = None,
        termination_reward: float | None = None,
        episode_fraction: float = 1.0,
        updates_per_step: int = 20,
        validation_fraction: float = 0.1,
        seed: int = 0,
        cache_dir: str | None = None,
        memory_limit: float = MEMORY_LIMIT,
        max_episode_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.dataset, self.env_id = dataset, env_id
        self.horizon, self.discount, self.return_window = horizon, discount, return_window
        self.batch_size, self.segment_batch_size = batch_size, segment_batch_size
        self.bootstrap_truncated, self.termination_reward = bootstrap_truncated, termination_reward
        self.synthetic_fraction, self.real_weights, self.seed = synthetic_fraction, real_weights, seed
        self.episode_fraction, self.validation_fraction = episode_fraction, validation_fraction
        self.updates_per_step, self.max_episode_steps = updates_per_step, max_episode_steps
        self.cache_dir, self.memory_limit = cache_dir, memory_limit
        _check(self)
        self._episodes: Episodes | None = None
        # agents are scored in their environment: Lightning need not warn that there is no validation
        warnings.filterwarnings("ignore", ".*(have no `validation_step`|have no `val_dataloader`).*")

    def setup(self, stage: str | None = None) -> None:
        """Loads the data set once, and splits off the held-out episodes."""
        if self._episodes is not None:
            return
        episodes = _load(self)
        weights = None if self.real_weights is None else checked(self.real_weights(episodes), len(episodes))
        place = episodes.rows, episodes.sizes, episodes.cache is not None
        self._mixture = Mixture(*place, weights, self.termination_reward)
        goal = self.discount, self.return_window, self.bootstrap_truncated
        self.returns_to_go = bootstrapped_returns_to_go(episodes, *goal)
        self.validation_episodes, self.training_episodes = _split(self, len(episodes.ends))
        self._episodes = episodes  # last: an error leaves nothing half done

    @property
    def episodes(self) -> Episodes:
        """The real data set."""
        self.setup()
        assert self._episodes is not None
        return self._episodes

    @property
    def observation_size(self) -> int:
        """O."""
        return self.episodes.sizes[0]

    @property
    def action_size(self) -> int:
        """A."""
        return self.episodes.sizes[1]

    @property
    def env_spec(self) -> EnvSpec | None:
        """How to make the evaluation environment."""
        return self.episodes.env_spec

    @property
    def reference(self) -> ReferenceScores | None:
        """The returns that score 0 and 100."""
        return self.episodes.reference

    def to(self, device: torch.device | str) -> None:
        """Moves what batches are drawn from to the training device; loaders made after this draw there."""
        self.setup()
        self._mixture.to(device)

    # What Lightning asks for

    def train_dataloader(self) -> Iterable[Any]:
        """What the module that is trained asks for; for a plain module the mixture, fields of shape (B, ...)."""
        assert self.trainer is not None
        updates, rank = self.trainer.max_steps, self.trainer.global_rank
        require("trainer.max_steps", updates, updates >= 0, "a number of updates", "give it to the Trainer")
        self.to(self.trainer.strategy.root_device)
        if (ask := getattr(self.trainer.lightning_module, "train_loader", None)) is not None:
            return ask(self, updates, rank)
        expected = "1, as a plain LightningModule trains on one batch per step, and on max_steps of them"
        remedy = "set it to 1, or derive the agent from dawm.agents.OfflineAgent"
        at_once, summed = self.updates_per_step, self.trainer.accumulate_grad_batches
        require("data.updates_per_step", at_once, at_once == 1, expected, remedy)
        require("trainer.accumulate_grad_batches", summed, summed == 1, expected, remedy)
        loader = self.mixed_loader(updates, rank)
        return replace(loader, draw=lambda count: loader.draw(count)[0])

    def val_dataloader(self) -> Iterable[Any]:
        """What the module that is trained asks to be validated on; nothing where it does not ask."""
        assert self.trainer is not None
        self.to(self.trainer.strategy.root_device)
        ask = getattr(self.trainer.lightning_module, "validation_loader", None)
        loader = ask(self, self.trainer.global_rank, self.trainer.world_size) if ask is not None else None
        return [] if loader is None else loader

    # Segments for the world model

    def segment_loader(self, updates: int, rank: int = 0) -> BatchLoader:
        """Random segments of the training episodes: `Segments` with fields of shape (K, B, ...)."""
        return _drawn(self, self._segments(self.training_episodes), "segments", self.segment_batch_size, updates, rank)

    def random_segments(self, count: int, seed: int) -> Segments:
        """Random segments of the training episodes, fields of shape (B, ...)."""
        (total, gather), generator = self._segments(self.training_episodes), torch.Generator().manual_seed(seed)
        return gather(torch.randint(total, (count,), generator=generator))

    def validation_segment_loader(self, rank: int = 0, world_size: int = 1) -> FixedBatches:
        """A fixed sample of held-out segments, a part for each rank."""
        return _sampled(self, self._segments(self.validation_episodes), rank, world_size)

    def _segments(self, episode_ids: Tensor) -> tuple[int, Gather]:
        table = SegmentTable(self.episodes, episode_ids, self._mixture.real, self.returns_to_go, self.horizon)
        expected = f"segments that fit into the episodes of {self.dataset} chosen for training or validation"
        require("data.horizon", self.horizon, len(table) > 0, expected, "lower --horizon")
        return len(table), lambda numbers: table.gather(numbers).to(self._mixture.device)

    # Pairs of observations for the inverse dynamics

    def transition_loader(self, updates: int, rank: int = 0) -> BatchLoader:
        """Random real transitions of the training episodes: `Transitions` with fields of shape (K, B, ...)."""
        return _drawn(self, self._pairs(self.training_episodes), "transitions", self.batch_size, updates, rank)

    def validation_transition_loader(self, rank: int = 0, world_size: int = 1) -> FixedBatches:
        """A fixed sample of held-out transitions, a part for each rank."""
        return _sampled(self, self._pairs(self.validation_episodes), rank, world_size)

    def _pairs(self, episode_ids: Tensor) -> tuple[int, Gather]:
        """Rows whose next observation was recorded: without it nothing can be learnt of the action."""
        lengths = self.episodes.lengths - (~self.episodes.end_observed).long()
        rows = Ranges(self.episodes.starts[episode_ids], lengths[episode_ids])
        expected = "recorded next observations in the episodes chosen for training and for validation"
        require("data.dataset", self.dataset, len(rows) > 0, expected, "record them, or add episodes")
        return len(rows), lambda numbers: self._mixture.gather(rows.find(numbers)[0])

    # Real and synthetic transitions for the agent

    def mixed_loader(self, updates: int, rank: int = 0, seeds: int = 1) -> BatchLoader:
        """Batches of ``round(batch_size * synthetic_fraction)`` synthetic rows (after the first refill), the rest real.

        Fields have the shape (K, B, ...), and each rank draws different rows. Several ``seeds``, agents trained side by
        side, have each their own batches, fields of shape (K, S, B, ...); the first one's are those of a run with one.
        """
        self.setup()
        chunks = updates, self.updates_per_step
        return self._mixture.loader(self.batch_size, self.synthetic_fraction, *chunks, self.seed, rank, seeds)

    def refill(self, *blocks: Transitions) -> None:
        """Replaces the synthetic rows in place, fields of shape (M, ...); the next batch draws from them.

        Given one block for each of the agents trained side by side, each draws from its own.
        """
        self.setup()
        self._mixture.refill(*blocks)

    @property
    def synthetic(self) -> Transitions:
        """The synthetic rows now in use (views), fields of shape (M, ...)."""
        self.setup()
        return self._mixture.synthetic


def _drawn(
    data: TransitionDataModule, source: tuple[int, Gather], kind: str, size: int, updates: int, rank: int
) -> BatchLoader:
    """Batches of a size, for so many updates."""
    count, gather = source
    stream = RowStream(derive_seed(data.seed, rank, kind), high=count)
    draw = lambda batches: gather(stream.draw(count, batches, size))  # noqa: E731
    return BatchLoader(draw, [(stream, size)], updates, data.updates_per_step)


def _sampled(data: TransitionDataModule, source: tuple[int, Gather], rank: int, world_size: int) -> FixedBatches:
    """A sample that is drawn once and divided among the ranks."""
    numbers = torch.randperm(source[0], generator=torch.Generator().manual_seed(data.seed))[:VALIDATION_ROWS]
    return FixedBatches([source[1](part) for part in numbers[rank::world_size].split(VALIDATION_BATCH)])


def _load(data: TransitionDataModule) -> Episodes:
    """The episodes to use, checked to be long enough."""
    episodes = load_episodes(data.dataset, data.env_id, data.cache_dir, data.memory_limit)
    if data.episode_fraction < 1:
        size = data.episode_fraction * episodes.rows.nbytes / 2**30
        expected = f"at least {size:.2g}, the GiB of the fraction of {data.dataset} that is copied into memory"
        remedy = "raise it, or lower --data.episode_fraction"
        require("data.memory_limit", data.memory_limit, size <= data.memory_limit, expected, remedy)
        episodes = episodes.subset(data.episode_fraction, data.seed)
    longest = int(episodes.lengths.max())
    expected = f"at most {longest}, the steps of the longest episode of {data.dataset}"
    require("data.horizon", data.horizon, data.horizon <= longest, expected, "set --horizon")
    return episodes


def _split(data: TransitionDataModule, count: int) -> tuple[Tensor, Tensor]:
    """Numbers of the episodes to validate on, and of those to train on, each ascending."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(data.seed))
    held_out = min(max(1, round(data.validation_fraction * count)), count - 1)
    training = order[held_out:].sort()[0]
    # of a single episode nothing can be held out: validate on what is there
    return (order[:held_out].sort()[0] if held_out else training), training


def _check(data: TransitionDataModule) -> None:
    """Raises a UserError for a setting that is out of its range."""
    for key, holds, expected in (
        ("synthetic_fraction", 0 <= data.synthetic_fraction <= 1, "a number from 0 to 1"),
        ("episode_fraction", 0 < data.episode_fraction <= 1, "a number above 0 and at most 1"),
        ("validation_fraction", 0 < data.validation_fraction < 1, "a number between 0 and 1"),
        ("memory_limit", data.memory_limit >= 0, "a number of GiB, at least 0"),
        ("discount", 0 <= data.discount <= 1, "a number from 0 to 1"),
        ("termination_reward", math.isfinite(data.termination_reward or 0), "a finite number"),
    ):
        require(f"data.{key}", getattr(data, key), holds, expected)
    holds = data.bootstrap_truncated is not True or can_bootstrap(data.discount, data.return_window)
    require("data.bootstrap_truncated", True, holds, "a discount between 0 and 1, and no return_window", "leave it out")
    counts = "horizon", "batch_size", "segment_batch_size", "updates_per_step", "return_window", "max_episode_steps"
    for key in counts:
        value = getattr(data, key)
        require(f"data.{key}", value, value is None or value >= 1, "a whole number of at least 1")
