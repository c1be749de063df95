"""EvaluateInEnvironment: when to let the agent act in its environment."""

from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray

from dawm.errors import UserError
from dawm.evaluation.episodes import Evaluation, Policy, run_episodes, summarize

__all__ = ["EvaluateInEnvironment"]


class EvaluateInEnvironment(L.Callback):
    """Runs episodes with the agent's deterministic policy every so many updates, and logs what they earn.

    Logs ``eval/return``, and where the data set has reference scores ``eval/normalized_score`` with the bounds of its
    95 % confidence interval, ``eval/normalized_score_low`` and ``eval/normalized_score_high``. Every rank runs its
    share of the episodes; the result does not depend on their number. The training's random numbers stay untouched.
    Agents trained side by side (``seeds``) play all episodes each; logged is the mean over them.

    Example::

        callback = EvaluateInEnvironment(every_n_steps=1000, episodes=10)
        Trainer(max_steps=10_000, callbacks=[callback]).fit(agent, datamodule=data)
        callback.history  # one entry per evaluation: step, return and, with reference scores, score and its bounds

    Args:
        every_n_steps: Updates between two evaluations; a multiple of the data's ``updates_per_step``.
        episodes: Episodes of one evaluation, over all ranks.
        seed: Seed of the first episode; the others follow it, and every evaluation uses the same ones.
        num_envs: Environments side by side on a rank.
        env_id: Gymnasium id of the environment; None takes the data set's own.
    """

    def __init__(
        self,
        every_n_steps: int = 5000,
        episodes: int = 10,
        seed: int = 1000,
        num_envs: int = 10,
        env_id: str | None = None,
    ) -> None:
        for key, value in {"every_n_steps": every_n_steps, "episodes": episodes, "num_envs": num_envs}.items():
            if value < 1:
                raise UserError(f"EvaluateInEnvironment.{key} is {value}, but must be at least 1")
        self.every_n_steps = every_n_steps
        self.episodes = episodes
        self.seed = seed
        self.num_envs = num_envs
        self.env_id = env_id
        self.history: list[dict[str, float]] = []
        self._last_step: int | None = None  # None until a run starts: a run resumed without this state starts there

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks the settings, so that a mistake shows before the first update and not at the first evaluation."""
        updates_per_step = trainer.datamodule.updates_per_step  # type: ignore[attr-defined]
        if self.every_n_steps % updates_per_step:
            raise UserError(
                f"EvaluateInEnvironment.every_n_steps ({self.every_n_steps}) is no multiple of data.updates_per_step "
                f"({updates_per_step}); change one of the two"
            )
        if self.env_id is None and trainer.datamodule.env_spec is None:  # type: ignore[attr-defined]
            raise UserError("data.env_id: the data set names no environment to evaluate in; set --data.env_id")
        if self._last_step is None:
            self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Evaluates where the count of updates, which grows by several at once, has crossed a multiple."""
        if self.should_evaluate(trainer.global_step):
            self.log_evaluation(trainer, pl_module, self.evaluate(trainer, pl_module))
        self._last_step = trainer.global_step

    def should_evaluate(self, step: int) -> bool:
        """Whether an evaluation is due.

        Args:
            step: Updates done.
        """
        return step // self.every_n_steps > (self._last_step or 0) // self.every_n_steps

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Evaluation:
        """Runs the episodes, this rank its share of them.

        Args:
            trainer: The trainer, whose data module names the environment and the reference scores.
            pl_module: The agent.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        seeds = range(self.seed, self.seed + self.episodes)[trainer.global_rank :: trainer.world_size]
        training = pl_module.training
        pl_module.eval()
        try:
            with isolate_rng():
                returns = run_episodes(
                    cast(Policy, pl_module.act),
                    self.env_id or data.env_spec,
                    seeds,
                    self.num_envs,
                    pl_module.device,
                    agents=getattr(pl_module, "seeds", 1),
                    action_space=data.episodes.action_space,
                )
        finally:
            pl_module.train(training)
        reference = data.reference
        return summarize(self._gather(trainer, returns), reference.normalize if reference is not None else None)

    def _gather(self, trainer: L.Trainer, returns: NDArray[np.float64]) -> NDArray[np.float64]:
        """The returns of all ranks in the order of their seeds."""
        if trainer.world_size == 1:
            return returns
        shape = (*returns.shape[:-1], self.episodes)
        everyone = torch.zeros(shape, dtype=torch.float64, device=trainer.strategy.root_device)
        everyone[..., trainer.global_rank :: trainer.world_size] = torch.from_numpy(returns).to(everyone)
        # each episode is non-zero on one rank only, so the sum puts them together
        return trainer.strategy.reduce(everyone, reduce_op="sum").cpu().numpy()

    def log_evaluation(self, trainer: L.Trainer, pl_module: L.LightningModule, evaluation: Evaluation) -> None:
        """Adds an evaluation to the history, the loggers and the progress bar.

        Args:
            trainer: The trainer.
            pl_module: The agent.
            evaluation: The result.
        """
        step = trainer.global_step
        entry: dict[str, float] = {"step": step, "return": evaluation.mean_return}
        metrics = {"eval/return": evaluation.mean_return}
        if evaluation.score is not None and evaluation.score_low is not None and evaluation.score_high is not None:
            scores = {
                "score": evaluation.score,
                "score_low": evaluation.score_low,
                "score_high": evaluation.score_high,
            }
            entry |= scores
            metrics |= {f"eval/normalized_{name}": value for name, value in scores.items()}
        self.history.append(entry)
        # straight to the loggers: through `log` they would come at Lightning's own interval, or not at all
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        shown = "eval/normalized_score" if evaluation.score is not None else "eval/return"
        for name, value in metrics.items():
            pl_module.log(name, value, logger=False, prog_bar=name == shown)

    def state_dict(self) -> dict[str, Any]:
        """The history, and the update up to which evaluations are done."""
        return {"history": self.history, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the history back."""
        self.history = list(state_dict["history"])
        self._last_step = state_dict["last_step"]
