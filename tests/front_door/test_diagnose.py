"""`diagnose` measures a finished run's imagined transitions."""

import json
import shutil

import pytest

from dawm.cli.main import main

GROUPS = {"real", "before_filters", "after_filters"}


@pytest.fixture
def run(finished_run, hopper, tmp_path):
    """A copy of the finished run, to write into."""
    return shutil.copytree(finished_run, tmp_path / "copied")


@pytest.mark.pictures
def test_figures_table_and_report(run, capsys):
    command = ["diagnose", "--run", str(run), "--rollouts", "60", "--margin", "10"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for part in ("one step of Hopper-v5", "forward model", "TD target, mean", "imagined steps by fate"):
        assert part in printed
    fidelity = json.loads((run / "fidelity.json").read_text())
    one_step = fidelity["simulator"]["one_step"]
    assert one_step.keys() == GROUPS | {"real_unclipped"}
    assert max(one_step["real_unclipped"]["observation"]) < 1e-6 < max(one_step["after_filters"]["observation"])
    assert len(one_step["real"]["observation"]) == 3
    assert one_step["after_filters"]["count"][0] <= one_step["before_filters"]["count"][0] <= 60
    assert (
        fidelity["novelty"].keys() == fidelity["distributions"].keys() == fidelity["return_response"].keys() == GROUPS
    )
    assert sum(fidelity["fates"].values()) == pytest.approx(1)
    assert 0 <= fidelity["edge"]["fraction"] <= 1
    assert {"real", "after_filters", "other"} <= fidelity["td_targets"].keys()
    assert (run / "fidelity.png").stat().st_size > 0
    page = (run / "report.html").read_text()
    assert "Fidelity of imagined data" in page
    assert json.loads((run / "results.json").read_text())["command"] in page.replace("&#x27;", "'")
    assert main(command) == 0
    assert json.loads((run / "fidelity.json").read_text()) == fidelity, "the same seed gives the same figures"


def test_an_environment_that_cannot_judge(run, capsys):
    command = ["diagnose", "--run", str(run), "--rollouts", "20", "--margin", "10"]
    assert main([*command, "--env_id", "Pendulum-v1"]) == 2
    assert "--env_id: got 'Pendulum-v1' which is no MuJoCo" in capsys.readouterr().err
    assert main([*command, "--env_id", "HalfCheetah-v5"]) == 2
    assert "(11,) as in the data" in capsys.readouterr().err
