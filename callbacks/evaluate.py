"""EvaluateInEnvironment: when to let the agent act in its environment."""

from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from dawm.callbacks.every_n_updates import EveryNUpdates
from dawm.errors import require
from dawm.evaluation.environments import ENV_ID
from dawm.evaluation.episodes import Evaluation, Policy, run_episodes, summarize
from dawm.nn.modes import evaluating

__all__ = ["EvaluateInEnvironment"]


class EvaluateInEnvironment(EveryNUpdates):
    """Runs episodes with the agent's deterministic policy every N updates, and logs what they earn.

    Logs ``eval/return``, and where the data set has reference scores ``eval/normalized_score`` with the bounds of its
    95 % confidence interval, ``eval/normalized_score_low`` and ``eval/normalized_score_high``. The episodes are divided
    among the ranks; the result does not depend on their number. The training's random numbers stay untouched. Agents
    trained side by side (``seeds``) play all episodes each; logged is the mean over them.

    Example::

        callback = EvaluateInEnvironment(every_n_steps=1000, episodes=10)
        Trainer(max_steps=10_000, callbacks=[callback]).fit(agent, datamodule=data)
        callback.history  # of each evaluation: step, return, returns by seed, and with reference scores the score

    Args:
        every_n_steps: Updates between two evaluations; a multiple of the data's ``updates_per_step``.
        episodes: Episodes of one evaluation, over all ranks.
        seed: Seed of the first episode; the others follow it, and every evaluation uses the same ones.
        num_envs: Environments side by side on a rank.
        env_id: Gymnasium id of the environment; None takes the data set's own.
    """

    kept = (*EveryNUpdates.kept, "history")

    def __init__(
        self,
        every_n_steps: int = 5000,
        episodes: int = 10,
        seed: int = 1000,
        num_envs: int = 10,
        env_id: str | None = None,
    ) -> None:
        super().__init__(every_n_steps)
        require(f"{self.key}.episodes", episodes, episodes >= 1, "at least 1")
        require(f"{self.key}.num_envs", num_envs, num_envs >= 1, "at least 1")
        self.episodes, self.seed, self.num_envs, self.env_id = episodes, seed, num_envs, env_id
        self.history: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forgets an earlier training."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.history = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks the settings, so that a mistake shows before the first update and not at the first evaluation."""
        super().on_train_start(trainer, pl_module)
        environment = self.env_id or trainer.datamodule.env_spec  # type: ignore[attr-defined]
        expected = "an environment to evaluate in, as the data set names none"
        require(ENV_ID, environment, environment is not None, expected, "name one")

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds an evaluation to the history, the loggers and the progress bar."""
        evaluation = self.evaluate(trainer, pl_module)
        found = {name: getattr(evaluation, name) for name in ("score", "score_low", "score_high")}
        scores = {name: value for name, value in found.items() if value is not None}
        step, mean = trainer.global_step, evaluation.mean_return
        by_seed = evaluation.returns.reshape(-1, self.episodes).mean(axis=1).tolist()
        self.history.append({"step": step, "return": mean, "returns": by_seed, **scores})
        metrics = {"eval/return": mean} | {f"eval/normalized_{name}": value for name, value in scores.items()}
        # straight to the loggers: through `log` they would come at Lightning's own interval, or not at all
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        shown = "eval/normalized_score" if scores else "eval/return"
        for name, value in metrics.items():
            pl_module.log(name, value, logger=False, prog_bar=name == shown)

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Evaluation:
        """Runs the episodes, this rank its part; the data module names the environment and the reference scores."""
        data, seeds = trainer.datamodule, getattr(pl_module, "seeds", 1)  # type: ignore[attr-defined]
        part = torch.arange(self.episodes).tensor_split(trainer.world_size)[trainer.global_rank]
        returns = torch.zeros((seeds, self.episodes) if seeds > 1 else self.episodes, dtype=torch.float64)
        with evaluating(pl_module), isolate_rng():
            played = run_episodes(
                cast(Policy, pl_module.act),
                self.env_id or data.env_spec,
                [self.seed + int(episode) for episode in part],
                self.num_envs,
                pl_module.device,
                agents=seeds,
                action_space=data.episodes.action_space,
                max_episode_steps=data.max_episode_steps,
                env_id_key=f"{self.key}.env_id" if self.env_id else ENV_ID,
            )
            returns[..., part] = torch.from_numpy(played)
        if trainer.world_size > 1:  # each episode is non-zero on one rank only, so the sum puts them together
            returns = trainer.strategy.reduce(returns.to(trainer.strategy.root_device), reduce_op="sum").cpu()
        return summarize(returns.numpy(), data.reference)
