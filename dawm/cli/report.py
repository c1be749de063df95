"""The end of a run: its results as ``results.json``, a table, and scores in the loggers."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dawm import __version__
from dawm.cli.curves import draw_curves
from dawm.cli.fidelity import fidelity_section
from dawm.cli.html import write_report
from dawm.data.episodes import Episodes
from dawm.data.sources.scores import ReferenceScores
from dawm.errors import UserError
from dawm.evaluation.episodes import Evaluation
from dawm.files import hash_of, write_whole
from dawm.training.experiment import StageResult

__all__ = [
    "checkpoint_hashes", "collect_results", "draw_report", "log_summary", "read_results", "show_evaluation",
    "show_results", "write_files",
]  # fmt: skip


def collect_results(
    episodes: Episodes, agent_class: str, evaluation: Evaluation, stages: Mapping[str, StageResult], seed: int
) -> dict[str, Any]:
    """What ``results.json`` holds: of the real data, the agent's last evaluation, and the stages that ran."""
    reference = episodes.reference
    data_return = float(episodes.episode_returns.mean())
    data: dict[str, Any] = {
        "dataset": episodes.name, "episodes": len(episodes.ends), "transitions": len(episodes), "return": data_return,
        "normalized_score": None if reference is None else float(reference.normalize(data_return)),
    }  # fmt: skip
    if reference is not None:
        data["reference"] = asdict(reference)
    agent = {
        "class": agent_class,
        "return": {"mean": evaluation.mean_return, "low": evaluation.low, "high": evaluation.high},
        "normalized_score": {"mean": evaluation.score, "low": evaluation.score_low, "high": evaluation.score_high},
        "returns": evaluation.returns.tolist(),
    }
    outcomes = {name: asdict(result) for name, result in stages.items()}
    return {"dawm": __version__, "seed": seed, "data": data, "agent": agent, "stages": outcomes}


def show_results(console: Console, output_dir: Path, results: Mapping[str, Any]) -> None:
    """Prints the final table and where the report is."""
    title = f"{results['agent']['class'].split('.')[-1]} on {results['data']['dataset']}"
    table = Table(Column(style="cyan"), Column(), title=escape(title), show_header=False, title_style="bold")
    for label, value in _rows(results):
        table.add_row(label, escape(value), style="bold" if label == "agent's score" else None)
    console.print(table)
    files = f"{output_dir}/report.html (beside it results.json, curves.png, config.yaml, checkpoints and logs by stage)"
    console.print(f"report: {files}", soft_wrap=True, markup=False, highlight=False)


