"""How sure a comparison of methods is: intervals, differences, and summaries over tasks.

Symbols: S seeds, T tasks, P comparisons, G groups of seeds that share a world model. Scores of a method on one task
have the shape (S,), on all tasks (T, S), or (T, G, S) where seeds come in groups.

Inter-quartile mean, stratified bootstrap and probability of improvement are those of Agarwal et al. 2021
(arXiv 2108.13264); the difference of two means is Welch's, p-values are adjusted by Holm's method.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Difference", "Interval", "area_under_curve", "difference", "holm", "interquartile_mean", "mean_interval",
    "probability_of_improvement", "stratified_bootstrap", "student_t_quantile", "student_t_tail",
]  # fmt: skip

Floats = NDArray[np.float64]

NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)  # of a quadrature from -1 to 1


class Interval(NamedTuple):
    """An estimate and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """The difference of two means."""

    value: float
    low: float
    high: float
    p: float  # two-sided, that the means are equal


def mean_interval(scores: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean over seeds, shape (S,), with Student's interval; NaN bounds for one seed."""
    values = np.asarray(scores, np.float64)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    half = student_t_quantile((1 + confidence) / 2, count - 1) * float(values.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def difference(scores: ArrayLike, reference: ArrayLike, confidence: float = 0.95) -> Difference:
    """Mean of the one minus that of the other, each over its own seeds, by Welch's t-test."""
    a, b = np.asarray(scores, np.float64), np.asarray(reference, np.float64)
    found = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return Difference(found, math.nan, math.nan, math.nan)
    parts = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    error = math.sqrt(sum(parts))
    if error == 0:
        return Difference(found, found, found, float(found == 0))
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1))
    half = student_t_quantile((1 + confidence) / 2, freedom) * error
    return Difference(found, found - half, found + half, 2 * student_t_tail(abs(found) / error, freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for P comparisons (Holm 1979); NaN stays NaN and does not count."""
    order = sorted((p, number) for number, p in enumerate(p_values) if not math.isnan(p))
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, number) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[number] = highest
    return adjusted


def interquartile_mean(scores: ArrayLike) -> float:
    """Mean of the middle half of all scores; of each end a quarter, rounded down, is left out."""
    values = np.sort(np.asarray(scores, np.float64), axis=None)
    cut = len(values) // 4
    return float(values[cut : len(values) - cut].mean())


def probability_of_improvement(scores: ArrayLike, reference: ArrayLike) -> float:
    """Chance that a seed of the one beats a seed of the other on a task, ties counting half; shapes (T, ...)."""
    a, b = (np.asarray(table, np.float64).reshape(len(table), -1) for table in (scores, reference))  # type: ignore[arg-type]
    a, b = a[:, :, None], b[:, None, :]
    return float(((a > b) + 0.5 * (a == b)).mean(axis=(1, 2)).mean())


def stratified_bootstrap(
    statistic: Callable[..., float], *scores: ArrayLike, draws: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """A statistic of score tables with its percentile interval: seeds, or whole groups of them, are redrawn by task.

    Tables have the shape (T, S), or (T, G, S) for groups. NaN bounds where there is but one seed, or group, to draw.
    """
    generator = np.random.default_rng(seed)
    tables = [np.asarray(table, np.float64) for table in scores]

    def redrawn(table: Floats) -> Floats:
        return table[np.arange(len(table))[:, None], generator.integers(table.shape[1], size=table.shape[:2])]

    if min(table.shape[1] for table in tables) < 2:
        return Interval(statistic(*tables), math.nan, math.nan)
    found = [statistic(*map(redrawn, tables)) for _ in range(draws)]
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(statistic(*tables), float(low), float(high))


def area_under_curve(steps: ArrayLike, scores: ArrayLike, span: tuple[float, float] | None = None) -> Floats:
    """Mean height of learning curves, by trapezoids: steps (K,), scores (K, S) -> (S,). It says how fast one learns.

    Over a ``span`` of steps, within those of the curve, or over all of it.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(scores, np.float64)
    if span is not None:
        ends = np.array([[np.interp(end, x, column) for column in y.T] for end in span])
        inside = (x > span[0]) & (x < span[1])
        x, y = np.array([span[0], *x[inside], span[1]]), np.concatenate([ends[:1], y[inside], ends[1:]])
    if x[0] == x[-1]:
        return y.mean(axis=0)
    return ((y[1:] + y[:-1]) / 2 * np.diff(x)[:, None]).sum(axis=0) / (x[-1] - x[0])


def student_t_tail(t: float, freedom: float) -> float:
    """Chance that Student's t with so many degrees of freedom, at least 1, exceeds ``t``, at least 0.

    With t = sqrt(freedom) tan(angle) the density is that of the angle, proportional to cos(angle)^(freedom - 1); the
    quadrature's error is below a millionth of the chance.
    """
    low = math.atan(t / math.sqrt(freedom))
    half = (math.pi / 2 - low) / 2
    height = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return float(height * half * (WEIGHTS * np.cos(low + half * (NODES + 1)) ** (freedom - 1)).sum())


def student_t_quantile(probability: float, freedom: float) -> float:
    """The t that is exceeded with a chance of ``1 - probability``, from 0.5 up to below 1."""
    low, high = 0.0, 1.0
    while student_t_tail(high, freedom) > 1 - probability:
        high *= 2
    for _ in range(100):  # halves the bracket until no digit is left
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_tail(middle, freedom) > 1 - probability else (low, middle)
    return (low + high) / 2
