"""`diagnose` measures a finished run's imagined transitions."""

import json
import shutil

import gymnasium as gym
import pytest
import yaml
from gymnasium.envs.registration import EnvSpec

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
    assert {"real", "after_filters", "earlier"} <= fidelity["td_targets"].keys()
    assert (run / "fidelity.png").stat().st_size > 0
    page = (run / "report.html").read_text()
    assert "Fidelity of imagined data" in page
    assert json.loads((run / "results.json").read_text())["command"] in page.replace("&#x27;", "'")
    assert main(command) == 0
    assert json.loads((run / "fidelity.json").read_text()) == fidelity, "the same seed gives the same figures"
    assert main(["fit", "--config", str(run / "config.yaml"), "--output_dir", str(run)]) == 0
    assert "Fidelity of imagined data" in (run / "report.html").read_text(), "all stages are those it measured"


def test_an_environment_that_cannot_judge(run, capsys):
    command = ["diagnose", "--run", str(run), "--rollouts", "20", "--margin", "10"]
    assert main([*command, "--env_id", "Pendulum-v1"]) == 2
    assert "--env_id: got 'Pendulum-v1' which is no MuJoCo" in capsys.readouterr().err
    assert main([*command, "--env_id", "HalfCheetah-v5"]) == 2
    assert "(11,) as in the data" in capsys.readouterr().err


def test_without_a_settable_environment_the_rest_is_measured(run, capsys, monkeypatch):
    def halved(**kwargs):
        return gym.wrappers.TransformObservation(gym.make("Hopper-v5"), lambda observation: observation / 2, None)

    monkeypatch.setitem(gym.registry, "Halved-v0", EnvSpec("Halved-v0", entry_point=halved))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["env_id"] = "Halved-v0"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["diagnose", "--run", str(run), "--rollouts", "20", "--margin", "10"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "no simulator: got 'Halved-v0' whose observations do not hold its state" in printed
    fidelity = json.loads((run / "fidelity.json").read_text())
    assert "left_out" in fidelity["simulator"]
    assert fidelity["forward_model"].keys() == GROUPS


def test_filters_and_labels_are_judged_apart(run):
    command = ["diagnose", "--run", str(run), "--rollouts", "60", "--margin", "10"]
    assert main([*command, "--labels", "forward", "--max_inconsistency", "0.01"]) == 0
    fidelity = json.loads((run / "fidelity.json").read_text())
    errors, fates = fidelity["forward_model"], fidelity["fates"]
    # the steps that the world model ended are neither made before the filters nor after them
    made = 1 - fates["after_end"] - fates["non_finite"]
    assert sum(errors["before_filters"]["count"]) == pytest.approx(60 * 3 * made)
    assert sum(errors["after_filters"]["count"]) == pytest.approx(60 * 3 * fates["kept"])
    assert fates["inconsistent"] > 0
    assert fidelity["judges_itself"]
    assert max(errors["after_filters"]["observation"]) < 1e-9 < max(errors["real"]["observation"])


def test_pessimism_is_in_what_the_critics_learn_and_not_in_what_is_judged(run):
    command = ["diagnose", "--run", str(run), "--rollouts", "60", "--margin", "10"]
    found = []
    for pessimism in ("0", "50"):
        assert main([*command, "--pessimism", pessimism]) == 0
        found.append(json.loads((run / "fidelity.json").read_text()))
    plain, pessimistic = found
    assert pessimistic["simulator"] == plain["simulator"]
    assert pessimistic["td_targets"]["real"] == plain["td_targets"]["real"]
    for group in ("after_filters", "earlier"):
        assert pessimistic["td_targets"][group]["mean"] < plain["td_targets"][group]["mean"]
