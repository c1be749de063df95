"""`fit` from end to end, through the command line's own function."""

import json
from pathlib import Path

import pytest
import torch

from dawm.agents import TD3BC
from dawm.cli.curves import read_logs
from dawm.cli.main import main
from dawm.data import progress
from dawm.data.module import TransitionDataModule
from dawm.errors import UserError
from dawm.training.build import load_module
from dawm.world_model import DiffusionWorldModel


def results_of(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    return torch.load(results_of(run)["stages"][stage]["checkpoint"], weights_only=True)["state_dict"]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.pictures
def test_fit_trains_all_stages_and_leaves_what_it_promises(smoke, tmp_path, capsys):
    assert main(["fit", "--config", str(smoke)]) == 0
    run = tmp_path / "run"
    results = results_of(run)
    assert {"mean", "low", "high"} <= results["agent"]["normalized_score"].keys()
    assert results["agent"]["normalized_score"]["low"] <= results["agent"]["normalized_score"]["mean"]
    assert isinstance(results["data"]["normalized_score"], float)
    assert len(results["agent"]["returns"]) == 2
    for stage, steps in (("world_model", 20), ("inverse_dynamics", 20), ("agent", 40)):
        assert results["stages"][stage]["steps"] == steps
        assert results["stages"][stage]["seconds"] > 0
        checkpoint = torch.load(results["stages"][stage]["checkpoint"], weights_only=True)
        assert checkpoint["global_step"] == steps, "updates and Lightning's counter must agree"
    assert (run / "curves.png").stat().st_size > 0
    assert (run / "config.yaml").exists()
    table = capsys.readouterr().out
    for line in ("agent's score", "data's mean score", "first-step observation", "squared action", "stage agent"):
        assert line in table

    agent_folder = Path(results["stages"]["agent"]["checkpoint"]).parent
    assert read_logs(agent_folder)["eval/return"][0] == [20, 40]
    assert read_logs(agent_folder)["synthetic/kept"][0] == [0, 10, 20, 30]
    assert read_logs(agent_folder)["agent/critic_loss"][0][-1] == 40
    wm_folder = Path(results["stages"]["world_model"]["checkpoint"]).parent
    assert read_logs(wm_folder)["world_model/forward_observation_error/step_3"][0] == [10, 20]

    # each stage's checkpoint loads alone, ours and Lightning's way
    agent = load_module(Path(results["stages"]["agent"]["checkpoint"]))
    again = TD3BC.load_from_checkpoint(results["stages"]["agent"]["checkpoint"], weights_only=True)
    assert equal(agent.state_dict(), again.state_dict())
    world_model = DiffusionWorldModel.load_from_checkpoint(
        results["stages"]["world_model"]["checkpoint"], weights_only=True
    )
    assert world_model.network.embedding is not None
    assert sum(p.numel() for p in world_model.network.parameters()) < 20_000, "the small network of the config"

    # the written config is itself a config, and a complete run is reused
    assert main(["fit", "--config", str(run / "config.yaml")]) == 0
    assert all(stage["reused"] for stage in results_of(run)["stages"].values())


def test_same_seed_same_run_and_changed_setting_trains_beside(smoke, tmp_path):
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    assert main(["fit", "--config", str(smoke), "--output_dir", first]) == 0
    assert main(["fit", "--config", str(smoke), "--output_dir", second]) == 0
    for stage in ("world_model", "inverse_dynamics", "agent"):
        assert equal(weights(Path(first), stage), weights(Path(second), stage))
    before = weights(Path(first), "agent")
    assert main(["fit", "--config", str(smoke), "--output_dir", first, "--agent.alpha", "1.0"]) == 0
    stages = results_of(Path(first))["stages"]
    assert stages["world_model"]["reused"]
    assert not stages["agent"]["reused"]
    assert len(list((Path(first) / "agent").glob("*/last.ckpt"))) == 2
    assert not equal(before, weights(Path(first), "agent"))
    # the share of imagined rows concerns the agent alone
    assert main(["fit", "--config", str(smoke), "--output_dir", first, "--data.synthetic_fraction", "0.25"]) == 0
    reused = {name: stage["reused"] for name, stage in results_of(Path(first))["stages"].items()}
    assert reused == {"world_model": True, "inverse_dynamics": True, "agent": False}


def test_results_do_not_depend_on_updates_per_step(smoke, tmp_path):
    for k in ("5", "10"):
        options = ["--output_dir", str(tmp_path / k), "--data.updates_per_step", k]
        assert main(["fit", "--config", str(smoke), *options]) == 0
    for stage in ("world_model", "inverse_dynamics", "agent"):
        assert equal(weights(tmp_path / "5", stage), weights(tmp_path / "10", stage))


def test_fraction_zero_is_the_real_only_agent(smoke, tmp_path):
    """With fraction 0 nothing is imagined, and the agent is the one trained without the callback at all."""
    options = ["--data.synthetic_fraction", "0", "--stages.world_model.max_steps", "20"]
    assert main(["fit", "--config", str(smoke), "--output_dir", str(tmp_path / "zero"), *options]) == 0
    assert list(results_of(tmp_path / "zero")["stages"]) == ["agent"]
    bare = ["--output_dir", str(tmp_path / "bare"), "--stages.agent.callbacks", "[]", *options]
    assert main(["fit", "--config", str(smoke), *bare]) == 0
    assert equal(weights(tmp_path / "zero", "agent"), weights(tmp_path / "bare", "agent"))


def test_rows_by_weight_and_losses_on_real_rows_concern_the_agent_alone_and_episodes_all(smoke, tmp_path):
    run = tmp_path / "run"
    options = [
        "fit",
        "--config",
        str(smoke),
        "--data.real_weights",
        "AdvantageWeights",
        "--agent.clone_real_only",
        "true",
    ]
    assert main([*options, "--agent.scale_on_real", "true", "--data.real_weights.temperature", "0.5"]) == 0
    before = weights(run, "agent")
    assert main([*options, "--data.real_weights.temperature", "5"]) == 0
    reused = {name: stage["reused"] for name, stage in results_of(run)["stages"].items()}
    assert reused == {"world_model": True, "inverse_dynamics": True, "agent": False}
    assert not equal(before, weights(run, "agent"))
    whole = results_of(run)["data"]
    assert main([*options, "--data.episode_fraction", "0.5"]) == 0
    assert not any(stage["reused"] for stage in results_of(run)["stages"].values())
    assert results_of(run)["data"]["episodes"] == round(whole["episodes"] / 2)
    output = ["--output", "imagined/hopper/half-v0", "--transitions", "100", "--margin", "10"]
    assert main(["synthesize", "--run", str(run), *output]) == 0


def test_a_loss_over_real_rows_without_any_is_refused_before_anything_is_trained(smoke, tmp_path, capsys):
    options = ["--agent.clone_real_only", "true", "--data.synthetic_fraction", "1"]
    assert main(["fit", "--config", str(smoke), *options]) == 2
    assert "--data.synthetic_fraction: got 1.0, expected one that leaves real rows" in capsys.readouterr().err
    assert not (tmp_path / "run" / "world_model").exists()


@pytest.mark.parametrize("fraction", ["0.5", "1.0"])
def test_iql_learns_from_mixed_and_imagined_data(smoke, tmp_path, fraction):
    options = ["--agent", "IQL", "--agent.hidden", "[16,16]", "--data.synthetic_fraction", fraction]
    assert main(["fit", "--config", str(smoke), *options]) == 0
    assert results_of(tmp_path / "run")["agent"]["class"].endswith("IQL")


def test_shared_number_on_the_command_line_reaches_all_its_users(smoke, tmp_path):
    assert main(["fit", "--config", str(smoke), "--horizon", "2"]) == 0
    checkpoint = results_of(tmp_path / "run")["stages"]["world_model"]["checkpoint"]
    assert load_module(Path(checkpoint)).horizon == 2


def test_given_checkpoint_is_used_instead_of_training(smoke, tmp_path):
    assert main(["fit", "--config", str(smoke)]) == 0
    checkpoint = results_of(tmp_path / "run")["stages"]["world_model"]["checkpoint"]
    options = ["--output_dir", str(tmp_path / "other"), "--stages.world_model.ckpt_path", checkpoint]
    assert main(["fit", "--config", str(smoke), *options]) == 0
    assert not (tmp_path / "other" / "world_model").exists()
    assert results_of(tmp_path / "other")["stages"]["world_model"]["checkpoint"] == checkpoint


def test_seeds_train_side_by_side_and_each_is_scored(smoke, tmp_path, capsys):
    assert main(["fit", "--config", str(smoke), "--seeds", "3"]) == 0
    returns = results_of(tmp_path / "run")["agent"]["returns"]
    assert [len(episodes) for episodes in returns] == [2, 2, 2]
    assert len({tuple(episodes) for episodes in returns}) == 3
    assert "3 seeds" in capsys.readouterr().out
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--episodes", "2"]) == 0
    assert "2 episodes each, 3 seeds" in capsys.readouterr().out


def test_quiet_reaches_the_bars_of_reading_and_building_data(smoke, monkeypatch):
    seen = []

    def setup(self, stage=None):
        seen.append(progress.quiet)
        raise UserError("enough")

    monkeypatch.setattr(TransitionDataModule, "setup", setup)
    for quiet in ("true", "false"):
        assert main(["fit", "--config", str(smoke), "--quiet", quiet]) == 2
    assert seen == [True, False]
