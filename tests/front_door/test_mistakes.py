"""Users' mistakes end in one line that names the setting and the mend, with exit code 2 and no traceback."""

import json
import subprocess
import sys
import warnings

import h5py
import minari
import numpy as np
import pytest
import torch
import yaml
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from dawm.cli.main import main
from dawm.errors import UserError, require

RELABELLING = {"class_path": "RegenerateRollouts", "init_args": {"every_n_steps": 10, "labels": "forward"}}


@pytest.fixture
def mistake(smoke, capsys):
    """Runs `fit` with some options and returns the one line it prints."""

    def run(*options: str) -> str:
        assert main(["fit", "--config", str(smoke), *options]) == 2
        captured = capsys.readouterr().err.strip()
        assert captured.startswith("error: ")
        assert "\n" not in captured
        return captured

    return run


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--data.dataset", "embedded/hoper/medium"], ["data.dataset", "embedded/hopper/medium"]),
        (["--data.dataset", "/nowhere/x.hdf5"], ["data.dataset", "/nowhere/x.hdf5", "check the path"]),
        (["--data.synthetic_fraction", "1.5"], ["--data.synthetic_fraction", "from 0 to 1"]),
        (["--data.synthetic_fraction", "many"], ["--data.synthetic_fraction", "float", "many"]),
        (["--horizon", "100000"], ["--horizon", "longest episode"]),
        (["--world_model.horizon", "7"], ["--world_model.horizon: got 7, expected 3, the data's", "--horizon"]),
        (["--agent", "NoSuchAgent"], ["--agent", "'NoSuchAgent'", "module.Class"]),
        (["--agent", "no_such.module.Agent"], ["--agent", "no_such.module.Agent", "does not import"]),
        (["--world_model.network", "NoSuchNet"], ["--world_model.network", "'NoSuchNet'"]),
        (["--agent.alpha", "much"], ["--agent.alpha", "float", "much"]),
        (["--agent.alfa", "1"], ["alfa"]),
        (["--stages.agent.max_stepz", "1"], ["--stages.agent.max_stepz"]),
        (["--stages.world_model.ckpt_path", "/nowhere/last.ckpt"], ["/nowhere/last.ckpt", "no file"]),
        (["--output_dir", "/proc/nowhere"], ["output_dir", "/proc/nowhere"]),
        (["--trainer.devices", "0"], ["--trainer", "devices"]),
        (["--trainer.precision", "odd"], ["--trainer.precision", "odd"]),
        (["--data.updates_per_step", "3"], ["every_n_steps", "updates_per_step"]),
        (["--stages.agent.patience", "2"], ["stages.agent.patience: got 2, expected None, as TD3BC has no validation"]),
        (
            ["--stages.inverse_dynamics.validate_every_n_steps", "7"],
            ["got 7, expected a multiple of data.updates_per_"],
        ),
        (["--data.env_id", "NoSuchEnv-v0"], ["data.env_id", "NoSuchEnv"]),
        (["--config", "/nowhere/file.yaml"], ["/nowhere/file.yaml", "does not exist"]),
    ],
)
def test_wrong_setting(mistake, options, named):
    line = mistake(*options)
    for part in named:
        assert part in line


