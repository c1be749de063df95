"""A comparison's figures from results of cells, worked out by hand."""

import math

import pytest
from matplotlib.figure import Figure

from dawm.cli.comparison import NUMBERS, Comparison
from dawm.cli.comparison_page import _bars, _curves


def result(method, dataset, number, scores, imagines=True, unit="score"):
    curve = [{"step": 10, "scores": [0.0] * len(scores)}, {"step": 20, "scores": scores}]
    return {"method": method, "dataset": dataset, "number": number, "scores": scores, "imagines": imagines,
            "unit": unit, "curve": curve, "updates": 100, "seconds": {"updates": 4.0, "waiting": 1.0}}  # fmt: skip


def compare(results, datasets=("a", "b")):
    return Comparison(results, ["real", "mixed"], datasets, "", "", len(results))


def test_seeds_that_share_a_world_model_count_as_one():
    """Group means 2 and 4: mean 3, error 1, t of one degree of freedom 12.706; real seeds are six of their own."""
    results = [result("mixed", "a", number, scores) for number, scores in enumerate(([1.0, 3.0], [3.0, 5.0]))]
    results += [result("real", "a", number, [0.0, 2.0, 1.0], imagines=False) for number in range(2)]
    found = compare(results)
    real, mixed = (dict(zip(NUMBERS, row)) for row in found.numbers())
    assert (mixed["mean"], mixed["seeds"]) == (3.0, 4)
    assert mixed["high"] - 3 == pytest.approx(12.7062, rel=1e-4)
    assert mixed["area"] == 1.5
    assert mixed["area_high"] - 1.5 == pytest.approx(12.7062 / 2, rel=1e-4)
    # real: variance 0.8 of six seeds; freedom (1 + 2/15)^2 / (1 + (2/15)^2 / 5) = 1.28
    assert mixed["difference"] == 2.0
    assert mixed["p_holm"] == pytest.approx(0.267033, rel=1e-4)
    assert math.isnan(real["difference"])
    assert found.rows()[0][:5] == ("a", "real", "1.0 (0.1 to 1.9)", "6", "")
    assert found.rows()[1][3:6] == (
        "4",
        f"+2.0 ({mixed['difference_low']:.1f} to {mixed['difference_high']:.1f})",
        "0.267",
    )
    assert real["high"] - 1 == pytest.approx(2.57058 * math.sqrt(0.8 / 6), rel=1e-4)
    assert "means of the" in found.explanation()


def test_one_group_has_its_seeds_and_is_said_to_share_a_world_model():
    found = compare([result("real", "a", 0, [0.0, 2.0], imagines=False), result("mixed", "a", 0, [1.0, 3.0])])
    assert found.mean("mixed", "a").high - 2 == pytest.approx(12.7062, rel=1e-4)
    assert "share one world model" in found.explanation()


def test_areas_are_over_the_updates_that_all_methods_were_evaluated_at():
    """Both curves rise by 1 an update; the one begins at 10, the other at 20, and ends at 30."""
    fine, coarse = result("real", "a", 0, [0.0, 0.0]), result("mixed", "a", 0, [0.0, 0.0])
    fine["curve"] = [{"step": step, "scores": [step, step + 2.0]} for step in (10, 20, 40)]
    coarse["curve"] = [{"step": step, "scores": [step, step + 2.0]} for step in (20, 30)]
    found = compare([fine, coarse])
    assert found.span("a") == (20, 30)
    assert [row[NUMBERS.index("area")] for row in found.numbers()] == [26.0, 26.0]


def test_summaries_need_scores_on_all_data_sets():
    grid = [(m, d, [float(k) for k in range(4)]) for m in ("real", "mixed") for d in "ab"]
    assert [row[:1] for row in compare([result(m, d, 0, s) for m, d, s in grid]).summary()] == [("real",), ("mixed",)]
    assert compare([result(m, d, 0, s) for m, d, s in grid[:-1]]).summary()[0][0] == "real"
    assert len(compare([result(m, d, 0, s) for m, d, s in grid[:-1]]).summary()) == 1, "mixed lacks a data set"
    returns = [result(m, d, 0, s, unit="return" if d == "b" else "score") for m, d, s in grid]
    assert compare(returns).summary() == [], "returns of one data set and scores of another have no mean"


def test_pictures_name_the_unit_of_their_data_set():
    results = [result("real", name, 0, [1.0, 2.0], unit=unit) for name, unit in (("a", "score"), ("b", "return"))]
    found = compare([{**one, "data": {"return": 3.0, "normalized_score": 4.0}} for one in results])
    for name, unit, level in (("a", "score", 4.0), ("b", "return", 3.0)):
        bars, curves = Figure().subplots(1, 2)
        _bars(bars, found, name)
        _curves(curves, found, name)
        assert (bars.get_xlabel(), curves.get_ylabel()) == (unit, unit)
        assert list(bars.lines[-1].get_xdata()) == [level, level]


def test_where_the_time_went():
    head, rows = compare([result("real", "a", 0, [1.0]), result("real", "a", 1, [2.0])]).times()
    assert dict(zip(head, rows[0])) == {
        "data set": "a", "method": "real", "seconds": "10", "updates a second alone": "25", "updates": "80%",
        "waiting": "20%",
    }  # fmt: skip
