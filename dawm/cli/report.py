"""The end of a run: score the agent, write ``results.json``, print the table, draw the curves."""

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from dawm import __version__
from dawm.data.episodes import Episodes
from dawm.data.sources.scores import ReferenceScores
from dawm.errors import UserError
from dawm.evaluation.episodes import Evaluation
from dawm.training.checkpoints import write_whole
from dawm.training.experiment import StageResult

__all__ = ["collect_results", "read_curve", "read_results", "show_evaluation", "show_results", "write_files"]


def collect_results(
    episodes: Episodes, agent_class: str, evaluation: Evaluation, stages: Mapping[str, StageResult], seed: int
) -> dict[str, Any]:
    """What ``results.json`` holds.

    Args:
        episodes: The real data.
        agent_class: Class path of the agent.
        evaluation: The agent's last evaluation.
        stages: Results of the stages that ran.
        seed: Seed of the run.
    """
    reference = episodes.reference
    data_return = float(episodes.episode_returns.mean())
    data: dict[str, Any] = {
        "dataset": episodes.name,
        "episodes": len(episodes.ends),
        "transitions": len(episodes),
        "return": data_return,
        "normalized_score": None,
    }
    if reference is not None:
        data["normalized_score"] = float(reference.normalize(data_return))
        data["reference"] = asdict(reference)
    agent = {
        "class": agent_class,
        "return": {"mean": evaluation.mean_return, "low": evaluation.low, "high": evaluation.high},
        "normalized_score": {"mean": evaluation.score, "low": evaluation.score_low, "high": evaluation.score_high},
        "returns": evaluation.returns.tolist(),
    }
    return {
        "dawm": __version__,
        "seed": seed,
        "data": data,
        "agent": agent,
        "stages": {name: asdict(result) for name, result in stages.items()},
    }


def show_results(console: Console, output_dir: Path, results: Mapping[str, Any]) -> None:
    """Prints the final table.

    Args:
        console: Where to print.
        output_dir: Folder of the run.
        results: What `collect_results` made.
    """
    data, agent, stages = results["data"], results["agent"], results["stages"]
    table = Table(title=f"{agent['class'].split('.')[-1]} on {data['dataset']}", show_header=False, title_style="bold")
    table.add_column(style="cyan")
    table.add_column()
    if data["normalized_score"] is not None:
        reference = data["reference"]
        score = agent["normalized_score"]
        table.add_row("data's mean score", f"{data['normalized_score']:.1f}  ({data['episodes']} episodes)")
        table.add_row(
            "agent's score",
            f"[bold]{score['mean']:.1f}[/]  (95 % interval {score['low']:.1f} to {score['high']:.1f}, "
            f"{_played(agent['returns'])})",
        )
        table.add_row(
            "scale",
            f"0 = {reference['minimum']:.1f}, 100 = {reference['maximum']:.1f} ({reference['source']})",
        )
    returns = agent["return"]
    table.add_row("data's mean return", f"{data['return']:.1f}")
    interval = f"95 % interval {returns['low']:.1f} to {returns['high']:.1f}"
    table.add_row("agent's return", f"{returns['mean']:.1f}  ({interval})")
    for label, key, stage in HELD_OUT:
        if stage in stages and key in stages[stage]["metrics"]:
            table.add_row(label, f"{stages[stage]['metrics'][key]:.4g}")
    for name, stage in stages.items():
        note = "reused" if stage["reused"] else f"{stage['seconds']:.1f} s for {stage['steps']} updates"
        table.add_row(f"stage {name.replace('_', ' ')}", note)
    table.add_row("files", f"{output_dir}/ (results.json, curves.png, config.yaml, checkpoints and logs by stage)")
    console.print(table)


HELD_OUT = (
    ("world model: first-step observation error", "world_model/validation_observation_error/step_1", "world_model"),
    ("  one-step regression's, same training", "world_model/regression_observation_error/step_1", "world_model"),
    ("world model: first-step reward error", "world_model/validation_reward_error/step_1", "world_model"),
    ("world model: first-step termination error", "world_model/validation_termination_error/step_1", "world_model"),
    ("inverse dynamics: squared action error", "inverse_dynamics/best_validation_error", "inverse_dynamics"),
)
"""Label, metric and stage of the held-out errors in the table."""


