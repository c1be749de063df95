"""Statistics of comparisons against tables and numbers worked out by hand."""

import math

import numpy as np
import pytest

from dawm.evaluation.statistics import (
    area_under_curve,
    difference,
    holm,
    interquartile_mean,
    mean_interval,
    probability_of_improvement,
    stratified_bootstrap,
    student_t_quantile,
    student_t_tail,
)


@pytest.mark.parametrize(
    ("probability", "freedom", "t"),
    [(0.975, 1, 12.7062), (0.975, 1.5, 6.01666), (0.975, 4, 2.77645), (0.975, 9, 2.26216), (0.975, 10, 2.22814),
     (0.95, 30, 1.69726), (0.975, 1e6, 1.95997)],
)  # fmt: skip
def test_students_t_is_that_of_the_tables(probability, freedom, t):
    assert student_t_quantile(probability, freedom) == pytest.approx(t, rel=1e-5)
    assert student_t_tail(t, freedom) == pytest.approx(1 - probability, rel=1e-4)
    assert student_t_tail(0, freedom) == pytest.approx(0.5)


def test_far_tails_of_students_t():
    assert student_t_tail(100.0, 2) == pytest.approx(0.5 - 50 / math.sqrt(10_002), rel=1e-9)
    assert student_t_tail(100.0, 9) == pytest.approx(2.5365448831e-15, rel=1e-9)


def test_the_interval_of_a_mean():
    found = mean_interval([1.0, 2.0, 3.0, 4.0])  # standard deviation 1.29099, t of 3 degrees of freedom 3.18245
    assert tuple(found) == pytest.approx((2.5, 2.5 - 3.18245 * 1.29099 / 2, 2.5 + 3.18245 * 1.29099 / 2), rel=1e-4)
    assert math.isnan(mean_interval([1.0]).low)


def test_welchs_difference():
    # variances 5/3 and 20/3, 4 seeds each: error sqrt(25/12), freedom (25/12)^2 / ((5/12)^2 + (20/12)^2) 3 = 4.412
    found = difference([2.0, 4.0, 6.0, 8.0], [1.0, 2.0, 3.0, 4.0])
    assert found.value == 2.5
    assert found.p == pytest.approx(0.15158, rel=1e-4)  # t = 1.7321
    assert found.high - 2.5 == pytest.approx(2.5 - found.low)
    assert difference([1.0, 1.0], [1.0, 1.0]).p == 1.0


def test_holms_adjustment():
    assert holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)


def test_rliables_summaries():
    assert interquartile_mean([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 700.0]]) == 3.5
    # task one: of 4 pairs 1 win and 2 ties; task two: 4 wins
    assert probability_of_improvement([[1, 2], [5, 6]], [[1, 2], [3, 4]]) == pytest.approx((0.5 + 1) / 2)
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(3, 40))
    found = stratified_bootstrap(lambda table: float(table.mean()), scores)
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(120), rel=0.2)
    shifted = stratified_bootstrap(lambda table: float(table.mean()), np.array([[0.0, 0.0], [9.0, 9.0]]))
    assert shifted == (4.5, 4.5, 4.5), "seeds are redrawn within a task"


def test_summaries_agree_with_rliable():
    metrics = pytest.importorskip("rliable.metrics")
    a, b = np.random.default_rng(1).normal(size=(2, 4, 7))
    assert interquartile_mean(a) == pytest.approx(metrics.aggregate_iqm(a.T))
    assert probability_of_improvement(a, b) == pytest.approx(metrics.probability_of_improvement(a.T, b.T))


def test_the_area_under_a_curve():
    area = area_under_curve([0, 10, 40], [[0.0, 1.0], [10.0, 1.0], [10.0, 1.0]])
    assert area == pytest.approx([(5 * 10 + 10 * 30) / 40, 1.0])
    part = area_under_curve([0, 10, 40], [[0.0, 1.0], [10.0, 1.0], [10.0, 1.0]], (5, 20))
    assert part == pytest.approx([(7.5 * 5 + 10 * 10) / 15, 1.0])


def test_one_seed_has_no_interval():
    assert np.isnan(stratified_bootstrap(interquartile_mean, [[1.0], [2.0]])[1:]).all()
