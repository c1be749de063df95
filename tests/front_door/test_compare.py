"""``python -m dawm compare``: killed half-way and started again, it ends with the table."""

import csv
import json
import os
import signal
import sys
import time

import processes
import pytest
import yaml
from rich.console import Console

from dawm.cli import launchers
from dawm.cli.compare import make_compare_parser
from dawm.cli.main import main
from dawm.training.ranks import only_run_in


@pytest.fixture
def grid(smoke, tmp_path, hopper):
    """The options of a small comparison: real data alone, and mixed, where every fit has one thread."""
    base = yaml.safe_load(smoke.read_text())
    del base["output_dir"], base["data"]["dataset"]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "real.yaml").write_text("data: {synthetic_fraction: 0.0}\n")
    (tmp_path / "mixed.yaml").write_text("data: {synthetic_fraction: 0.5}\n")
    folder = tmp_path / "comparison"
    paths = [str(tmp_path / name) for name in ("base.yaml", "real.yaml", "mixed.yaml")]
    options = ["--config", paths[0], "--methods", *paths[1:], "--datasets", hopper, "--output_dir", str(folder)]
    return options, folder


def results(folder):
    return {path.parts[-3]: json.loads(path.read_text()) for path in folder.glob("results/*/*/*.json")}


def test_a_killed_comparison_goes_on_and_ends_with_the_table(grid, tmp_path, capsys):
    options, folder = grid
    command = ["compare", *options, "--seeds", "2", "--workers", "1"]
    process = processes.start(command, tmp_path / "output", tmp_path / "output")
    deadline = time.monotonic() + 100
    while not results(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    process.join()
    assert set(results(folder)) == {"mixed"}, "the longer one comes first"
    before = next(folder.glob("results/mixed/*/0.json")).stat().st_mtime_ns

    assert main(command) == 0
    assert next(folder.glob("results/mixed/*/0.json")).stat().st_mtime_ns == before, "a finished cell stays"
    found = results(folder)
    assert set(found) == {"real", "mixed"}
    for result in found.values():
        assert len(result["scores"]) == 2
        assert [len(each) for each in result["returns"]] == [2, 2]
        assert [entry["step"] for entry in result["curve"]] == [20, 40]
        assert len(result["curve"][0]["scores"]) == 2
        assert min(result["seconds"][name] for name in ("updates", "EvaluateInEnvironment", "final evaluation")) > 0
        assert result["settings"]["agent"]["init_args"]["hidden"] == [16, 16]
        assert result["versions"].keys() > {"dawm", "torch"}
    assert found["mixed"]["seconds"]["RegenerateRollouts"] > 0
    assert "Scores by data set" in capsys.readouterr().out

    for name in ("table.md", "table.csv", "scores.png", "page.html"):
        (folder / name).unlink()
    assert main(["compare", "--output_dir", str(folder), "--show", "--note", "tuned on nothing"]) == 0
    assert (folder / "scores.png").stat().st_size > 0
    page = (folder / "page.html").read_text()
    assert "tuned on nothing" in page
    assert "share one world model" in page
    assert "| minus real |" in (folder / "table.md").read_text()
    rows = list(csv.DictReader((folder / "table.csv").open(newline="")))
    assert [row["method"] for row in rows] == ["real", "mixed"]
    assert float(rows[1]["mean"]) == pytest.approx(sum(found["mixed"]["scores"]) / 2)


def test_a_mistake_in_a_method_shows_before_anything_is_trained(grid, tmp_path, capsys):
    options, folder = grid
    (tmp_path / "mixed.yaml").write_text("data: {synthetic_fractoin: 0.5}\n")
    assert main(["compare", *options]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "synthetic_fractoin" in said
    assert f"(of the method {tmp_path / 'mixed.yaml'})" in said
    assert not folder.exists()
    assert main(["compare", *options, "--", "--seeds", "3"]) == 2
    assert "--seeds: got 'it among the options of fit', expected it as compare's own" in capsys.readouterr().err


def test_two_comparisons_do_not_share_a_folder(grid, tmp_path, capsys):
    options, folder = grid
    (tmp_path / "file").touch()
    assert main(["compare", *options, "--output_dir", str(tmp_path / "file")]) == 2
    assert "expected a folder to write to" in capsys.readouterr().err
    folder.mkdir()
    with only_run_in(folder, wait=False):
        assert main(["compare", *options]) == 2
    assert f"got {folder}, which process {os.getpid()}" in " ".join(capsys.readouterr().err.split())


class Cell:
    """A cell whose process is a line of Python; ``mark`` does not exist before its first start."""

    def __init__(self, folder, number, script, models="of its own", cost=1):
        self.name, self.folder, self.run = str(number), folder, folder / str(number)
        self.log, self.finished, self.mark = self.run / "log", folder / f"{number}.done", folder / f"{number}.mark"
        self.script, self.models, self.cost, self.index = script, models, cost, number

    def command(self):
        start = "import os, pathlib, sys; mark = pathlib.Path(sys.argv[1]); first = not mark.exists(); mark.touch(); "
        return [sys.executable, "-c", start + self.script, str(self.mark)]

    def done(self):
        return self.finished.exists()

    def collect(self, seconds):
        assert seconds > 0
        self.finished.touch()


def test_a_killed_cell_starts_again_and_one_that_fails_names_its_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launchers, "INTERVAL", 0.02)
    failing = "print('error: --agent: ' + ('old' if first else 'new')); print('more'); sys.exit(2)"
    scripts = ("first and os.kill(os.getpid(), 9)", failing, "os.kill(os.getpid(), 9)", "sys.exit(130 * first)")
    cells = [Cell(tmp_path, number, script) for number, script in enumerate(scripts)]
    failed = launchers.run_locally(cells[1:2], 1, [], Console())
    assert failed == {"1": f"--agent: old (log: {cells[1].log})"}
    failed = launchers.run_locally(cells, 2, [], Console())
    assert failed == {"1": f"--agent: new (log: {cells[1].log})", "2": f"killed by signal 9 (log: {cells[2].log})"}
    assert [cell.done() for cell in cells] == [True, False, False, True]
    assert cells[2].log.read_text().count(launchers.START) == 1 + launchers.RETRIES
    assert "4 of 4 cells" in capsys.readouterr().out


def test_cells_that_need_the_same_models_do_not_start_together(tmp_path):
    cells = [Cell(tmp_path, number, "", models) for number, models in enumerate("aab")]
    assert [launchers._pick(cells, busy).name for busy in (set(), {"a"}, {"a", "b"})] == ["0", "2", "1"]


def test_lists_given_twice_are_one():
    given = ["--config", "a", "b", "--config", "c", "--methods", "d", "--methods", "e"]
    options = make_compare_parser().parse_args(given)
    assert (options.config, options.methods) == (["a", "b", "c"], ["d", "e"])


def test_how_far_a_cell_is_shows_past_what_else_it_says(tmp_path):
    (tmp_path / "log").write_text("agent: 5 of 10 updates\n" + 100 * "a warning\n")
    assert launchers._last_line(tmp_path / "log") == "agent: 5 of 10 updates"


@pytest.mark.slow  # starting and mending a cluster takes a minute
def test_cells_on_ray_survive_the_death_of_a_worker(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the workers import this module
    kill = "number == 0 and first and os.kill(os.getppid(), 9)"
    cells = [Cell(tmp_path, number, kill.replace("number", str(number))) for number in range(3)]
    assert launchers.run_on_ray(cells, 2, [], Console()) == {}
    assert (tmp_path / "0" / "log").read_text().count(launchers.START) == 2
    assert all(cell.done() for cell in cells)


def test_an_array_job_of_slurm(grid, capsys, tmp_path, monkeypatch):
    options, folder = grid
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["compare", *options, "--launcher", "slurm", "--agent.alpha", "2"]) == 0
    script = (folder / "compare.sbatch").read_text()
    assert "#SBATCH --array=0,1\n" in script.replace("1,0", "0,1")
    assert '--cell "$SLURM_ARRAY_TASK_ID" -- --agent.alpha 2' in script
    assert "submit it with: sbatch" in capsys.readouterr().out

    for name, script in {"sbatch": "echo '7;cluster'", "squeue": '[ "$3" = --jobs=7 ] && echo "7_[0-1]"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    for expected in ("submitted 2 cells as job 7", "2 cells are missing, and in SLURM's queue: 7_[0-1]"):
        assert main(["compare", *options, "--launcher", "slurm", "--agent.alpha", "2"]) == 0
        assert expected in capsys.readouterr().out


def test_configs_joined_by_plus_are_one_method(grid, tmp_path, monkeypatch):
    options, folder = grid
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "alpha.yaml").write_text("agent: {class_path: TD3BC, init_args: {alpha: 7.0}}\n")
    mixed, alpha = str(tmp_path / "mixed.yaml"), str(tmp_path / "alpha.yaml")
    joined = [f"{mixed}+{alpha}" if option == mixed else option for option in options]
    assert main(["compare", *joined, "--launcher", "slurm"]) == 0
    assert json.loads((folder / "compare.json").read_text())["methods"] == ["real", "mixed+alpha"]
    keys = json.loads((folder / "compare.json").read_text())["keys"]
    options = [*joined, "--agent.alpha", "7"]
    assert main(["compare", *options, "--launcher", "slurm"]) == 0
    after = json.loads((folder / "compare.json").read_text())["keys"]
    changed = {name.partition("/")[0] for name in keys if keys[name] != after[name]}
    assert changed == {"real"}, "the joined method had this alpha"
