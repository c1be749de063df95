"""Load recorded episodes: the one place where files become tensors.

Symbols: N rows, E episodes, others as in `dawm.data.store.table`. A data set is named by

* a Minari id (``mujoco/hopper/medium-v0``): found under ``MINARI_DATASETS_PATH`` (else ``~/.minari/datasets``), or
  downloaded,
* an embedded id (``embedded/hopper/medium-replay``): built on first use, without a download,
* the path of an HDF5 file in D4RL's layout (``hopper_medium-v2.hdf5``),
* several of these joined with ``+`` (``mujoco/hopper/medium-v0+mujoco/hopper/expert-v0``).

All N steps stay in order. Actions are scaled from the data's own Box to [-1, 1]. Simulators with such Boxes clamp
the actions they are given, so a recorded action outside is clipped to what was executed, with a warning if it is more
than rounding. One further out than half the Box's width was recorded in other units and is an error.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import gymnasium as gym
import torch
from gymnasium.envs.registration import EnvSpec
from torch import Tensor

from dawm.data.batches import Ranges, derive_seed
from dawm.data.returns import returns_to_go
from dawm.data.sources.catalog import EMBEDDED, dataset_folder
from dawm.data.sources.d4rl import D4RLSource
from dawm.data.sources.embedded import build
from dawm.data.sources.minari import MinariSource
from dawm.data.sources.scores import ReferenceScores, is_d4rl_name
from dawm.data.sources.source import Recording, Source
from dawm.data.store.cache import MEMORY_LIMIT, load_table, mapped_returns_to_go
from dawm.data.store.table import Table
from dawm.data.transitions import Transitions
from dawm.errors import UserError
from dawm.files import expanded

__all__ = ["Episodes", "load_episodes", "read_recordings"]

STATISTICS_ROWS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Episodes(Table):
    """Recorded steps in order, and all that is known of them.

    ``action_space`` has the units that the actions were recorded in: +1 in ``rows`` is its upper bound. A Minari data
    set stores it, whatever environment ``env_id`` names; of an HDF5 file it is the environment's, or [-1, 1] where no
    environment is known.
    """

    name: str  # as the user named the data set
    observation_space: gym.spaces.Box  # flat
    action_space: gym.spaces.Box  # flat, the data's own
    env_spec: EnvSpec | None  # the environment to evaluate in, if known
    reference: ReferenceScores | None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes(self) -> tuple[int, int]:
        """Observation size and action size, (O, A)."""
        return self.observation_space.shape[0], self.action_space.shape[0]

    @property
    def transitions(self) -> Transitions:
        """Views of the rows' columns, fields of shape (N, ...)."""
        return Transitions.unpack(self.rows, *self.sizes)

    @property
    def starts(self) -> Tensor:
        """First row of each episode, shape (E,)."""
        return torch.cat([self.ends.new_zeros(1), self.ends[:-1]])

    @property
    def lengths(self) -> Tensor:
        """Steps of each episode, shape (E,)."""
        return self.ends - self.starts

    @property
    def truncated(self) -> Tensor:
        """Whether each episode ended without a termination, shape (E,), bool."""
        return ~self.terminated

    def returns_to_go(self, discount: float, window: int | None = None, end_values: Tensor | None = None) -> Tensor:
        """Return-to-go of every row, shape (N,), as `dawm.data.returns.returns_to_go`; mapped where the rows are."""
        if self.cache is not None:
            return mapped_returns_to_go(self.cache, self.ends, discount, window, end_values)
        return returns_to_go(self.transitions.rewards, self.ends, discount, window, end_values)

    def sample_rows(self, episode_ids: Tensor | None = None) -> Tensor:
        """Row numbers of some episodes (None: all) to take statistics from, ascending, shape (n,): always the same.

        They are all rows up to 2^20; of more, so many are drawn at random (some twice), which moves a mean by a
        thousandth of a standard deviation.
        """
        chosen = slice(None) if episode_ids is None else episode_ids
        ranges = Ranges(self.starts[chosen], self.lengths[chosen])
        numbers = torch.arange(min(len(ranges), STATISTICS_ROWS))
        if len(ranges) > STATISTICS_ROWS:
            generator = torch.Generator().manual_seed(0)
            numbers = torch.randint(len(ranges), (STATISTICS_ROWS,), generator=generator).sort()[0]
        return ranges.find(numbers)[0]

    def observed_rows(self, episode_ids: Tensor | None = None) -> Tensor:
        """Those of `sample_rows` whose ``s_{t+1}`` was recorded; all of them where none was."""
        rows = self.sample_rows(episode_ids)
        observed = rows[~torch.isin(rows, self.ends[~self.end_observed] - 1)]
        return observed if len(observed) else rows

    def subset(self, fraction: float, seed: int) -> "Episodes":
        """A random fraction of the episodes, at least one, copied into memory; the same seed draws the same.

        Of two fractions with one seed the smaller's episodes are among the larger's.
        """
        order = torch.randperm(len(self.ends), generator=torch.Generator().manual_seed(derive_seed(seed, "episodes")))
        chosen = order[: max(1, round(fraction * len(order)))].sort()[0]
        ranges = Ranges(self.starts[chosen], self.lengths[chosen])
        rows = self.rows[ranges.find(torch.arange(len(ranges)))[0]]
        low, high = rows.aminmax(dim=0)
        return replace(
            self, rows=rows, ends=self.lengths[chosen].cumsum(0), terminated=self.terminated[chosen],
            end_observed=self.end_observed[chosen], episode_returns=self.episode_returns[chosen],
            low=low, high=high, cache=None,
            fingerprint=f"{self.fingerprint}-{derive_seed(*chosen.tolist()):x}",
        )  # fmt: skip


