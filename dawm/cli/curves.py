"""Curves of a run, read from the CSV logs of its stages and drawn with matplotlib."""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw_curves", "imagined_figures", "learning_figures", "picture", "read_logs", "svg"]

Curve = tuple[list[int], list[float]]  # updates, and the metric's value at each
Draw = Callable[[Any], None]  # onto an axis of matplotlib

FATES = ("kept", "after_end", "out_of_range", "uncertain", "inconsistent", "unfamiliar", "non_finite")  # of a step
# of all fates but the first, which the colour-blind can tell apart (Paul Tol's bright scheme)
COLORS = ("#bbbbbb", "#ee6677", "#ccbb44", "#66ccee", "#4477aa", "#aa3377")
DRIFTS = (
    ("rejected_fraction", "max_rejected", "Fraction of the steps up to the imagined end that were rejected."),
    ("mean_reward", "", "Mean reward of the imagined steps that were kept."),
    ("reward_drift", "max_reward_drift", "Mean reward minus the data's, in standard deviations of the data's."),
    ("termination_rate", "", "Terminations per step."),
    ("termination_drift", "max_termination_drift", "Imagined terminations per step minus the data's."),
)
"""What a refill logs: metric, the callback's limit of it, description."""
REQUIRED = {"kept", *(name for name, _, _ in DRIFTS)}
HELD_OUT = {
    "world_model": ("validation_observation_error/step_1", "forward_observation_error/step_1"),
    "inverse_dynamics": ("validation_error",),
}
CAPTIONS = {
    "world_model": "Error of the first imagined observation on held-out data. Lower is better.",
    "inverse_dynamics": "Squared error of the inferred actions on held-out data. Lower is better.",
    "agent": "What the agent earns in its environment. Higher is better.",
}
POINTS = 500  # of a curve in the report; longer ones are averaged


def read_logs(stage_folder: Path) -> dict[str, Curve]:
    """All metrics over the updates of a stage, from its CSV logs (one per start of the run)."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for path in sorted(stage_folder.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                with suppress(KeyError, TypeError, ValueError):  # a killed run may leave half a row
                    step = int(float(row.pop("step")))
                    for metric in filter(row.get, row):
                        curves[metric][step] = float(row[metric])
    return {metric: (sorted(curve), [curve[s] for s in sorted(curve)]) for metric, curve in sorted(curves.items())}


def stage_logs(results: Mapping[str, Any]) -> dict[str, dict[str, Curve]]:
    """The logs of the stages that ran."""
    return {name: read_logs(Path(stage["checkpoint"]).parent) for name, stage in results["stages"].items()}


def draw_curves(output_dir: Path, results: Mapping[str, Any]) -> None:
    """Draws what the held-out data and the environment say of each stage into ``curves.png``."""
    picture(output_dir / "curves.png", _main_panels(results, stage_logs(results)))


def draw_evaluations(path: Path, evaluations: Sequence[Mapping[str, Any]]) -> None:
    """Draws what the checkpoints of a run earn: ``step``, ``return``, and the bounds ``low`` and ``high`` of each."""
    steps, *values = ([entry[key] for entry in evaluations] for key in ("step", "return", "low", "high"))
    curves = {name: (steps, each) for name, each in zip(("return", "return_low", "return_high"), values)}
    picture(path, [partial(_score, metric="return", curves=curves)])


def learning_figures(results: Mapping[str, Any]) -> dict[str, str]:
    """The learning curves of all stages, as SVG by description: those of ``curves.png``, then the training losses."""
    logs = stage_logs(results)
    panels = _main_panels(results, logs)[::-1]  # the agent first
    figures = {CAPTIONS[stage]: svg(draw) for stage, draw in zip(reversed(results["stages"]), panels)}
    for curves in reversed(logs.values()):
        for metric in curves:
            if "loss" in metric:
                figures[f"Training: {metric}."] = svg(
                    partial(_lines, title=metric, lines={"": _thinned(curves[metric])})
                )
    return figures


def imagined_figures(curves: Mapping[str, Curve], limits: Mapping[str, float]) -> dict[str, str]:
    """What imagined data were like over the agent's updates, as SVG by description; empty where nothing was imagined.

    The limits are those of the callback that refills the data: ``max_rejected`` and the like.
    """
    logged = {name.removeprefix("synthetic/"): curve for name, curve in curves.items() if name.startswith("synthetic/")}
    if not logged.keys() >= REQUIRED:
        return {}
    last = max(curve[0][-1] for curve in curves.values())
    fates = _fates(logged, last)
    kept = f"{100 * fates.pop('kept')[1][-1]:.1f} %"
    figures: dict[str, Draw] = {
        f"Imagined steps dropped at each refill, by reason. Kept at the last one: {kept}.": partial(_stack, lines=fates)
    }
    drift = dict(zip(*logged["termination_drift"]))
    steps, rate = logged["termination_rate"]
    data_rate = steps, [value - drift.get(step, math.nan) for step, value in zip(steps, rate)]
    for name, limit, caption in DRIFTS:
        lines = {"imagined": _held(logged[name], last)}
        if name == "termination_rate":
            lines["the data"] = _held(data_rate, last)
        beyond = [limits[limit], -limits[limit]] if limit in limits else []
        beyond = beyond[:1] if name == "rejected_fraction" else beyond
        figures[caption] = partial(_lines, title=name.replace("_", " "), lines=lines, limits=beyond)
    return {caption: svg(draw) for caption, draw in figures.items()}


def _main_panels(results: Mapping[str, Any], logs: Mapping[str, Mapping[str, Curve]]) -> list[Draw]:
    """One drawing for each stage that ran, in order."""
    key = "return" if results["data"]["normalized_score"] is None else "normalized_score"
    panels: list[Draw] = []
    for stage, curves in logs.items():
        if stage in HELD_OUT:
            lines = {m: curves[f"{stage}/{m}"] for m in HELD_OUT[stage] if f"{stage}/{m}" in curves}
            panels.append(partial(_lines, title=stage.replace("_", " "), lines=lines, logarithmic=True))
        else:
            panels.append(partial(_score, metric=f"eval/{key}", curves=curves, level=results["data"][key]))
    return panels


def _lines(
    axis: Any, title: str, lines: Mapping[str, Curve], logarithmic: bool = False, limits: Sequence[float] = ()
) -> None:
    """Draws some metrics."""
    for label, (steps, values) in lines.items():
        axis.plot(steps, values, marker=".", label=label)
    for number, limit in enumerate(limits):
        axis.axhline(limit, color="#ee6677", linestyle="--", label="warning beyond" if number == 0 else None)
    if logarithmic:
        axis.set_yscale("log")
    _finish(axis, title)


def _score(axis: Any, metric: str, curves: Mapping[str, Curve], level: float | None = None) -> None:
    """Draws the agent's evaluations."""
    axis.plot(*curves.get(metric, ([], [])), marker=".", label=metric)
    (low_steps, low), (high_steps, high) = (curves.get(f"{metric}_{end}", ([], [])) for end in ("low", "high"))
    if low_steps and low_steps == high_steps:
        axis.fill_between(low_steps, low, high, alpha=0.2, label="95 % interval")
    if level is not None:
        axis.axhline(level, color="grey", linestyle="--", label="the data's mean")
    _finish(axis, "agent")


