"""Every benchmark runs, at its smallest size; what it measures there means nothing."""

import torch

from benchmarks import __main__ as benchmarks
from benchmarks import measure


def test_every_benchmark_runs_and_writes_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    try:
        benchmarks.main(["--quick"])
    finally:
        torch.set_num_threads(threads)
    assert "x plain PyTorch" in " ".join(capsys.readouterr().out.split()).replace(" loop", "")
    written = {path.name.split("-xeon")[0].rsplit("-", 4)[0] for path in tmp_path.glob("*.md")}
    assert len(written) == 5


def test_ratios_are_of_medians():
    results = [measure.Rates("a", [1.0, 9.0, 2.0]), measure.Rates("b", [4.0, 4.0, 4.0])]
    assert measure.ratio(results, "b", "a") == "2.00"
    assert measure.rows(results, ["a"])[1] == ["b", "4.0", "4.0 to 4.0", "2.00"]


def test_contestants_take_turns_and_every_other_round_goes_backwards():
    calls = []
    measure.interleave({name: lambda name=name: calls.append(name) or 1 for name in "ab"}, rounds=2)
    assert calls == ["a", "b", "a", "b", "b", "a"]
