"""A comparison of methods as a table in the terminal, ``table.md``, ``table.csv`` and ``page.html``."""

import csv
import html
import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dawm.cli.curves import svg
from dawm.cli.html import figures, page, section, table
from dawm.evaluation.statistics import (
    Difference,
    Interval,
    area_under_curve,
    difference,
    holm,
    interquartile_mean,
    mean_interval,
    probability_of_improvement,
    stratified_bootstrap,
)
from dawm.files import write_whole

__all__ = ["Comparison", "show_comparison", "write_comparison"]

HEAD = ("data set", "method", "score", "seeds", "minus {}", "p", "area under curve")
SUMMARY = ("method", "inter-quartile mean over data sets", "probability of improvement over {}")
TIMES = ("method", "data set", "training, s", "of it in callbacks", "by part, s")
EXPLANATION = """Scores are those of the last checkpoint, over the final episodes of every seed. Brackets hold 95 %
intervals: of means Student's over the seeds, of differences Welch's, over data sets stratified bootstrap. p is that of
the difference, adjusted by Holm's method for all comparisons of the table. The area under the curve, the mean score
while training, says how fast a method learns. Seeds of one group share their data split and models."""


class Comparison:
    """Results of the cells that are there, by method and data set; the first method is the reference."""

    def __init__(
        self, results: Sequence[Mapping[str, Any]], methods: Sequence[str], datasets: Sequence[str], note: str = ""
    ) -> None:
        self.results, self.note = results, note
        there = {result["method"] for result in results}
        self.methods = [method for method in methods if method in there]
        self.datasets = [name for name in datasets if any(result["dataset"] == name for result in results)]

    def of(self, method: str, dataset: str) -> list[Mapping[str, Any]]:
        """The results of one method on one data set."""
        return [r for r in self.results if (r["method"], r["dataset"]) == (method, dataset)]

    def scores(self, method: str, dataset: str) -> NDArray[np.float64]:
        """Scores of all seeds, shape (S,)."""
        return np.array([score for result in self.of(method, dataset) for score in result["scores"]])

    def curve(self, method: str, dataset: str) -> tuple[list[int], NDArray[np.float64]]:
        """Updates (K,) and scores (K, S) of the evaluations while training."""
        curves = [result["curve"] for result in self.of(method, dataset)]
        common = min((len(curve) for curve in curves), default=0)
        steps = [entry["step"] for entry in curves[0][:common]] if common else []
        return steps, np.array([[s for curve in curves for s in curve[k]["scores"]] for k in range(common)])

    @cached_property
    def differences(self) -> dict[tuple[str, str], tuple[Difference, float]]:
        """Of each method and data set: its difference to the first method, and Holm's p."""
        first = self.methods[0]
        pairs = [
            (m, d)
            for d in self.datasets
            for m in self.methods[1:]
            if len(self.scores(m, d)) and len(self.scores(first, d))
        ]
        found = [difference(self.scores(m, d), self.scores(first, d)) for m, d in pairs]
        return dict(zip(pairs, zip(found, holm([each.p for each in found]))))

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each method on each data set."""
        rows: list[tuple[str, ...]] = []
        for dataset in self.datasets:
            for method in self.methods:
                if not len(scores := self.scores(method, dataset)):
                    continue
                minus, p = self.differences.get((method, dataset), (None, math.nan))
                steps, curve = self.curve(method, dataset)
                area = _interval(mean_interval(area_under_curve(steps, curve))) if steps else ""
                less = "" if minus is None else _interval(Interval(*minus[:3]), sign=True)
                figure = _interval(mean_interval(scores))
                rows.append((dataset, method, figure, str(len(scores)), less, _p(p), area))
        return rows

    def summary(self) -> list[tuple[str, ...]]:
        """Over all data sets: methods that have the same number of seeds on each."""
        tables = {m: [self.scores(m, d) for d in self.datasets] for m in self.methods}
        whole = {m: np.stack(t) for m, t in tables.items() if len({len(s) for s in t}) == 1 and len(t[0])}
        first = whole.get(self.methods[0])
        rows: list[tuple[str, ...]] = []
        for method, scores in whole.items():
            better = ""
            if first is not None and scores is not first:
                better = _interval(stratified_bootstrap(probability_of_improvement, scores, first), digits=2)
            rows.append((method, _interval(stratified_bootstrap(interquartile_mean, scores)), better))
        return rows if len(self.datasets) > 1 else []

    def times(self) -> list[tuple[str, ...]]:
        """Where the time went."""
        rows: list[tuple[str, ...]] = []
        for dataset in self.datasets:
            for method in self.methods:
                seconds: dict[str, float] = defaultdict(float)
                for result in self.of(method, dataset):
                    for name, value in result["seconds"].items():
                        seconds[name] += value
                training = sum(value for name, value in seconds.items() if not name.startswith("agent: "))
                inside = sum(value for name, value in seconds.items() if name.startswith("agent: "))
                if training:
                    parts = ", ".join(f"{name.removeprefix('agent: ')} {value:.0f}" for name, value in seconds.items())
                    rows.append((method, dataset, f"{training:.0f}", f"{inside / training:.0%}", parts))
        return rows

    def head(self, names: Sequence[str]) -> list[str]:
        """A table's head, with the reference's name in it."""
        return [name.format(self.methods[0]) for name in names]


def show_comparison(console: Console, folder: Path, comparison: Comparison) -> None:
    """Prints the tables, and where the page is."""
    for title, head, rows in _tables(comparison)[:2]:
        if rows:
            printed = Table(*head, title=title, title_style="bold")
            last = None
            for row in rows:
                if last is not None and row[0] != last and head[0] == "data set":
                    printed.add_section()
                last = row[0]
                printed.add_row(*map(escape, row))
            console.print(printed)
    console.print(f"page: {folder}/page.html (beside it table.md, table.csv, results/)", soft_wrap=True, markup=False)


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Writes ``table.md``, ``table.csv`` and ``page.html``."""
    tables = [entry for entry in _tables(comparison) if entry[2]]
    write_whole(folder / "table.md", "\n".join(_markdown(*entry) for entry in tables))
    text = io.StringIO()
    csv.writer(text).writerows([comparison.head(HEAD), *comparison.rows()])
    write_whole(folder / "table.csv", text.getvalue())
    body = [section(title, table(rows, head)) for title, head, rows in tables]
    drawings = {}
    for dataset in comparison.datasets:
        drawings[f"{dataset}: scores at the end, with 95 % intervals over the seeds."] = svg(
            partial(_bars, comparison=comparison, dataset=dataset)
        )
        if any(comparison.curve(method, dataset)[0] for method in comparison.methods):
            drawings[f"{dataset}: scores while training, with 95 % intervals over the seeds."] = svg(
                partial(_curves, comparison=comparison, dataset=dataset)
            )
    notes = [f"<p>{html.escape(text)}</p>" for text in (comparison.note, EXPLANATION) if text]
    parts = [*body[:1], section("Pictures", figures(drawings)), *body[1:], section("How to read it", *notes)]
    example = comparison.results[0]
    subtitle = f"dawm {example['dawm']}, {example['updates']:,} updates"
    write_whole(folder / "page.html", page("Comparison of methods", subtitle, parts))


