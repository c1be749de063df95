"""``fidelity.json`` for readers: tables on the screen and in the report, and pictures."""

import html
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dawm.cli.curves import picture, svg
from dawm.cli.html import figures, section, table

__all__ = ["draw_fidelity", "fidelity_section", "show_fidelity"]

CHOICES = {
    "real": "real", "real_unclipped": "real, state known", "before_filters": "unfiltered",
    "after_filters": "filtered",
}  # fmt: skip
STYLES = {"real": ("#777777", "-"), "before_filters": ("#ee6677", "--"), "after_filters": ("#4477aa", "-")}
UNIT = (
    "Steps 1 and later: squared error of s' over the variance of a real step's s' - s. Reward: over that of real "
    "rewards. Raw: squared error of s' as it is, over all steps. Ends: wrong terminations."
)


def show_fidelity(console: Console, fidelity: Mapping[str, Any]) -> None:
    """Prints the figures that one looks for first."""
    for (title, *names), rows in _tables(fidelity):
        first = Column(style="cyan", min_width=17)  # as wide in each table
        columns = [first, *(Column(name, justify="right", min_width=6) for name in names)]
        printed = Table(*columns, title=escape(title), title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for row in rows:
            printed.add_row(*row)
        console.print(printed)
    console.print(UNIT, style="dim", highlight=False)
    for note in _notes(fidelity):
        console.print(note, highlight=False, markup=False)


def fidelity_section(fidelity: Mapping[str, Any]) -> str:
    """The report's section, of HTML."""
    parts = [figures({caption: svg(draw) for caption, draw in _drawings(fidelity).items()})]
    parts.append(f'<p class="soft">{UNIT}</p>')
    parts += [table(rows, head) for head, rows in _tables(fidelity)]
    parts += [f'<p class="soft">{html.escape(note)}</p>' for note in _notes(fidelity)]
    return section("Fidelity of imagined data", *parts)


def draw_fidelity(path: Path, fidelity: Mapping[str, Any]) -> None:
    """Draws the errors by step and the distances by column into a PNG file."""
    picture(path, list(_drawings(fidelity).values()))


def _judges(fidelity: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What imagined steps are held against, in words, and the errors by choice of steps."""
    simulator = fidelity["simulator"]
    if "one_step" in simulator:
        name = simulator["environment"]
        yield f"one step of {name}, state set at each", simulator["one_step"]
        yield f"open loop in {name}, state set at the start", simulator["open_loop"]
    if fidelity["forward_model"] is not None:
        yield "forward models, trained on the training episodes", fidelity["forward_model"]
    yield "recorded future, imagined from held-out starts", {"before_filters": fidelity["held_out"]["real"]}


def _tables(fidelity: Mapping[str, Any]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Head, which begins with the title, and rows of each table: the errors by each judge, then figures of rows."""
    shown = _shown_steps(fidelity["horizon"])
    for title, choices in _judges(fidelity):
        rows = []
        for choice, label in CHOICES.items():
            if (found := choices.get(choice)) is not None:
                errors = [found["observation"][k - 1] for k in shown]
                figures = [*errors, found["mean_raw_observation"], found["mean_reward"]]
                rows.append([label, *map(_figure, figures), _percent(found["mean_termination"])])
        yield [title, *map(str, shown), "raw", "reward", "ends"], rows
    yield ["rows", "real", "unfiltered", "filtered"], _row_figures(fidelity)


def _row_figures(fidelity: Mapping[str, Any]) -> list[list[str]]:
    """Label, then the figures of real, unfiltered and filtered rows."""

    def row(label: str, group: Mapping[str, Any], key: str) -> list[str]:
        return [label, *(_figure(group[choice][key]) for choice in STYLES)]

    edge, targets = fidelity["edge"], fidelity["td_targets"]
    rows = [
        row("nearest training row, median distance", fidelity["novelty"], "median"),
        row("marginals, mean Wasserstein-1", fidelity["distributions"], "mean_marginal"),
        row("correlations, mean difference", fidelity["distributions"], "correlation"),
        row("return obtained per return asked, slope", fidelity["return_response"], "slope"),
        row("  correlation", fidelity["return_response"], "correlation"),
        ["inferred actions, squared error", _figure(fidelity["inverse_dynamics"]["squared_error"]), "", ""],
        ["rows at an edge", _percent(edge["real_fraction"]), "", _percent(edge["fraction"])],
    ]
    if fidelity["forward_model"] is not None:
        rows.insert(0, row("forward models, disagreement", fidelity["forward_model"], "disagreement"))
    if targets is not None:
        of = {name: _figure(found["mean"]) for name, found in targets.items()}
        rows.append(["TD target, mean", of["real"], "", of["after_filters"]])
        rows.append(["  last step of a rollout", "", "", of.get("last", "")])
        rows.append(["  steps before it", "", "", of.get("earlier", "")])
    return rows


def _notes(fidelity: Mapping[str, Any]) -> list[str]:
    """What the figures cannot show."""
    fates = ", ".join(f"{fate.replace('_', ' ')} {_percent(part)}" for fate, part in fidelity["fates"].items())
    notes = [f"imagined steps by fate: {fates}"]
    simulator = fidelity["simulator"]
    if fidelity["value_expansion"]:
        notes.append("the agent learnt from one row of each rollout (value expansion); all figures are of single steps")
    if fidelity["judges_itself"]:
        notes.append("the forward models made these steps, so they are no judge of them")
    if "left_out" in simulator:
        notes.append(f"no simulator: {simulator['left_out']}")
    else:
        notes.append(
            f"{simulator['environment']}: an observation leaves out {simulator['positions_left_out']} position(s) of "
            "the root, which change neither steps nor rewards"
        )
        if (limit := simulator["velocity_limit"]) is not None:
            clipped = {CHOICES[name]: _percent(part) for name, part in simulator["clipped"].items() if part is not None}
            listed = ", ".join(f"{name} {part}" for name, part in clipped.items())
            notes.append(f"velocities beyond {limit:g} are not in an observation; steps that start with one: {listed}")
    if fidelity["td_targets"] is None:
        notes.append("no TD targets: the agent has no target critics of the name `target_critics`")
    return notes


def _drawings(fidelity: Mapping[str, Any]) -> dict[str, Any]:
    """Drawings by description."""
    drawings: dict[str, Any] = {
        f"Against {heading}, over the steps of the horizon. Lower is better.": partial(
            _draw_errors, title=heading.partition(",")[0], choices=choices
        )
        for heading, choices in _judges(fidelity)
    }
    caption = "Wasserstein-1 distance of each column from the training rows, in standard deviations. Lower is better."
    drawings[caption] = partial(_draw_columns, fidelity=fidelity)
    return drawings


def _draw_errors(axis: Any, title: str, choices: Mapping[str, Any]) -> None:
    for choice, (color, style) in STYLES.items():
        if choice in choices:
            values, label = choices[choice]["observation"], CHOICES[choice]
            axis.plot(range(1, len(values) + 1), _drawn(values), style, marker=".", label=label, color=color)
    axis.set_yscale("log")
    axis.set(title=title, xlabel="step of the horizon")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize="small")


def _draw_columns(axis: Any, fidelity: Mapping[str, Any]) -> None:
    names = fidelity["columns"]
    for choice, (color, _) in STYLES.items():
        values = fidelity["distributions"][choice]["marginal"]
        axis.plot(range(len(names)), _drawn(values), ".", label=CHOICES[choice], color=color)
    shown = range(0, len(names), max(1, len(names) // 20))
    axis.set_xticks(list(shown), [names[place] for place in shown], rotation=90, fontsize="x-small")
    axis.set(title="marginals", ylim=(0, None))
    axis.legend(fontsize="small")


def _drawn(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None or value <= 0 else value for value in values]


def _shown_steps(horizon: int) -> list[int]:
    """1, 2, 4, 8, ... and the last."""
    return sorted({1 << k for k in range(horizon.bit_length()) if 1 << k <= horizon} | {horizon})


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    size = abs(value)
    return f"{value:.3g}" if size >= 0.01 or size == 0 else f"{value:.2g}" if size >= 1e-3 else f"{value:.0e}"


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.3g} %"
