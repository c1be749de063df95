"""RegenerateRollouts: fresh imagined transitions for the agent, every N updates."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import lightning as L
from torch import Tensor

from dawm.callbacks.every_n_updates import EveryNUpdates
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Transitions
from dawm.data.weights import RowWeights
from dawm.diffusion.codecs import JointDifferences, JointSegments
from dawm.errors import UserError, require
from dawm.inverse_dynamics import InverseDynamics
from dawm.synthesis.ensemble import EnsembleSynthesizer
from dawm.synthesis.guards import DataStatistics, Watch, forward_quantiles
from dawm.synthesis.rollouts import Imagination, Labels, Synthesizer
from dawm.synthesis.starts import FirstAction, Starts, policy_of
from dawm.synthesis.targets import LiftedReturn, TargetReturn
from dawm.world_model import DiffusionWorldModel

__all__ = ["RegenerateRollouts", "check_synthesis"]


class RegenerateRollouts(EveryNUpdates):
    """Refills the synthetic part of the data in place, before training and then every N updates.

    Each rank imagines rollouts of its own, from random real starts; together the ranks hold ``world_size`` times
    ``rollouts`` of them. What is drawn depends on the seed, the rank and the update alone, so a resumed run imagines
    again exactly what the interrupted one trained on. A policy that is asked has learnt on since: the checkpoint keeps
    the agent's weights as they were at the refill.

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
        rollouts: Rollouts imagined per refill and rank, for each agent that has its own; each gives up to ``horizon``
            transitions.
        starts: How often rollouts start from each real row; None as often as the agent draws it (`real_weights`).
        imagination: ``diffusion``: the world model draws futures and the inverse dynamics infers their actions.
            ``ensemble``: the policy acts at every step, with ``first_action: policy`` and its noise, and the forward
            models answer (`dawm.synthesis.ensemble`): nothing to guide, label or infer, and settings that would are
            refused; ``target_return`` plays no part.
        first_action: Of each rollout: the ``recorded`` one, or that of the ``policy`` as it is at the refill. Agents
            trained side by side share the rollouts with the first, and have each their own with the second.
        first_action_noise: Standard deviation of Gaussian noise on the policy's actions, which are in [-1, 1].
        target_return: Which return-to-go the rollouts aim at; None aims at each start's own.
        guidance: Weight of classifier-free guidance; 1 is the plain conditional model and the cheapest.
        labels: Whose next observation, reward and termination a step gets: the world model's (``imagined``), or the
            ``forward`` models', given the imagined observation and the action.
        value_expansion: Make one row of each rollout, from its start to its last step kept, with the discounted sum of
            the rewards between (DWM, arXiv 2402.03570), instead of one of each step.
        discount: Of the rewards in that sum; the agent's.
        margin: Imagined observations and rewards may lie outside the data's range by this fraction of the range; more
            is dropped.
        max_disagreement: Drop steps whose inferred actions disagree by more (standard deviation over the ensemble,
            actions in [-1, 1]); None keeps all.
        max_inconsistency: Drop steps that lie further from the forward models' prediction than this quantile, in
            (0, 1], of held-out real transitions; None keeps all.
        max_forward_disagreement: Drop steps on which the forward models disagree more than on this quantile, in (0, 1],
            of held-out real transitions; None keeps all.
        pessimism: Lower the reward of each step by so many standard deviations of the data's rewards per unit by which
            the forward models disagree more than on half of the held-out real transitions, so that a policy that leaves
            the data meets what the models do not know (after MOPO, arXiv 2005.13239, which lowers by the whole of it).
            The deviation is within episodes: that between behaviours of different quality says nothing of a step.
        noising: Noise recorded segments by this part of the sampler's steps, in (0, 1], and denoise them under the
            target return; None begins with noise alone. Segments are drawn alike, whatever the data's `real_weights`.
        max_rejected: Warn if more than this fraction of the imagined steps is dropped, in [0, 1]. Steps after an
            imagined termination do not count: there is nothing to imagine there.
        max_reward_drift: Warn if the mean imagined reward is further from the data's than so many standard deviations
            of the data's rewards. Some distance is wanted where ``target_return`` aims away from the data.
        max_termination_drift: Warn if the imagined terminations per step differ from the data's by more than this.
            0.02 is one more rollout of 8 steps in 7 that ends early.
        seed: Seed of starts and noise.
    """

    kept = (*EveryNUpdates.kept, "asked")

    def __init__(
        self,
        every_n_steps: int = 5000,
        rollouts: int = 10_000,
        starts: RowWeights | None = None,
        imagination: Imagination = "diffusion",
        first_action: FirstAction = "recorded",
        first_action_noise: float = 0.1,
        target_return: TargetReturn | None = None,
        guidance: float = 1.0,
        labels: Labels = "imagined",
        value_expansion: bool = False,
        discount: float = 0.99,
        margin: float = 0.1,
        max_disagreement: float | None = None,
        max_inconsistency: float | None = None,
        max_forward_disagreement: float | None = None,
        pessimism: float = 0.0,
        noising: float | None = None,
        max_rejected: float = 0.5,
        max_reward_drift: float = 1.0,
        max_termination_drift: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps)
        drifts = {"max_reward_drift": max_reward_drift, "max_termination_drift": max_termination_drift}
        require(f"{self.key}.rollouts", rollouts, rollouts >= 1, "at least 1")
        require(f"{self.key}.max_rejected", max_rejected, 0 <= max_rejected <= 1, "from 0 to 1")
        for name, value in drifts.items():
            require(f"{self.key}.{name}", value, value >= 0, "at least 0")
        self.rollouts, self.seed, self.labels, self.noising = rollouts, seed, labels, noising
        self.imagination, self.pessimism = imagination, pessimism
        self.starts, self.first_action, self.first_action_noise = starts, first_action, first_action_noise
        self.target_return = LiftedReturn() if target_return is None else target_return
        self.value_expansion, self.discount = value_expansion, discount
        self.guidance, self.margin, self.max_disagreement = guidance, margin, max_disagreement
        self.max_inconsistency, self.max_forward_disagreement = max_inconsistency, max_forward_disagreement
        self.limits = {"max_rejected": max_rejected, **drifts}
        self._models: tuple[DiffusionWorldModel, InverseDynamics] | None = None
        self.asked: tuple[int, dict[str, Tensor]] | None = None  # update, and the agent's weights when it was asked
        check_synthesis(self, f"{self.key}.")

    def connect(self, world_model: DiffusionWorldModel, inverse_dynamics: InverseDynamics) -> None:
        """Names the models to imagine with."""
        asked = {"imagination": self.imagination == "ensemble", "labels": self.labels == "forward",
                 "max_inconsistency": self.max_inconsistency is not None,
                 "max_forward_disagreement": self.max_forward_disagreement is not None,
                 "pessimism": self.pessimism > 0}  # fmt: skip
        for name in (name for name, holds in asked.items() if holds):
            expected = f"at least 1, as {self.key}.{name} asks the forward models"
            has = getattr(world_model, "forward_model", None) is not None
            require("world_model.forward_members", 0, has, expected, "set it, and train the world model with it")
        _check_codec(self, getattr(world_model, "codec", None))
        self._models = world_model.eval(), inverse_dynamics.eval()

    def synthesizer(self, data: TransitionDataModule, statistics: DataStatistics) -> Synthesizer:
        """What imagines: the connected models with these settings; the first actions are the recorded ones."""
        if self._models is None:
            raise UserError(
                f"--{self.key}: got no models, expected a world model and inverse dynamics; call `connect` first"
            )
        starts = Starts.of(data, self.target_return, self.starts, f"{self.key}.starts")
        starts = replace(starts, noise=self.first_action_noise)
        half = 0.5 if self.pessimism else None
        inconsistency, disagreement, usual = forward_quantiles(
            self._models[0], data, self.max_inconsistency, self.max_forward_disagreement, half
        )
        kind = EnsembleSynthesizer if self.imagination == "ensemble" else Synthesizer
        return kind(
            *self._models, starts, self.guidance, self.labels, statistics.bounds(self.margin), self.max_disagreement,
            inconsistency, disagreement, self.pessimism * statistics.deviation_within, usual or 0.0, self.noising,
        )  # fmt: skip

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The first refill; in a resumed run, the refill that was in use when the checkpoint was written."""
        super().on_train_start(trainer, pl_module)
        data: TransitionDataModule = trainer.datamodule  # type: ignore[attr-defined]
        statistics = DataStatistics.of(data.episodes)
        self._watch = Watch(statistics, self.limits, self.key)
        for model in self._models or ():
            model.to(trainer.strategy.root_device)
        self._synthesizer = self.synthesizer(data, statistics)
        with self.timed():
            self.refill(trainer, self.last_step or 0)

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The refill that is due; none after the last update."""
        if trainer.global_step < trainer.max_steps:
            self.refill(trainer, trainer.global_step)

    def refill(self, trainer: L.Trainer, step: int) -> None:
        """Imagines for an update, hands the transitions to the data module, and logs what they are like."""
        data: TransitionDataModule = trainer.datamodule  # type: ignore[attr-defined]
        blocks, steps, counts = [], [], Counter[str]()
        for number, synthesizer in enumerate(self._synthesizers(trainer, step)):
            made = synthesizer.rollouts(data, self.rollouts, self.seed, trainer.global_rank, step, number)
            made.require_some(f"{self.key}.margin")
            steps.append(made.transitions())
            blocks.append(made.expansions(self.discount) if self.value_expansion else steps[-1])
            counts.update(made.counts)
        data.refill(*blocks)
        measured = {**counts, **self._watch.measure(Transitions.cat(steps), counts)}
        metrics = {f"synthetic/{key}": float(value) for key, value in measured.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _synthesizers(self, trainer: L.Trainer, step: int) -> Iterator[Synthesizer]:
        """One for all agents, or one for each that is asked for its actions, as it was at that update."""
        if self.first_action == "recorded":
            yield self._synthesizer
            return
        starts, agent = self._synthesizer.starts, trainer.lightning_module
        learnt = {name: weights.clone() for name, weights in agent.state_dict().items()}
        last, weights = self.asked or (None, {})
        if last == step:  # resumed: the policy has learnt on since
            agent.load_state_dict(weights)
        else:
            self.asked = step, learnt
        for seed in range(getattr(agent, "seeds", 1)):
            yield replace(self._synthesizer, starts=replace(starts, policy=policy_of(agent, seed)))
        agent.load_state_dict(learnt)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forgets an earlier training."""
        super().setup(trainer, pl_module, stage)
        if self.value_expansion:
            data: TransitionDataModule = trainer.datamodule  # type: ignore[attr-defined]
            sums = {"agent.reward_shift": getattr(pl_module, "reward_shift", 0.0) or None,
                    "data.termination_reward": data.termination_reward}  # fmt: skip
            for name, value in sums.items():
                require(name, value, value is None, "none, as rows sum several rewards", "leave it out")
        if stage == "fit":
            self.asked = None


