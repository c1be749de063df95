"""RegenerateRollouts: fresh imagined transitions for the agent, every N updates."""

from collections import Counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from dawm.data.batches import derive_seed
from dawm.data.module import TransitionDataModule
from dawm.errors import UserError
from dawm.inverse_dynamics import InverseDynamics
from dawm.synthesis import LiftedReturn, Synthesized, TargetReturn, observation_bounds, synthesize
from dawm.world_model import DiffusionWorldModel

__all__ = ["RegenerateRollouts"]


class RegenerateRollouts(L.Callback):
    """Refills the imagined part of the data in place, before training and then every N updates.

    Each rank imagines rollouts of its own, from random real starts; together the ranks hold ``world_size`` times
    ``rollouts`` of them. What is drawn depends on the seed, the rank and the update alone, so a resumed run imagines
    again exactly what the interrupted one trained on.

    Example::

        callback = RegenerateRollouts(every_n_steps=1000, rollouts=5000)
        callback.connect(world_model, inverse_dynamics)
        Trainer(max_steps=10_000, callbacks=[callback]).fit(agent, datamodule=data)

    Args:
        every_n_steps: Updates between two refills; a multiple of the data's ``updates_per_step``.
        rollouts: Rollouts imagined per refill and rank; each gives up to ``horizon`` transitions.
        target_return: Which return-to-go the rollouts aim at; None aims at each start's own.
        guidance: Weight of classifier-free guidance; 1 is the plain conditional model and the cheapest.
        margin: Imagined observations may lie outside the data's range by this share of the range; more is dropped.
        max_disagreement: Drop rows whose inferred actions disagree by more (standard deviation over the ensemble,
            actions in [-1, 1]); None keeps all.
        seed: Seed of starts and noise.
    """

    def __init__(
        self,
        every_n_steps: int = 5000,
        rollouts: int = 10_000,
        target_return: TargetReturn | None = None,
        guidance: float = 1.0,
        margin: float = 0.1,
        max_disagreement: float | None = None,
        seed: int = 0,
    ) -> None:
        for key, value in {"every_n_steps": every_n_steps, "rollouts": rollouts}.items():
            if value < 1:
                raise UserError(f"RegenerateRollouts: {key} is {value}, but must be at least 1; set {key}")
        self.every_n_steps = every_n_steps
        self.rollouts = rollouts
        self.target_return = LiftedReturn() if target_return is None else target_return
        self.guidance = guidance
        self.margin = margin
        self.max_disagreement = max_disagreement
        self.seed = seed
        self._models: tuple[DiffusionWorldModel, InverseDynamics] | None = None
        self._last_refill = -1

    def connect(self, world_model: DiffusionWorldModel, inverse_dynamics: InverseDynamics) -> None:
        """Names the trained models to imagine with.

        Args:
            world_model: Trained world model.
            inverse_dynamics: Trained inverse dynamics.
        """
        self._models = world_model.eval(), inverse_dynamics.eval()

    def synthesize(self, data: TransitionDataModule, rank: int, step: int) -> Synthesized:
        """One set of rollouts.

        Args:
            data: The real data to start from.
            rank: Process that imagines.
            step: Update that the rollouts are for.
        """
        if self._models is None:
            raise UserError("RegenerateRollouts has no models; call connect(world_model, inverse_dynamics) first")
        world_model, inverse_dynamics = self._models
        episodes, seed = data.episodes, derive_seed(self.seed, rank, step, "rollouts")
        real = episodes.transitions
        device = world_model.device
        starts = torch.randint(len(real), (self.rollouts,), generator=torch.Generator().manual_seed(seed))
        targets = self.target_return(data.returns_to_go[starts], data.returns_to_go[episodes.sample_rows()])
        low, high = observation_bounds(episodes.observation_low, episodes.observation_high, self.margin)
        return synthesize(
            world_model,
            inverse_dynamics,
            real.observations[starts].to(device),
            real.actions[starts].to(device),
            targets.to(device),
            guidance=self.guidance,
            generator=torch.Generator(device).manual_seed(seed),
            bounds=(low.to(device), high.to(device)),
            max_disagreement=self.max_disagreement,
        )

    def refill(self, trainer: L.Trainer, step: int) -> None:
        """Imagines anew and hands the rows to the data module.

        Args:
            trainer: The agent's trainer.
            step: Update that the rollouts are for.
        """
        data: TransitionDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if self._models is not None:
            for model in self._models:
                model.to(trainer.strategy.root_device)
        transitions, counts = self.synthesize(data, trainer.global_rank, step)
        if len(transitions) == 0:
            raise UserError(
                f"all {sum(counts.values())} imagined rows were dropped ({_listed(counts)}); train the world model "
                "longer with --stages.world_model.max_steps, or raise RegenerateRollouts' margin"
            )
        if counts["kept"] < 0.5 * (sum(counts.values()) - counts["after_end"]):
            rank_zero_warn(f"more than half of the imagined rows were dropped: {_listed(counts)}")
        data.refill(transitions)
        self._last_refill = step
        metrics = {f"synthetic/{fate}": float(count) for fate, count in counts.items()}
        metrics["synthetic/mean_reward"] = float(transitions.rewards.mean())
        metrics["synthetic/termination_rate"] = float(transitions.terminations.mean())
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Checks that refills fall on the ends of training steps; forgets an earlier run."""
        self._last_refill = -1  # Lightning restores a checkpoint's value after this
        data: TransitionDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if self.every_n_steps % data.updates_per_step:
            raise UserError(
                f"RegenerateRollouts: every_n_steps {self.every_n_steps} is not a multiple of data.updates_per_step "
                f"{data.updates_per_step}; change one of them"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The first refill; in a resumed run, the refill that was in use when the checkpoint was written."""
        self.refill(trainer, max(self._last_refill, 0))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refills when the count of updates has passed a multiple of ``every_n_steps``."""
        step = trainer.global_step
        if step // self.every_n_steps > self._last_refill // self.every_n_steps and step < trainer.max_steps:
            self.refill(trainer, step)

    def state_dict(self) -> dict[str, int]:
        """The update of the refill in use."""
        return {"last_refill": self._last_refill}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Remembers which refill was in use."""
        self._last_refill = state_dict["last_refill"]


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{fate} {count}" for fate, count in counts.items() if count)
