"""``python -m dawm compare``: killed half-way and started again, it ends with the table."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from rich.console import Console

from dawm.cli.main import main


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


def test_a_killed_comparison_goes_on_and_ends_with_the_table(grid, capsys):
    options, folder = grid
    command = [sys.executable, "-m", "dawm", "compare", *options, "--seeds", "2", "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 100
    while not results(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()
    assert set(results(folder)) == {"real"}
    before = next(folder.glob("results/real/*/0.json")).stat().st_mtime_ns

    assert main(["compare", *options, "--seeds", "2", "--workers", "1"]) == 0
    assert next(folder.glob("results/real/*/0.json")).stat().st_mtime_ns == before, "a finished cell stays"
    found = results(folder)
    assert set(found) == {"real", "mixed"}
    for result in found.values():
        assert len(result["scores"]) == 2
        assert [len(each) for each in result["returns"]] == [2, 2]
        assert [entry["step"] for entry in result["curve"]] == [20, 40]
        assert len(result["curve"][0]["scores"]) == 2
        assert result["seconds"]["agent"] > result["seconds"]["agent: EvaluateInEnvironment"] > 0
    printed = capsys.readouterr().out
    assert "Scores by data set" in printed
    assert "Welch" in (folder / "page.html").read_text()
    assert "| minus real |" in (folder / "table.md").read_text()
    assert len((folder / "table.csv").read_text().splitlines()) == 3


def test_a_mistake_in_a_method_shows_before_anything_is_trained(grid, tmp_path, capsys):
    options, folder = grid
    (tmp_path / "mixed.yaml").write_text("data: {synthetic_fractoin: 0.5}\n")
    assert main(["compare", *options]) == 2
    assert "synthetic_fractoin" in capsys.readouterr().err
    assert not folder.exists()


class Sleeper:
    """A cell of Ray's; the process of the first one kills its worker the first time."""

    def __init__(self, folder, number):
        self.name, self.folder, self.run = str(number), folder, folder / str(number)
        self.log, self.finished = self.run / "log", folder / f"{number}.done"

    def command(self):
        script = "import os, pathlib, signal, sys; mark = pathlib.Path(sys.argv[1]); first = not mark.exists(); "
        script += "mark.touch(); first and sys.argv[2] == '0' and os.kill(os.getppid(), signal.SIGKILL)"
        return [sys.executable, "-c", script, str(self.folder / f"{self.name}.mark"), self.name]

    def done(self):
        return self.finished.exists()

    def collect(self):
        self.finished.touch()


@pytest.mark.slow  # starting and mending a cluster takes a minute
def test_cells_on_ray_survive_the_death_of_a_worker(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from dawm.cli.launchers import run_on_ray

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the workers import this module
    cells = [Sleeper(tmp_path, number) for number in range(3)]
    assert run_on_ray(cells, 2, [], Console()) == {}
    assert all(cell.done() for cell in cells)


def test_an_array_job_of_slurm(grid, capsys, monkeypatch):
    options, folder = grid
    monkeypatch.setenv("PATH", "")
    assert main(["compare", *options, "--launcher", "slurm"]) == 0
    script = (folder / "compare.sbatch").read_text()
    assert "--array=0,1" in script
    assert '--cell "$SLURM_ARRAY_TASK_ID"' in script
    assert "sbatch" in capsys.readouterr().out
