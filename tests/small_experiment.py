"""Fixtures: a small data set and the smallest experiment on it, for tests that go through the command line."""

from pathlib import Path

import pytest
import yaml

from dawm.cli.main import main
from dawm.data.sources.embedded import build

STEPS = 1500


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """A Minari folder with a few rollouts of real Hopper."""
    folder = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        build("embedded/hopper/medium-replay", steps=STEPS)
    return folder


@pytest.fixture
def hopper(datasets, monkeypatch):
    """Id of the small data set; its folder is the one in use."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(datasets))
    return f"embedded/hopper/medium-replay-steps{STEPS}-v0"


@pytest.fixture
def smoke(hopper, tmp_path) -> Path:
    """Config of the smallest experiment with all three stages."""
    small = {"network": {"class_path": "ResidualMLP", "init_args": {"width": 16, "depth": 1}}}
    config = {
        "output_dir": str(tmp_path / "run"),
        "horizon": 3,
        "final_episodes": 2,
        "data": {"dataset": hopper, "horizon": "${horizon}", "batch_size": 16, "segment_batch_size": 16,
                 "updates_per_step": 5},
        "world_model": {"class_path": "DiffusionWorldModel",
                        "init_args": {"horizon": "${horizon}", "forward_members": 2, **small}},
        "inverse_dynamics": {"class_path": "InverseDynamics", "init_args": {"hidden": [16], "members": 2}},
        "agent": {"class_path": "TD3BC", "init_args": {"hidden": [16, 16]}},
        "trainer": {"accelerator": "cpu", "devices": 1},
        "stages": {
            "world_model": {"max_steps": 20, "validate_every_n_steps": 10, "checkpoint_every_n_steps": 10},
            "inverse_dynamics": {"max_steps": 20, "validate_every_n_steps": 10, "checkpoint_every_n_steps": 10},
            "agent": {
                "max_steps": 40,
                "log_every_n_steps": 5,
                "checkpoint_every_n_steps": 20,
                "callbacks": [
                    {"class_path": "RegenerateRollouts",
                     "init_args": {"every_n_steps": 10, "rollouts": 50, "margin": 10,
                                   "max_termination_drift": 1}},
                    {"class_path": "EvaluateInEnvironment", "init_args": {"every_n_steps": 20, "episodes": 2}},
                ],
            },
        },
    }  # fmt: skip
    path = tmp_path / "smoke.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="session")
def finished_run(datasets, tmp_path_factory) -> Path:
    """Folder of a finished run with a horizon of 3, for tests that only read it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    options = {
        "output_dir": folder,
        "horizon": 3,
        "data.horizon": 3,
        "data.dataset": f"embedded/hopper/medium-replay-steps{STEPS}-v0",
        "data.updates_per_step": 5,
        "world_model.horizon": 3,
        "world_model.network": "ResidualMLP",
        "world_model.network.width": 16,
        "world_model.forward_members": 2,
        "inverse_dynamics.hidden": [16],
        "inverse_dynamics.members": 2,
        "agent.hidden": [16, 16],
        "stages.world_model.max_steps": 20,
        "stages.inverse_dynamics.max_steps": 20,
        "stages.agent.max_steps": 10,
        "final_episodes": 1,
        "trainer.accelerator": "cpu",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(datasets))
        assert main(["fit", *(f"--{key}={value}" for key, value in options.items())]) == 0
    return folder
