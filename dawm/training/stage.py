"""The three stages: what a config gives each of them, what its result depends on, and what only it knows.

Batches and normalizers are the module's own affair, so ``L.Trainer(...).fit(module, datamodule=data)`` in a script does
what a stage does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.callbacks import StochasticWeightAveraging as SWA

from dawm.data.module import TransitionDataModule
from dawm.errors import UserError, require

__all__ = ["AgentStage", "InverseDynamicsStage", "Stage", "Stages", "WorldModelStage"]

INTERVALS = ("log_every_n_steps", "validate_every_n_steps", "checkpoint_every_n_steps", "keep_every_n_steps")

NO_MATTER: dict[str, frozenset[str]] = {
    # the fingerprint of the data is part of the key in place of their name
    "data": frozenset({"dataset", "cache_dir", "memory_limit", "updates_per_step"}),
    # how often something is written, and where weights come from: their file's hash is part of the key
    "stage": frozenset({*INTERVALS, "ckpt_path", "init_from"} - {"validate_every_n_steps"}),
    "trainer": frozenset({"profiler", "detect_anomaly"}),
    # the groups, what is part of the key by module, data and seed, and what comes after training
    "run": frozenset({"data", "stages", "trainer", "world_model", "inverse_dynamics", "agent", "seed_everything",
                      "horizon", "discount", "seeds", "output_dir", "stages_dir", "final_episodes", "wait", "quiet",
                      "logger"}),
}  # fmt: skip
"""Settings that cannot change the result of any stage. Everything else is part of a stage's key."""

CANNOT_WORK = (SWA, GradientAccumulationScheduler, LearningRateFinder, BatchSizeFinder)
"""Callbacks that take over Lightning's own optimisation, which the three modules do without."""


@dataclass
class Stage:
    """What differs between the stages; everything is counted in updates.

    Args:
        max_steps: Gradient updates of the stage's main network; of a plain LightningModule its training steps.
        log_every_n_steps: Updates between two rows in the logs.
        validate_every_n_steps: Updates between two validations on held-out data (world model, inverse dynamics).
        patience: Validations without improvement before the stage stops early; None never stops early.
        checkpoint_every_n_steps: Updates between two checkpoints.
        keep_every_n_steps: Updates between two checkpoints that are kept, for `evaluate --every`; None keeps the last.
        ckpt_path: Use this checkpoint instead of training the stage.
        init_from: Start training from the weights in this checkpoint.
        callbacks: Lightning callbacks of this stage.
    """

    max_steps: int = 10_000
    log_every_n_steps: int = 100
    validate_every_n_steps: int = 1000
    patience: int | None = None
    checkpoint_every_n_steps: int = 2000
    keep_every_n_steps: int | None = None
    ckpt_path: str | None = None
    init_from: str | None = None
    callbacks: list[L.Callback] = field(default_factory=list)

    name: ClassVar[str]
    imagines: ClassVar[bool] = True
    """Whether the stage serves imagination alone, and is left out where nothing is imagined."""
    no_matter: ClassVar[frozenset[str]]
    """Settings of the data module that cannot change this stage's result."""
    after: ClassVar[tuple[str, ...]] = ()
    """Stages whose results this one's depends on."""

    def __post_init__(self) -> None:
        """Checks the settings."""
        for key in ("max_steps", "patience", *INTERVALS):
            value = getattr(self, key)
            holds = key in ("patience", "keep_every_n_steps") if value is None else 1 <= value < 2**63
            require(f"stages.{self.name}.{key}", value, holds, "a whole number of at least 1")
        for callback in self.callbacks:
            if isinstance(callback, CANNOT_WORK):
                found, expected = type(callback).__name__, "callbacks that leave the modules' own optimisers alone"
                raise UserError(f"--stages.{self.name}.callbacks: got {found}, expected {expected}; remove it")

    def check(self, module: L.LightningModule, updates_per_step: int) -> None:
        """Raises a UserError where the module cannot be validated as the settings say."""
        key, every, chunk = f"stages.{self.name}", self.validate_every_n_steps, updates_per_step
        fits = not self.imagines or every >= self.max_steps or every % chunk == 0
        expected = f"a multiple of data.updates_per_step, which is {chunk}"
        require(f"{key}.validate_every_n_steps", every, fits, expected, "change one of the two")
        if not hasattr(module, "validation_loader"):
            reason = f"as {type(module).__name__} has no validation"
            require(f"{key}.patience", self.patience, self.patience is None, f"None, {reason}", "leave it out")
            for callback in self.callbacks:
                holds = not isinstance(callback, L.pytorch.callbacks.EarlyStopping)
                expected = f"none that stops early, {reason}"
                require(f"{key}.callbacks", type(callback).__name__, holds, expected, "leave it out")

    def hashed(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that this stage's result depends on."""
        groups = {"data": settings["data"], "stage": settings["stages"][self.name], "trainer": settings["trainer"],
                  "run": settings}  # fmt: skip
        leave = {**NO_MATTER, "data": NO_MATTER["data"] | self.no_matter}
        chosen = {g: {k: v for k, v in values.items() if k not in leave[g]} for g, values in groups.items()}
        return {"name": self.name, "module": settings[self.name], **chosen}

    def connect(self, trained: Mapping[str, L.LightningModule]) -> None:
        """Hands the modules trained before to whatever in this stage uses them."""


@dataclass
class WorldModelStage(Stage):
    """Stage 1, on segments of the real data."""

    name = "world_model"
    no_matter = frozenset({"env_id", "max_episode_steps", "batch_size", "synthetic_fraction", "real_weights",
                           "termination_reward"})  # fmt: skip


@dataclass
class InverseDynamicsStage(Stage):
    """Stage 2, on real transitions."""

    name = "inverse_dynamics"
    no_matter = frozenset({"env_id", "max_episode_steps", "horizon", "discount", "return_window", "segment_batch_size",
                           "synthetic_fraction", "real_weights", "termination_reward",
                           "bootstrap_truncated"})  # fmt: skip


@dataclass
class AgentStage(Stage):
    """Stage 3, on the mixture of real and imagined transitions."""

    name = "agent"
    imagines = False
    no_matter = frozenset({"horizon", "segment_batch_size", "validation_fraction"})  # they act through the other stages
    after = ("world_model", "inverse_dynamics")

    def connect(self, trained: Mapping[str, L.LightningModule]) -> None:
        """Connects the callbacks that imagine, or leaves them out where no model was trained."""
        if not trained:
            self.callbacks = [callback for callback in self.callbacks if not hasattr(callback, "connect")]
        for callback in self.callbacks:
            if hasattr(callback, "connect"):
                callback.connect(*(trained[name] for name in self.after))


@dataclass
class Stages:
    """The three stages.

    Args:
        world_model: Stage 1.
        inverse_dynamics: Stage 2.
        agent: Stage 3.
    """

    world_model: WorldModelStage = field(default_factory=WorldModelStage)
    inverse_dynamics: InverseDynamicsStage = field(default_factory=InverseDynamicsStage)
    agent: AgentStage = field(default_factory=AgentStage)

    def needed(self, data: TransitionDataModule) -> list[Stage]:
        """The stages in order; the agent's alone where nothing is imagined."""
        stages = (self.world_model, self.inverse_dynamics, self.agent)
        return [stage for stage in stages if data.synthetic_fraction > 0 or not stage.imagines]
