"""``python -m dawm evaluate``: what a run's agent earns in its environment."""

import json
from pathlib import Path
from typing import cast

import gymnasium as gym
import numpy as np
from rich.console import Console
from rich.table import Table

from dawm.cli.curves import draw_evaluations
from dawm.cli.report import read_results, show_evaluation
from dawm.data.sources.environments import environment_from
from dawm.data.sources.scores import ReferenceScores
from dawm.errors import UserError, require
from dawm.evaluation.episodes import Evaluation, Policy, evaluate
from dawm.files import expanded, write_whole
from dawm.training.build import restore_module
from dawm.training.checkpoints import ORIGIN, read_checkpoint

__all__ = ["EVALUATION_SEED", "evaluate_run"]

EVALUATION_SEED = 2_000_000  # of the last evaluation: apart from the seeds of evaluations during training


def evaluate_run(
    console: Console, run: str, episodes: int = 20, seed: int = EVALUATION_SEED, env_id: str | None = None,
    checkpoint: str | None = None, every: bool = False, max_episode_steps: int | None = None,
) -> None:  # fmt: skip
    """Score a run's trained agent in its environment.

    Args:
        console: Where to print.
        run: Folder of the run (``output_dir`` of ``fit``).
        episodes: Episodes to play.
        seed: Seed of the first episode.
        env_id: Gymnasium environment to play in; None takes the data set's own.
        checkpoint: Checkpoint of an agent to score; None takes the run's last.
        every: Score every checkpoint of the agent's stage, into ``evaluations.json`` and ``evaluations.png``.
        max_episode_steps: Time limit of an environment that has none.
    """
    for key, number in (("episodes", episodes), ("max_episode_steps", max_episode_steps)):
        require(key, number, number is None or number >= 1, "at least 1")
    folder, options = expanded(run), (episodes, seed, env_id, max_episode_steps)
    last = expanded(checkpoint) if checkpoint else Path(read_results(folder)["stages"]["agent"]["checkpoint"])
    if not every:
        _, result, reference = _score_checkpoint(last, *options)
        show_evaluation(console, result, reference)
        return
    table = Table("updates", "return", "score", "checkpoint", title="checkpoints of the agent", title_style="bold")
    curve = []
    scored_checkpoints = [(path, *_score_checkpoint(path, *options)) for path in sorted(last.parent.rglob("*.ckpt"))]
    for path, steps, result, reference in sorted(scored_checkpoints, key=lambda row: row[1]):
        curve.append({"checkpoint": str(path), "step": steps, "return": result.mean_return, "low": result.low,
                      "high": result.high, "score": result.score})  # fmt: skip
        earned = f"{result.mean_return:.1f} ({result.low:.1f} to {result.high:.1f})"
        scored = f"{result.score:.1f} ({result.score_low:.1f} to {result.score_high:.1f})" if reference else ""
        table.add_row(f"{steps:,}", earned, scored, path.name)
    write_whole(folder / "evaluations.json", json.dumps(curve, indent=2) + "\n")
    draw_evaluations(folder / "evaluations.png", curve)
    console.print(table)


def _score_checkpoint(
    path: Path, episodes: int, seed: int, env_id: str | None, max_episode_steps: int | None
) -> tuple[int, Evaluation, ReferenceScores | None]:
    """The updates a checkpoint was written after, what its agent earns, and the scores this is compared with."""
    checkpoint = read_checkpoint(path)
    agent, origin = restore_module(path, checkpoint), checkpoint[ORIGIN]
    if not hasattr(agent, "act"):
        raise UserError(f"--checkpoint: got {path} of a {type(agent).__name__}, expected an agent's; name another")
    environment = environment_from(origin["environment"], env_id)
    reference = None if origin["reference"] is None else ReferenceScores(**origin["reference"])
    limit = max_episode_steps or origin["max_episode_steps"]
    low, high = (np.array(bound, np.float32) for bound in origin["action_space"])
    evaluation = evaluate(cast(Policy, agent.act), environment, episodes, seed, reference=reference,
                          seeds=getattr(agent, "seeds", 1), action_space=gym.spaces.Box(low, high),
                          max_episode_steps=limit, env_id_key="env_id")  # fmt: skip
    return int(checkpoint["global_step"]), evaluation, reference