def _stack(axis: Any, lines: Mapping[str, Curve]) -> None:
    """Draws the fractions dropped, on top of each other."""
    steps = next(iter(lines.values()))[0]
    axis.stackplot(steps, [values for _, values in lines.values()], labels=list(lines), colors=COLORS)
    axis.margins(x=0)
    axis.set_ylim(bottom=0)
    _finish(axis, "steps dropped")


def _fates(logged: Mapping[str, Curve], last: int) -> dict[str, Curve]:
    """The fraction of all imagined steps that met each fate."""
    steps = logged["kept"][0]
    counts = {fate: dict(zip(*logged[fate])) for fate in FATES if fate in logged}
    totals = {step: sum(count.get(step, 0.0) for count in counts.values()) for step in steps}
    return {
        fate.replace("_", " "): _held((steps, [count.get(step, 0.0) / totals[step] for step in steps]), last)
        for fate, count in counts.items()
    }


def _held(curve: Curve, last: int) -> Curve:
    """A curve whose every value holds until the next one, and its last until the end of training."""
    steps, values = curve
    corners = [s for step in steps[1:] for s in (step, step)]
    return [steps[0], *corners, max(last, steps[-1] + 1)], [value for value in values for _ in range(2)]


def _finish(axis: Any, title: str) -> None:
    axis.set(title=title, xlabel="updates")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small")


def _thinned(curve: Curve) -> Curve:
    """The means of neighbouring points where there are too many to draw."""
    block = -(-len(curve[0]) // POINTS)
    starts = range(0, len(curve[0]), block)
    return [curve[0][s] for s in starts], [float(np.mean(curve[1][s : s + block])) for s in starts]


def picture(path: Path, panels: Sequence[Draw]) -> None:
    """Draws some panels side by side into a PNG file."""
    from matplotlib.figure import Figure  # slow to import, and needed only here and below

    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axis, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw(axis)
    figure.savefig(path, dpi=120)


def svg(draw: Draw) -> str:
    """A drawing as the text of an SVG image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4))  # fixed margins: a layout engine would double the time
    draw(figure.subplots(gridspec_kw={"left": 0.15, "right": 0.95, "bottom": 0.14, "top": 0.92}))
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