def load_episodes(
    dataset: str, env_id: str | None = None, cache_dir: str | None = None, memory_limit: float = MEMORY_LIMIT
) -> Episodes:
    """Load a data set by name, of one of the forms above; ``env_id`` names another environment to evaluate in.

    Rows of more than ``memory_limit`` GiB are mapped from the cache in ``cache_dir`` (None: its default folder) instead
    of held in memory.
    """
    sources = [_open(part, env_id) for part in _split(dataset)]
    for source in sources:
        if not source.count:
            raise UserError(f"--data.dataset: got {source.name}, expected complete steps, but it is empty; record some")
    _check_agreement(sources)
    return Episodes(
        **vars(load_table(sources, cache_dir, memory_limit)),
        name=dataset,
        observation_space=sources[0].observation_space,
        action_space=sources[0].action_space,
        env_spec=next((source.env_spec for source in sources if source.env_spec is not None), None),
        reference=next((source.reference for source in sources if source.reference is not None), None),
    )


def read_recordings(dataset: str, env_id: str | None = None) -> list[Recording]:
    """Read a data set as it is, with whatever is wrong in its numbers: one recording for each of the joined parts."""
    return [_open(part, env_id).read() for part in _split(dataset)]


def _split(dataset: str) -> list[str]:
    """The names that are joined with ``+``; an existing file may have a ``+`` in its path."""
    if os.path.isfile(expanded(dataset)):  # Path.is_file raises where so many names are too long for one
        return [dataset]
    parts = [part.strip() for part in dataset.split("+")]
    if not all(parts):
        raise UserError(f"--data.dataset: got {dataset!r}, expected a name on both sides of every +; write them")
    return parts


def _open(name: str, env_id: str | None) -> Source:
    """One data set by name."""
    path = expanded(name)
    if path.is_file():
        return D4RLSource(path, name, env_id)
    if name.startswith((".", "/", "~", "$")) or path.suffix in (".hdf5", ".h5"):
        raise UserError(f"--data.dataset: got {name}, expected a file, but it does not exist; check the path")
    if is_d4rl_name(name) and not dataset_folder(name).exists():
        raise UserError(f"--data.dataset: got {name}, one of D4RL's names, expected a file; give its HDF5 file's path")
    dataset_id = build(name) if name.removesuffix("-v0") in EMBEDDED else name
    return MinariSource(dataset_id, name, env_id)


def _check_agreement(sources: Sequence[Source]) -> None:
    """Raise a UserError where joined data sets do not belong together."""
    first, *others = sources
    for other in others:
        joined = f"got {first.name}+{other.name}"
        if first.sizes != other.sizes or first.bounds != other.bounds:
            raise UserError(
                f"--data.dataset: {joined}, expected the same spaces, but they differ ({first.sizes[0]} observations, "
                f"actions {first.action_space}, against {other.sizes[0]}, {other.action_space}); join data sets of one "
                "environment"
            )
        if first.env_spec and other.env_spec and first.env_spec.id != other.env_spec.id:
            raise UserError(
                f"--data.env_id: {joined}, which come from {first.env_spec.id} and {other.env_spec.id}, expected one "
                "environment; name the one to evaluate in"
            )
    scored = [(part.name, part.reference) for part in sources if part.reference is not None]
    for (name, ours), (other_name, theirs) in zip(scored, scored[1:]):
        if not ours.agrees_with(theirs):
            raise UserError(
                f"--data.dataset: got {name}+{other_name}, which have different reference scores ({ours}; {theirs}), "
                "expected the same; join data sets of one scale"
            )