def check_synthesis(callback: RegenerateRollouts, prefix: str = "") -> None:
    """Raises a UserError where the settings that say how to imagine do not fit; ``prefix`` is for its message."""
    for name in ("margin", "first_action_noise", "pessimism"):
        require(prefix + name, getattr(callback, name), getattr(callback, name) >= 0, "at least 0")
    for name in ("max_inconsistency", "max_forward_disagreement", "noising"):
        value = getattr(callback, name)
        require(prefix + name, value, value is None or 0 < value <= 1, "above 0 and at most 1")
    plain: dict[str, Any] = {}  # settings that are without effect, and what leaves them out
    if callback.imagination == "ensemble":
        acts = callback.first_action == "policy"
        require(f"{prefix}first_action", callback.first_action, acts, "policy, whose actions the ensemble answers")
        plain = {"labels": "imagined", "guidance": 1, "max_disagreement": None, "max_inconsistency": None}
        plain["noising"] = None
    elif callback.noising is not None:  # recorded segments have starts and actions of their own
        plain = {"starts": None, "first_action": "recorded"}
    because = "imagination is ensemble" if callback.imagination == "ensemble" else "recorded segments are noised"
    for name, value in plain.items():
        given, expected = getattr(callback, name), f"{value}, as {because} and it would do nothing"
        require(prefix + name, given, given == value, expected, "leave it out")


def _check_codec(callback: RegenerateRollouts, codec: Any) -> None:
    """Refuses settings that do nothing where the world model imagines the actions."""
    diffuses, key = callback.imagination == "diffusion", callback.key
    holds = callback.first_action == "recorded" or not (diffuses and isinstance(codec, JointSegments))
    expected = "recorded, as JointSegments imagines starts and actions, too"
    require(f"{key}.first_action", callback.first_action, holds, expected, "change one of the two")
    holds = callback.max_disagreement is None or not isinstance(codec, JointDifferences)
    expected = "None, as the world model's codec imagines actions and none is inferred"
    require(f"{key}.max_disagreement", callback.max_disagreement, holds, expected, "leave it out")