def _tables(comparison: Comparison) -> list[tuple[str, list[str], list[tuple[str, ...]]]]:
    return [
        ("Scores by data set", comparison.head(HEAD), comparison.rows()),
        ("Over all data sets", comparison.head(SUMMARY), comparison.summary()),
        ("Where the time went", comparison.head(TIMES), comparison.times()),
    ]


def _markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _interval(found: Interval, sign: bool = False, digits: int = 1) -> str:
    value = f"{found.value:+.{digits}f}" if sign else f"{found.value:.{digits}f}"
    return value if math.isnan(found.low) else f"{value} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def _p(p: float) -> str:
    return "" if math.isnan(p) else "below 0.001" if p < 0.001 else f"{p:.3f}"


def _bars(axis: Any, comparison: Comparison, dataset: str) -> None:
    found = {m: mean_interval(s) for m in comparison.methods if len(s := comparison.scores(m, dataset))}
    for height, (method, interval) in enumerate(reversed(found.items())):
        axis.barh(height, interval.value, color="#4477aa", alpha=0.6)
        axis.plot([interval.low, interval.high], [height, height], color="#1d2733", linewidth=2)
        axis.plot(
            comparison.scores(method, dataset),
            np.full(len(comparison.scores(method, dataset)), height),
            "|",
            color="#1d2733",
        )
    axis.set_yticks(range(len(found)), list(reversed(found)))
    result = next(r for r in comparison.results if r["dataset"] == dataset)
    axis.axvline(
        result["data"]["normalized_score" if result["unit"] == "score" else "return"], color="grey", linestyle="--"
    )
    axis.set(title="at the end (dashed: the data's mean)", xlabel=result["unit"])


def _curves(axis: Any, comparison: Comparison, dataset: str) -> None:
    for method in comparison.methods:
        steps, scores = comparison.curve(method, dataset)
        if steps:
            bands = [mean_interval(row) for row in scores]
            (line,) = axis.plot(steps, [band.value for band in bands], marker=".", label=method)
            axis.fill_between(
                steps, [b.low for b in bands], [b.high for b in bands], alpha=0.15, color=line.get_color()
            )
    axis.set(title="while training", xlabel="updates")
    axis.legend(fontsize="small")
