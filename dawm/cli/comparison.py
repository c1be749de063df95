"""A comparison of methods: what the cells left, by method and data set, and what follows from it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

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

__all__ = ["NUMBERS", "Comparison"]

Floats = NDArray[np.float64]

HEAD = ("data set", "method", "score", "seeds", "minus {}", "p", "area under curve")
SUMMARY = ("method", "inter-quartile mean over data sets", "probability of improvement over {}")
NUMBERS = ("dataset", "method", "unit", "seeds", "mean", "low", "high", "difference", "difference_low",
           "difference_high", "p_holm", "area", "area_low", "area_high")  # fmt: skip
NOTHING = Interval(math.nan, math.nan, math.nan)
UPDATES = "updates"  # in a cell's seconds: those of the agent alone
EXPLANATION = """Scores are those of the last checkpoint, over the final episodes of every seed. Brackets hold 95 %
intervals: of means Student's over the seeds, of differences Welch's, over data sets stratified bootstrap. p is that of
the difference, adjusted by Holm's method for all comparisons of the table. The area under the curve, the mean score
while training between the first and the last update at which all methods were evaluated, says how fast one learns."""
ONE_GROUP = """All seeds of a method that imagines share one world model, so these intervals do not contain what differs
between world models: --groups trains several."""
GROUPS = """The seeds of a group share a world model: of methods that imagine, intervals and p are over the means of the
groups."""


class Comparison:
    """Results of the cells that are there, by method and data set; the first method is the reference.

    Args:
        results: What each cell left.
        methods: Their order.
        datasets: Their order.
        note: A line for the page.
        command: The whole comparison's.
        cells: How many there will be.
    """

    def __init__(
        self, results: Sequence[Mapping[str, Any]], methods: Sequence[str], datasets: Sequence[str], note: str,
        command: str, cells: int,
    ) -> None:  # fmt: skip
        self.results, self.note, self.command, self.cells = results, note, command, cells
        there = {result["method"] for result in results}
        self.methods = [method for method in methods if method in there]
        self.datasets = [name for name in datasets if any(result["dataset"] == name for result in results)]

    def of(self, method: str, dataset: str) -> list[Mapping[str, Any]]:
        """The results of one method on one data set."""
        return [r for r in self.results if (r["method"], r["dataset"]) == (method, dataset)]

    def unit(self, dataset: str) -> str:
        """Of a data set's scores: ``score``, or ``return`` where it has no reference scores."""
        return next(result["unit"] for result in self.results if result["dataset"] == dataset)

    def scores(self, method: str, dataset: str) -> Floats:
        """Scores of all seeds, shape (S,)."""
        return np.array([score for result in self.of(method, dataset) for score in result["scores"]])

    def grouped(self, method: str, dataset: str, values: Floats) -> Floats:
        """Values of all seeds, shape (..., S), as those of groups that share a world model, shape (..., G, S / G).

        Left as they are where seeds share none, or all the same one.
        """
        found = self.of(method, dataset)
        groups = len(found) > 1 and any(result["imagines"] and len(result["scores"]) > 1 for result in found)
        return values.reshape(*values.shape[:-1], len(found), -1) if groups else values

    def independent(self, method: str, dataset: str, values: Floats) -> Floats:
        """Values of all seeds, shape (..., S), or their means by group, shape (..., G): what intervals are over."""
        grouped = self.grouped(method, dataset, values)
        return grouped.mean(axis=-1) if grouped.ndim > values.ndim else values

    def mean(self, method: str, dataset: str) -> Interval:
        """Mean of all seeds' scores, with its interval."""
        return mean_interval(self.independent(method, dataset, self.scores(method, dataset)))

    def curve(self, method: str, dataset: str) -> tuple[list[int], Floats]:
        """Updates (K,) and scores (K, S) of the evaluations while training."""
        curves = [result["curve"] for result in self.of(method, dataset)]
        common = min((len(curve) for curve in curves), default=0)
        steps = [entry["step"] for entry in curves[0][:common]] if common else []
        return steps, np.array([[s for curve in curves for s in curve[k]["scores"]] for k in range(common)])

    def span(self, dataset: str) -> tuple[float, float] | None:
        """The updates that the curves of all methods reach over; None where they have none in common."""
        curves = [steps for method in self.methods if (steps := self.curve(method, dataset)[0])]
        low, high = max((steps[0] for steps in curves), default=0), min((steps[-1] for steps in curves), default=-1)
        return (low, high) if low <= high else None

    @cached_property
    def differences(self) -> dict[tuple[str, str], tuple[Difference, float]]:
        """Of each method and data set: its difference to the first method, and Holm's p."""
        first = self.methods[0]
        pairs = [(m, d) for d in self.datasets for m in self.methods[1:] if self.of(m, d) and self.of(first, d)]
        found = []
        for pair in pairs:
            ours, theirs = (self.independent(m, pair[1], self.scores(m, pair[1])) for m in (pair[0], first))
            found.append(difference(ours, theirs))
        return dict(zip(pairs, zip(found, holm([each.p for each in found]))))

    def pairs(self) -> list[tuple[str, str]]:
        """Data sets and methods that there are results of."""
        return [(dataset, method) for dataset in self.datasets for method in self.methods if self.of(method, dataset)]

    def numbers(self) -> list[tuple[Any, ...]]:
        """What `NUMBERS` names, of each method on each data set; NaN where there is nothing."""
        rows: list[tuple[Any, ...]] = []
        for dataset, method in self.pairs():
            minus, p = self.differences.get((method, dataset), (NOTHING, math.nan))
            steps, curve = self.curve(method, dataset)
            area, span, seeds = NOTHING, self.span(dataset), len(self.scores(method, dataset))
            if steps and span is not None:
                area = mean_interval(self.independent(method, dataset, area_under_curve(steps, curve, span)))
            mean = self.mean(method, dataset)
            rows.append((dataset, method, self.unit(dataset), seeds, *mean, *minus[:3], p, *area))
        return rows

    def rows(self) -> list[tuple[str, ...]]:
        """The same for readers, as `HEAD` names it."""
        return [
            (dataset, method, _interval(*n[:3]), str(seeds), _interval(*n[3:6], sign=True), _p(n[6]), _interval(*n[7:]))
            for dataset, method, _, seeds, *n in self.numbers()
        ]

    def summary(self) -> list[tuple[str, ...]]:
        """Over several data sets, all with scores: the methods that have the same number of seeds on each."""
        if len(self.datasets) < 2 or any(result["unit"] != "score" for result in self.results):
            return []
        tables = {m: [self.grouped(m, d, self.scores(m, d)) for d in self.datasets] for m in self.methods}
        whole = {m: np.stack(t) for m, t in tables.items() if len({s.shape for s in t}) == 1}
        first = whole.get(self.methods[0])
        rows: list[tuple[str, ...]] = []
        for method, scores in whole.items():
            better = ""
            if first is not None and scores is not first:
                better = _interval(*stratified_bootstrap(probability_of_improvement, scores, first), digits=2)
            rows.append((method, _interval(*stratified_bootstrap(interquartile_mean, scores)), better))
        return rows

    def times(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Where the time went, head and rows: the share of each part, and how many updates a second are left by it."""
        spent = {pair: Counter[str]() for pair in self.pairs()}
        for dataset, method in spent:
            for result in self.of(method, dataset):
                spent[dataset, method].update(result["seconds"])
        found = Counter[str]()
        for seconds in spent.values():
            found.update(seconds)
        names = [name for name, value in found.most_common() if value >= 0.5]
        rows: list[tuple[str, ...]] = []
        for (dataset, method), seconds in spent.items():
            total = sum(seconds.values())
            shares = (f"{seconds[name] / total:.0%}" if name in seconds else "" for name in names)
            updates = sum(result["updates"] for result in self.of(method, dataset))
            rate = f"{updates / seconds[UPDATES]:,.0f}" if seconds[UPDATES] else ""
            rows.append((dataset, method, f"{total:,.0f}", rate, *shares))
        return ["data set", "method", "seconds", "updates a second alone", *names], rows

    def explanation(self) -> str:
        """How to read the tables."""
        imagining = [result for result in self.results if result["imagines"] and len(result["scores"]) > 1]
        shared = GROUPS if any(result["number"] for result in imagining) else ONE_GROUP
        return f"{EXPLANATION} {shared}" if imagining else EXPLANATION

    def finished(self) -> str:
        """How far it has come."""
        return f"{len(self.results)} of {self.cells} cells finished"

    def tables(self) -> list[tuple[str, list[str], list[tuple[str, ...]]]]:
        """Title, head and rows of each table that has any."""
        found = [
            ("Scores by data set", self.head(HEAD), self.rows()),
            ("Over all data sets", self.head(SUMMARY), self.summary()),
            ("Where the time went", *self.times()),
        ]
        return [entry for entry in found if entry[2]]

    def head(self, names: Sequence[str]) -> list[str]:
        """A table's head, with the reference's name in it."""
        return [name.format(self.methods[0]) for name in names]


def _interval(value: float, low: float, high: float, *, sign: bool = False, digits: int = 1) -> str:
    if math.isnan(value):
        return ""
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text if math.isnan(low) else f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def _p(p: float) -> str:
    return "" if math.isnan(p) else "below 0.001" if p < 0.001 else f"{p:.3f}"
