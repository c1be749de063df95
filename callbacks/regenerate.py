"""RegenerateRollouts: fresh imagined transitions for the agent, every N updates."""

from collections import Counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from dawm.data.batches import derive_seed
from dawm.data.episodes import Episodes
from dawm.data.module import TransitionDataModule
from dawm.errors import UserError, require
from dawm.inverse_dynamics import InverseDynamics
from dawm.synthesis.guards import RealRows
from dawm.synthesis.rollouts import LiftedReturn, Synthesized, TargetReturn, synthesize
from dawm.world_model import DiffusionWorldModel

__all__ = ["RegenerateRollouts"]


class RegenerateRollouts(L.Callback):
    """Refills the imagined part of the data in place, before training and then every N updates.

    Each rank imagines rollouts of its own, from random real starts; together the ranks hold ``world_size`` times
    ``rollouts`` of them. What is drawn depends on the seed, the rank and the update alone, so a resumed run imagines
    again exactly what the interrupted one trained on.

    Imagined rows that cannot be trusted are dropped (`dawm.synthesis.rollouts.Synthesized` names the reasons). Every
    refill logs how many rows met which fate, and what the rows kept are like: ``synthetic/rejected_share``,
    ``synthetic/mean_reward``, ``synthetic/reward_drift``, ``synthetic/termination_rate`` and
    ``synthetic/termination_drift``; under several ranks, those of the first. Beyond the limits below there is a
    warning, each once a run and not once a refill: the models stay as they are, so the next refill is no different. If
    nothing is left, the run ends with an error.

    Example::

        callback = RegenerateRollouts(every_n_steps=1000, rollouts=5000)
        callback.connect(world_model, inverse_dynamics)
        Trainer(max_steps=10_000, callbacks=[callback]).fit(agent, datamodule=data)

    Args:
        every_n_steps: Updates between two refills; a multiple of the data's ``updates_per_step``.
        rollouts: Rollouts imagined per refill and rank; each gives up to ``horizon`` transitions.
        target_return: Which return-to-go the rollouts aim at; None aims at each start's own.
        guidance: Weight of classifier-free guidance; 1 is the plain conditional model and the cheapest.
        margin: Imagined observations and rewards may lie outside the data's range by this share of the range; more is
            dropped.
        max_disagreement: Drop rows whose inferred actions disagree by more (standard deviation over the ensemble,
            actions in [-1, 1]); None keeps all.
        max_rejected: Warn if more than this share of the imagined rows is dropped, in [0, 1]. Rows behind an imagined
            termination do not count: there is nothing there to imagine.
        max_reward_drift: Warn if the mean imagined reward is further from the data's than so many standard deviations
            of the data's rewards. Some distance is wanted where ``target_return`` aims away from the data.
        max_termination_drift: Warn if the imagined terminations per row differ from the data's by more than this. 0.02
            is one more rollout of 8 steps in 7 that ends early.
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
        require("RegenerateRollouts.every_n_steps", every_n_steps, every_n_steps >= 1, "at least 1")
        require("RegenerateRollouts.rollouts", rollouts, rollouts >= 1, "at least 1")
        require("RegenerateRollouts.margin", margin, margin >= 0, "at least 0")
        require("RegenerateRollouts.max_rejected", max_rejected, 0 <= max_rejected <= 1, "from 0 to 1")
        require("RegenerateRollouts.max_reward_drift", max_reward_drift, max_reward_drift >= 0, "at least 0")
        require(
            "RegenerateRollouts.max_termination_drift", max_termination_drift, max_termination_drift >= 0, "at least 0"
        )
        self.every_n_steps = every_n_steps
        self.rollouts = rollouts
        self.target_return = LiftedReturn() if target_return is None else target_return
        self.guidance = guidance
        self.margin = margin
        self.max_disagreement = max_disagreement
        self.max_rejected = max_rejected
        self.max_reward_drift = max_reward_drift
        self.max_termination_drift = max_termination_drift
        self.seed = seed
        self._models: tuple[DiffusionWorldModel, InverseDynamics] | None = None
        self._last_refill = -1
        self._real: tuple[Episodes, RealRows] | None = None
        self._warned: set[str] = set()

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
        return synthesize(
            world_model,
            inverse_dynamics,
            real.observations[starts].to(device),
            real.actions[starts].to(device),
            targets.to(device),
            guidance=self.guidance,
            generator=torch.Generator(device).manual_seed(seed),
            bounds=self._real_rows(episodes).bounds(episodes, self.margin).to(device),
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
        data.refill(transitions)
        self._last_refill = step
        real = self._real_rows(data.episodes)
        measured = {
            "rejected_share": 1 - counts["kept"] / (counts.total() - counts["after_end"]),
            "mean_reward": transitions.rewards.mean().item(),
            "reward_drift": real.reward_drift(transitions.rewards),
            "termination_rate": transitions.terminations.mean().item(),
            "termination_drift": real.termination_drift(transitions.terminations),
        }
        self._warn(measured, counts, real)
        metrics = {f"synthetic/{key}": float(value) for key, value in {**counts, **measured}.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _warn(self, measured: dict[str, float], counts: Counter[str], real: RealRows) -> None:
        """Warns of each limit that is passed for the first time in this run.

        Args:
            measured: What the imagined rows are like.
            counts: Rows by fate.
            real: What the real rows are like.
        """
        share = measured["rejected_share"]
        reward, termination = abs(measured["reward_drift"]), abs(measured["termination_drift"])
        findings = {
            "max_rejected": (share, f"{share:.1%} of the imagined rows were dropped ({_listed(counts)})"),
            "max_reward_drift": (
                reward,
                f"the mean imagined reward {measured['mean_reward']:.4g} is {reward:.3g} standard deviations "
                f"of the data's rewards away from their mean {real.mean_reward:.4g}",
            ),
            "max_termination_drift": (
                termination,
                f"{measured['termination_rate']:.3g} of the imagined rows end in a termination, and "
                f"{real.termination_rate:.3g} of the data's",
            ),
        }
        for setting, (value, finding) in findings.items():
            limit = getattr(self, setting)
            if value > limit and setting not in self._warned:
                self._warned.add(setting)
                rank_zero_warn(
                    f"RegenerateRollouts: {finding}, which is beyond {setting} {limit:g}; train the world model longer "
                    f"with --stages.world_model.max_steps, or raise {setting} if this is wanted"
                )

    def _real_rows(self, episodes: Episodes) -> RealRows:
        """What the real rows are like; they are looked through once.

        Args:
            episodes: The real data.
        """
        if self._real is None or self._real[0] is not episodes:
            self._real = episodes, RealRows.of(episodes)
        return self._real[1]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Checks that refills fall on the ends of training steps; forgets an earlier run."""
        self._last_refill = -1  # Lightning restores a checkpoint's value after this
        self._warned.clear()
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
