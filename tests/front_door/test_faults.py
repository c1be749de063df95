"""Signals, damaged checkpoints and numbers that are not finite."""

import json
import signal
import subprocess
from pathlib import Path

import processes
import pytest
import torch
import yaml

from dawm.cli.main import main
from dawm.training import checkpoints, experiment
from dawm.training.checkpoints import LAYOUT, ORIGIN

SIGNALLER = '''
import os
import lightning as L


class Signal(L.Callback):
    """Sends its own process a signal, once."""

    def __init__(self, number: int, at: int):
        self.number, self.at = number, at

    def on_train_batch_start(self, trainer, *args):
        marker = os.environ["SIGNAL_MARKER"]
        if trainer.global_step >= self.at and not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), self.number)
'''

BURST = """
from dawm.agents import TD3BC


class Burst(TD3BC):
    def update(self, batch):
        metrics = super().update(batch)
        if self.update_index >= 30:
            metrics["critic_loss"] = metrics["critic_loss"] * float("nan")
        return metrics
"""


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    results = json.loads((run / "results.json").read_text())
    return torch.load(results["stages"][stage]["checkpoint"], weights_only=True)["state_dict"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first_and_the_run_resumes_as_if_nothing_had_been(smoke, tmp_path, number):
    (tmp_path / "signaller.py").write_text(SIGNALLER)
    config = yaml.safe_load(smoke.read_text())
    # at update 10 the updates under way end where a validation is due
    config["stages"]["inverse_dynamics"]["callbacks"] = [
        {"class_path": "signaller.Signal", "init_args": {"number": int(number), "at": 5}}
    ]
    config["stages"]["inverse_dynamics"]["checkpoint_every_n_steps"] = 1000
    smoke.write_text(yaml.safe_dump(config))

    def run(folder: str) -> subprocess.CompletedProcess:
        environment = {"SIGNAL_MARKER": str(tmp_path / f"{folder}.sent"), "PYTHONPATH": str(tmp_path)}
        command = ["fit", "--config", str(smoke), "--output_dir", str(tmp_path / folder)]
        return processes.run(command, tmp_path, environment)

    stopped = run("stopped")
    assert stopped.returncode == 130
    assert "the same command resumes" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    (checkpoint,) = (tmp_path / "stopped" / "inverse_dynamics").glob("*/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 10
    assert run("stopped").returncode == 0
    (tmp_path / "whole.sent").touch()
    assert run("whole").returncode == 0
    for stage in ("world_model", "inverse_dynamics", "agent"):
        whole, resumed = weights(tmp_path / "whole", stage), weights(tmp_path / "stopped", stage)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize(("damage", "finished"), [("flipped", False), ("cut", True), ("empty", False)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(smoke, tmp_path, capsys, damage, finished):
    assert main(["fit", "--config", str(smoke)]) == 0
    before = weights(tmp_path / "run", "agent")
    folder = Path(json.loads((tmp_path / "run" / "results.json").read_text())["stages"]["agent"]["checkpoint"]).parent
    if not finished:
        (folder / "complete.json").unlink()
    content = bytearray((folder / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit, which torch alone would not notice
    size = {"flipped": len(content), "cut": len(content) // 2, "empty": 0}[damage]
    (folder / "last.ckpt").write_bytes(content[:size])
    capsys.readouterr()
    assert main(["fit", "--config", str(smoke)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "last.ckpt (damaged" in printed
    assert "previous.ckpt" in printed
    after = weights(tmp_path / "run", "agent")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    smoke, tmp_path, monkeypatch, capsys
):
    (tmp_path / "burst_agent.py").write_text(BURST)
    monkeypatch.syspath_prepend(str(tmp_path))
    smoke.write_text(smoke.read_text().replace("class_path: TD3BC", "class_path: burst_agent.Burst"))
    assert main(["fit", "--config", str(smoke)]) == 2
    line = capsys.readouterr().err
    assert "--agent: got NaN or infinite agent/critic_loss" in line
    assert "between updates 30 and 35" in line
    (checkpoint,) = (tmp_path / "run" / "agent").glob("*/last.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    assert content["global_step"] == 20
    assert all(value.isfinite().all() for value in content["state_dict"].values() if value.is_floating_point())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({ORIGIN: {"dawm": "0.1.0"}, "state_dict": {}}, "parameter layout 1, not"),
        (torch.zeros(3), "a Tensor), expected a checkpoint"),
    ],
)
def test_a_checkpoint_that_would_load_and_mean_nothing_is_refused(smoke, tmp_path, capsys, content, reason):
    torch.save(content, tmp_path / "other.ckpt")
    option = ["--stages.world_model.ckpt_path", str(tmp_path / "other.ckpt")]
    assert main(["fit", "--config", str(smoke), *option]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ")
    assert "\n" not in line
    assert "other.ckpt" in line
    assert reason in line


def test_a_stage_of_another_layout_is_trained_again_not_reused(smoke, tmp_path, monkeypatch):
    for layout in (LAYOUT, LAYOUT + 1):
        monkeypatch.setattr(checkpoints, "LAYOUT", layout)
        monkeypatch.setattr(experiment, "LAYOUT", layout)
        assert main(["fit", "--config", str(smoke)]) == 0
        stages = json.loads((tmp_path / "run" / "results.json").read_text())["stages"]
        assert not any(stage["reused"] for stage in stages.values())