def test_a_plain_module_that_nothing_validates_or_that_cannot_act(mistake, tmp_path, monkeypatch):
    (tmp_path / "plain.py").write_text("import lightning\n\nclass Plain(lightning.LightningModule):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    line = mistake("--agent", "plain.Plain", "--stages.agent.patience", "2")
    assert "stages.agent.patience: got 2, expected None, as Plain has no validation" in line
    assert "--agent: got Plain, which has no act, expected an agent to score" in mistake("--agent", "plain.Plain")


def test_labels_that_no_model_will_give_are_refused_before_the_world_model_is_trained(mistake, tmp_path):
    line = mistake("--world_model.forward_members", "0", "--stages.agent.callbacks", json.dumps([RELABELLING]))
    assert "--world_model.forward_members: got 0" in line
    assert "RegenerateRollouts.labels" in line
    assert not (tmp_path / "run" / "world_model").exists()


def write_minari(dataset_id: str, observation_space, action_space, observation, action) -> None:
    buffer = EpisodeBuffer(
        observations=[observation] * 6,
        actions=[action] * 5,
        rewards=[0.0] * 5,
        terminations=[False] * 5,
        truncations=[False] * 4 + [True],
    )
    minari.create_dataset_from_buffers(
        dataset_id,
        [buffer],
        observation_space=observation_space,
        action_space=action_space,
        algorithm_name="none",
        author="test",
        author_email="test@example.org",
        code_permalink="none",
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("key", ["output_dir", "data.batch_size", "stages.agent.max_steps", "stages.agent.callbacks"])
def test_a_setting_left_empty_in_the_config(smoke, mistake, key):
    config = yaml.safe_load(smoke.read_text())
    *groups, last = key.split(".")
    group = config
    for name in groups:
        group = group[name]
    group[last] = None
    smoke.write_text(yaml.safe_dump(config))
    line = mistake()
    assert key in line
    assert "empty" in line or "got None" in line


@pytest.mark.parametrize(
    ("name", "observation_space", "action_space", "observation", "action"),
    [
        (
            "test/images-v0",
            spaces.Box(0, 255, (8, 8, 3), np.uint8),
            spaces.Box(-1, 1, (2,), np.float32),
            np.zeros((8, 8, 3), np.uint8),
            np.zeros(2, np.float32),
        ),
        (
            "test/discrete-v0",
            spaces.Box(-1, 1, (3,), np.float32),
            spaces.Discrete(4),
            np.zeros(3, np.float32),
            np.int64(1),
        ),
    ],
)
def test_spaces_that_the_models_cannot_take(
    mistake, tmp_path, monkeypatch, name, observation_space, action_space, observation, action
):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "odd"))
    (tmp_path / "odd").mkdir()
    write_minari(name, observation_space, action_space, observation, action)
    assert "data.dataset" in mistake("--data.dataset", name)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(mistake, tmp_path, bad):
    rewards = np.zeros(20, np.float32)
    rewards[7] = bad
    with h5py.File(tmp_path / "bad.hdf5", "w") as file:
        file["observations"] = np.random.randn(20, 11).astype(np.float32)
        file["next_observations"] = np.random.randn(20, 11).astype(np.float32)
        file["actions"] = np.zeros((20, 3), np.float32)
        file["rewards"] = rewards
        file["terminals"] = np.zeros(20, bool)
        file["timeouts"] = np.arange(20) == 19
    line = mistake("--data.dataset", str(tmp_path / "bad.hdf5"), "--data.env_id", "Hopper-v5")
    assert "rewards" in line
    assert "7" in line


def test_checkpoint_of_another_data_set(mistake, smoke, tmp_path):
    assert main(["fit", "--config", str(smoke), "--stages.agent.max_steps", "5"]) == 0
    (checkpoint,) = (tmp_path / "run" / "world_model").glob("*/last.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    content["dawm_origin"] |= {"fingerprint": "of other data", "dataset": "mujoco/hopper/expert-v0"}
    torch.save(content, tmp_path / "other.ckpt")
    line = mistake("--stages.world_model.ckpt_path", str(tmp_path / "other.ckpt"))
    assert "mujoco/hopper/expert-v0" in line
    assert "stages.world_model.ckpt_path" in line


def test_malicious_or_damaged_checkpoint_is_refused(mistake, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"state_dict": Malicious()}, tmp_path / "evil.ckpt")
    assert "evil.ckpt" in mistake("--stages.world_model.ckpt_path", str(tmp_path / "evil.ckpt"))
    assert not (tmp_path / "owned").exists()
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "evil.ckpt").read_bytes()[:100])
    assert "cut.ckpt" in mistake("--stages.world_model.ckpt_path", str(tmp_path / "cut.ckpt"))


def test_exit_code_and_no_traceback_in_a_process_of_its_own(smoke):
    command = [sys.executable, "-m", "dawm", "fit", "--config", str(smoke), "--horizon", "abc"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_a_long_value_leaves_room_for_what_to_do_about_it():
    with pytest.raises(UserError, match=r"^--data.dataset: got 'x{119}, expected a short name; shorten it$"):
        require("data.dataset", 1000 * "x", False, "a short name", "shorten it")


def test_help_and_version():
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit) as exit_:
            main([option])
        assert exit_.value.code == 0


def test_a_warning_is_one_line_of_any_command(monkeypatch, capsys):
    monkeypatch.setattr("dawm.cli.main._run", lambda *args: warnings.warn("of a library", stacklevel=1))
    main(["datasets", "list"])
    assert capsys.readouterr().err == "warning: of a library\n"


def test_apples_gpu_has_no_double_precision(smoke, monkeypatch, capsys):
    monkeypatch.setattr("dawm.training.trainer.MPSAccelerator.is_available", lambda: True)
    command = ["fit", "--config", str(smoke), "--trainer.accelerator"]
    assert main([*command, "mps"]) == 2
    assert "--trainer.accelerator: got 'mps', expected cpu" in capsys.readouterr().err
    assert main([*command, "auto"]) == 0
    assert "world_model: trains on the CPU" in capsys.readouterr().out


def test_a_module_that_ddp_stumbles_over_is_reported_with_the_strategy_it_needs(smoke, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("enable detection by passing find_unused_parameters=True")

    monkeypatch.setattr("dawm.training.experiment.Experiment.run", fail)
    assert main(["fit", "--config", str(smoke)]) == 2
    assert "--trainer.strategy: got ddp, expected ddp_find_unused_parameters_true" in capsys.readouterr().err
