"""RegenerateRollouts: fresh imagined transitions for the agent, every N updates."""

import lightning as L

from dawm.callbacks.every_n_updates import EveryNUpdates
from dawm.data.module import TransitionDataModule
from dawm.errors import UserError, require
from dawm.inverse_dynamics import InverseDynamics
from dawm.synthesis.guards import DataStatistics, Watch
from dawm.synthesis.rollouts import Synthesizer
from dawm.synthesis.targets import LiftedReturn, TargetReturn
from dawm.world_model import DiffusionWorldModel

__all__ = ["RegenerateRollouts"]


class RegenerateRollouts(EveryNUpdates):
    """Refills the synthetic part of the data in place, before training and then every N updates.

    Each rank imagines rollouts of its own, from random real starts; together the ranks hold ``world_size`` times
    ``rollouts`` of them. What is drawn depends on the seed, the rank and the update alone, so a resumed run imagines
    again exactly what the interrupted one trained on.

    Imagined steps that cannot be trusted are dropped (`dawm.synthesis.rollouts.Rollouts` names the reasons). Every
    refill logs how many steps met which fate, and what those kept are like: ``synthetic/rejected_fraction``,
    ``synthetic/mean_reward``, ``synthetic/reward_drift``, ``synthetic/termination_rate`` and
    ``synthetic/termination_drift``; under several ranks, those of the first. Beyond the limits below there is a
    warning, each once a run. If nothing is left, the run ends with an error.

    Example::

        callback = RegenerateRollouts(every_n_steps=1000, rollouts=5000)
        callback.connect(world_model, inverse_dynamics)
        Trainer(max_steps=10_000, callbacks=[callback]).fit(agent, datamodule=data)

    Args:
        every_n_steps: Updates between two refills; a multiple of the data's ``updates_per_step``.
        rollouts: Rollouts imagined per refill and rank; each gives up to ``horizon`` transitions.
        target_return: Which return-to-go the rollouts aim at; None aims at each start's own.
        guidance: Weight of classifier-free guidance; 1 is the plain conditional model and the cheapest.
        margin: Imagined observations and rewards may lie outside the data's range by this fraction of the range; more
            is dropped.
        max_disagreement: Drop steps whose inferred actions disagree by more (standard deviation over the ensemble,
            actions in [-1, 1]); None keeps all.
        max_rejected: Warn if more than this fraction of the imagined steps is dropped, in [0, 1]. Steps after an
            imagined termination do not count: there is nothing to imagine there.
        max_reward_drift: Warn if the mean imagined reward is further from the data's than so many standard deviations
            of the data's rewards. Some distance is wanted where ``target_return`` aims away from the data.
        max_termination_drift: Warn if the imagined terminations per step differ from the data's by more than this.
            0.02 is one more rollout of 8 steps in 7 that ends early.
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
        max_rejected: float = 0.5,
        max_reward_drift: float = 1.0,
        max_termination_drift: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps)
        drifts = {"max_reward_drift": max_reward_drift, "max_termination_drift": max_termination_drift}
        require(f"{self.key}.rollouts", rollouts, rollouts >= 1, "at least 1")
        require(f"{self.key}.max_rejected", max_rejected, 0 <= max_rejected <= 1, "from 0 to 1")
        for name, value in {"margin": margin, **drifts}.items():
            require(f"{self.key}.{name}", value, value >= 0, "at least 0")
        self.rollouts, self.seed = rollouts, seed
        self.target_return = LiftedReturn() if target_return is None else target_return
        self.guidance, self.margin, self.max_disagreement = guidance, margin, max_disagreement
        self.limits = {"max_rejected": max_rejected, **drifts}
        self._models: tuple[DiffusionWorldModel, InverseDynamics] | None = None

    def connect(self, world_model: DiffusionWorldModel, inverse_dynamics: InverseDynamics) -> None:
        """Names the trained models to imagine with."""
        self._models = world_model.eval(), inverse_dynamics.eval()

    def synthesizer(self, statistics: DataStatistics) -> Synthesizer:
        """What imagines: the connected models with these settings."""
        if self._models is None:
            raise UserError(
                f"--{self.key}: got no models, expected a world model and inverse dynamics; call `connect` first"
            )
        bounds = statistics.bounds(self.margin)
        return Synthesizer(*self._models, self.target_return, self.guidance, bounds, self.max_disagreement)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The first refill; in a resumed run, the refill that was in use when the checkpoint was written."""
        super().on_train_start(trainer, pl_module)
        data: TransitionDataModule = trainer.datamodule  # type: ignore[attr-defined]
        statistics = DataStatistics.of(data.episodes)
        self._watch = Watch(statistics, self.limits, self.key)
        self._synthesizer = self.synthesizer(statistics)
        for model in self._models or ():
            model.to(trainer.strategy.root_device)
        self.refill(trainer, self.last_step or 0)

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The refill that is due; none after the last update."""
        if trainer.global_step < trainer.max_steps:
            self.refill(trainer, trainer.global_step)

    def refill(self, trainer: L.Trainer, step: int) -> None:
        """Imagines for an update, hands the transitions to the data module, and logs what they are like."""
        data: TransitionDataModule = trainer.datamodule  # type: ignore[attr-defined]
        made = self._synthesizer.rollouts(data, self.rollouts, self.seed, trainer.global_rank, step)
        made.require_some(f"{self.key}.margin")
        transitions = made.transitions()
        data.refill(transitions)
        measured = {**made.counts, **self._watch.measure(transitions, made.counts)}
        metrics = {f"synthetic/{key}": float(value) for key, value in measured.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