def show_evaluation(console: Console, evaluation: Evaluation, reference: ReferenceScores | None) -> None:
    """Prints one evaluation and the scale of its score.

    Args:
        console: Where to print.
        evaluation: The result.
        reference: What a score of 0 and of 100 stand for.
    """
    played = _played(evaluation.returns.tolist())
    console.print(
        f"return {evaluation.mean_return:.1f} (95 % interval {evaluation.low:.1f} to {evaluation.high:.1f}, {played})"
    )
    if reference is not None:
        console.print(
            f"score {evaluation.score:.1f} (95 % interval {evaluation.score_low:.1f} to {evaluation.score_high:.1f}); "
            f"0 = {reference.minimum:.1f}, 100 = {reference.maximum:.1f} ({reference.source})"
        )


def _played(returns: list) -> str:
    """How many episodes and seeds a figure stands on."""
    if not isinstance(returns[0], list):
        return f"{len(returns)} episodes, 1 seed"
    return f"{len(returns[0])} episodes each, {len(returns)} seeds"


def read_results(run: Path) -> dict[str, Any]:
    """The results of a finished run, with its checkpoints where they are now.

    Args:
        run: Folder of the run; it may have been moved since.
    """
    try:
        results = json.loads((run / "results.json").read_text())
        for stage in results["stages"].values():
            moved = run.joinpath(*Path(stage["checkpoint"]).parts[-3:])  # <stage>/<key>/last.ckpt
            stage["checkpoint"] = str(moved) if moved.exists() else stage["checkpoint"]
    except FileNotFoundError:
        raise UserError(f"run: {run} holds no results.json; name the output_dir of a finished `fit`") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"run: {run / 'results.json'} cannot be read ({error})") from None
    return results


def read_curve(stage_folder: Path, metric: str) -> tuple[list[int], list[float]]:
    """One metric over the updates of a stage, from its CSV logs (one per start of the run).

    Args:
        stage_folder: Folder of the stage.
        metric: Name of the metric.
    """
    curve: dict[int, float] = {}
    for path in sorted(stage_folder.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get(metric) and row.get("step"):  # a killed run may leave half a row
                    curve[int(float(row["step"]))] = float(row[metric])
    steps = sorted(curve)
    return steps, [curve[step] for step in steps]


def draw_curves(output_dir: Path, results: Mapping[str, Any]) -> None:
    """Draws the learning curves of all stages into ``curves.png``.

    Args:
        output_dir: Folder of the run.
        results: What `collect_results` made.
    """
    import matplotlib as mpl  # slow to import, and needed only here

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    score = "eval/return" if results["data"]["normalized_score"] is None else "eval/normalized_score"
    panels = [
        ("world_model", ["world_model/validation_observation_error/step_1",
                         "world_model/regression_observation_error/step_1"], True),
        ("inverse_dynamics", ["inverse_dynamics/validation_error"], True),
        ("agent", [score], False),
    ]  # fmt: skip
    panels = [panel for panel in panels if panel[0] in results["stages"]]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, (stage, metrics, logarithmic) in zip(axes[0], panels):
        folder = Path(results["stages"][stage]["checkpoint"]).parent
        for metric in metrics:
            steps, values = read_curve(folder, metric)
            axis.plot(steps, values, marker=".", label=metric.removeprefix(f"{stage}/"))
        if logarithmic:
            axis.set_yscale("log")
        if stage == "agent":
            low, high = (read_curve(folder, f"{score}_{end}") for end in ("low", "high"))
            if low[0] and low[0] == high[0]:
                axis.fill_between(low[0], low[1], high[1], alpha=0.2, label="95 % interval")
            level = results["data"]["normalized_score" if score == "eval/normalized_score" else "return"]
            axis.axhline(level, color="grey", linestyle="--", label="the data's mean")
        axis.set(title=stage.replace("_", " "), xlabel="updates")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    figure.savefig(output_dir / "curves.png", dpi=120)
    plt.close(figure)


def write_files(output_dir: Path, results: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Writes ``results.json``, ``config.yaml`` (which ``fit --config`` takes again) and ``curves.png``.

    Args:
        output_dir: Folder of the run.
        results: What `collect_results` made.
        settings: All settings as plain values.
    """
    write_whole(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    write_whole(output_dir / "config.yaml", yaml.safe_dump(dict(settings), sort_keys=False))
    draw_curves(output_dir, results)
