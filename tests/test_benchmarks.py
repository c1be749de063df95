"""Every benchmark runs, at its smallest size; what it measures there means nothing."""

import torch

from benchmarks import __main__ as benchmarks
from benchmarks import end_to_end, measure


def test_every_benchmark_runs_and_writes_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    try:
        benchmarks.main(["--quick"])
    finally:
        torch.set_num_threads(threads)
    assert "x plain PyTorch" in " ".join(capsys.readouterr().out.split()).replace(" loop", "")
    written = {path.name.split("-xeon")[0].rsplit("-", 4)[0] for path in tmp_path.glob("*.md")}
    assert len(written) == 6


def test_ratios_are_of_medians():
    results = [measure.Rates("a", [1.0, 9.0, 2.0]), measure.Rates("b", [4.0, 4.0, 4.0])]
    assert measure.ratio(results, "b", "a") == "2.00"
    assert measure.rows(results, ["a"])[1] == ["b", "4.0", "4.0 to 4.0", "2.00"]


def test_contestants_take_turns_and_every_other_round_goes_backwards():
    calls = []
    measure.interleave({name: lambda name=name: calls.append(name) or 1 for name in "ab"}, rounds=2)
    assert calls == ["a", "b", "a", "b", "b", "a"]


def test_what_remains_of_a_run_is_neither_networks_nor_drawing_nor_callbacks():
    seconds = {"fit": 100.0, "before/data": 10.0, "agent/stage": 60.0, "agent/networks": 30.0, "agent/drawing": 6.0}
    seconds |= {"agent/evaluation": 15.0, "agent/regeneration": 5.0, "after/last evaluation": 5.0}
    assert end_to_end.stage_body(seconds) == [
        ["agent", *["60.00", "30.00", "6.00", "0.00", "15.00", "5.00", "4.00"], "10.0 %"]
    ]
    rows = {row[0]: row[1:] for row in end_to_end.run_body(seconds)}
    assert rows["the rest"] == ["25.00", "25.0 %"]
    assert rows["all evaluations, of these"] == ["20.00", "20.0 %"]


def test_batches_are_timed_one_by_one():
    clock = end_to_end.Clock()
    clock.stage = "agent"
    timed = clock.wrap_batches(lambda loader: iter(loader))
    assert list(timed([1, 2, 3])) == [1, 2, 3]
    assert clock.seconds["agent/drawing"] > 0
