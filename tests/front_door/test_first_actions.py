"""A whole run in which everything that can be chosen in the synthesis is chosen."""

import json
from pathlib import Path

import torch
import yaml

from dawm.cli.main import main
from dawm.training.checkpoints import read_checkpoint

CHOSEN = {
    **{"every_n_steps": 10, "rollouts": 60, "margin": 10, "max_termination_drift": 1},
    **{"labels": "forward", "first_action": "policy", "max_inconsistency": 1.0, "max_forward_disagreement": 1.0},
    "starts": {"class_path": "AdvantageWeights"},
    "target_return": {"class_path": "FeasibleReturn", "init_args": {"expectile": 0.8}},
}


def weights(run: Path) -> dict[str, torch.Tensor]:
    results = json.loads((run / "results.json").read_text())
    return read_checkpoint(results["stages"]["agent"]["checkpoint"])["state_dict"]


def test_a_run_with_every_choice_made_ends_the_same_interrupted_or_not(smoke, tmp_path, monkeypatch):
    """Two agents, each with its own first actions; the interrupted run stops between two refills."""
    monkeypatch.setattr("dawm.synthesis.targets.FeasibleReturn.updates", 20)
    config = yaml.safe_load(smoke.read_text())
    config["stages"]["agent"]["callbacks"] = [{"class_path": "RegenerateRollouts", "init_args": CHOSEN}]
    smoke.write_text(yaml.safe_dump(config))
    command = ["fit", "--config", str(smoke), "--seeds", "2", "--final_episodes", "1"]
    assert main([*command, "--output_dir", str(tmp_path / "whole")]) == 0
    for steps in (25, 40):
        assert main([*command, "--output_dir", str(tmp_path / "parts"), "--stages.agent.max_steps", str(steps)]) == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    command = ["synthesize", "--run", str(tmp_path / "whole"), "--output", "imagined/chosen-v0", "--transitions", "20"]
    assert main(command) == 0