def _rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The final table, label and value of each row."""
    data, agent, stages = results["data"], results["agent"], results["stages"]
    rows = []
    if data["normalized_score"] is not None:
        score, reference = _with_interval(agent["normalized_score"]).rstrip(")"), data["reference"]
        rows = [
            ("data's mean score", f"{data['normalized_score']:.1f}  ({data['episodes']} episodes)"),
            ("agent's score", f"{score}, {_played(agent['returns'])})"),
            ("scale", f"0 = {reference['minimum']:.1f}, 100 = {reference['maximum']:.1f} ({reference['source']})"),
        ]
    rows += [("data's mean return", f"{data['return']:.1f}"), ("agent's return", _with_interval(agent["return"]))]
    for label, key, stage in HELD_OUT:
        if stage in stages and key in stages[stage]["metrics"]:
            rows.append((label, f"{stages[stage]['metrics'][key]:.4g}"))
    for name, stage in stages.items():
        work = f"{stage['steps']} {stage.get('unit', 'updates')}"
        note = f"{work}, reused" if stage["reused"] else f"{stage['seconds']:.1f} s for {work}"
        rows.append((f"stage {name.replace('_', ' ')}", note))
    return rows


def _with_interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.1f}  (95 % interval {value['low']:.1f} to {value['high']:.1f})"


HELD_OUT = (
    ("world model: first-step observation error", "world_model/validation_observation_error/step_1", "world_model"),
    ("  forward models', same training", "world_model/forward_observation_error/step_1", "world_model"),
    ("world model: first-step reward error", "world_model/validation_reward_error/step_1", "world_model"),
    ("world model: first-step termination error", "world_model/validation_termination_error/step_1", "world_model"),
    ("inverse dynamics: squared action error", "inverse_dynamics/best_validation_error", "inverse_dynamics"),
)
"""Label, metric and stage of the held-out errors in the table."""


def show_evaluation(console: Console, evaluation: Evaluation, reference: ReferenceScores | None) -> None:
    """Prints one evaluation and the scale of its score."""
    e, played = evaluation, _played(evaluation.returns.tolist())
    console.print(f"return {e.mean_return:.1f} (95 % interval {e.low:.1f} to {e.high:.1f}, {played})", markup=False)
    if reference is not None:
        scale = f"0 = {reference.minimum:.1f}, 100 = {reference.maximum:.1f} ({reference.source})"
        score = f"score {e.score:.1f} (95 % interval {e.score_low:.1f} to {e.score_high:.1f}); {scale}"
        console.print(score, markup=False, soft_wrap=True)


def _played(returns: list) -> str:
    """How many episodes and seeds a figure is of."""
    if not isinstance(returns[0], list):
        return f"{len(returns)} episodes, 1 seed"
    return f"{len(returns[0])} episodes each, {len(returns)} seeds"


def read_results(run: Path) -> dict[str, Any]:
    """The results of a finished run, which may have been moved since, with its checkpoints where they are now."""
    try:
        results = json.loads((run / "results.json").read_text())
        for stage in results["stages"].values():
            moved = run.joinpath(*Path(stage["checkpoint"]).parts[-3:])  # <stage>/<key>/last.ckpt
            stage["checkpoint"] = str(moved) if moved.exists() else stage["checkpoint"]
    except FileNotFoundError:
        raise UserError(
            f"--run: got {run}, which holds no results.json, expected the output_dir of a finished `fit`; name one"
        ) from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"--run: got {run}, expected a readable results.json in it ({error}); run `fit` again"
        ) from None
    return results


def write_files(output_dir: Path, results: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Writes ``results.json``, ``config.yaml`` (which ``fit --config`` takes), ``curves.png`` and ``report.html``."""
    write_whole(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    write_whole(output_dir / "config.yaml", yaml.safe_dump(dict(settings), sort_keys=False))
    draw_curves(output_dir, results)
    draw_report(output_dir, results)


def draw_report(run: Path, results: Mapping[str, Any]) -> None:
    """Writes a finished run's ``report.html``, with the figures of ``fidelity.json`` if it is of these checkpoints."""
    config, measured = run / "config.yaml", run / "fidelity.json"  # by `diagnose`, perhaps of other stages
    command = results.get("command", f"python -m dawm fit --config {config}")
    found = json.loads(measured.read_text()) if measured.exists() else {}
    fidelity = fidelity_section(found) if found and found.get("checkpoints") == checkpoint_hashes(results) else ""
    write_report(run, results, yaml.safe_load(config.read_text()), command, _rows(results), fidelity)


def checkpoint_hashes(results: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the stages' checkpoints, by stage."""
    return {name: hash_of(Path(stage["checkpoint"])) for name, stage in results["stages"].items()}


def log_summary(loggers: Iterable[Logger], results: Mapping[str, Any]) -> None:
    """Writes the final scores to loggers, as ``final/return``, ``final/normalized_score`` and the bounds of both.

    W&B and MLflow show the last value of a metric as the run's summary.
    """
    ends = {"": "mean", "_low": "low", "_high": "high"}
    figures = {key: results["agent"][key] for key in ("return", "normalized_score")}
    named = {f"final/{key}{end}": figure[name] for key, figure in figures.items() for end, name in ends.items()}
    metrics = {name: value for name, value in named.items() if value is not None}
    for logger in loggers:
        logger.log_metrics(metrics, step=results["stages"]["agent"]["steps"])
        logger.save()
        logger.finalize("success")
