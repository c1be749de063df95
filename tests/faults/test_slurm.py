"""SLURM's requeue signal: saved between two updates, requeued by Lightning's own handler, gone on with exactly."""

import json
import os
import subprocess

import processes
import torch
import yaml

SLURM = {
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "localhost",
}
SCONTROL = """#!/bin/sh
echo "$@" >> "$SCONTROL_LOG"
"""
SIGNALLER = '''
import os, signal
from dawm.agents import TD3BC


class Signalled(TD3BC):
    """SLURM's signal comes in the middle of the updates of one training step, once."""

    def update(self, batch):
        log = os.environ["SCONTROL_LOG"]
        if self.update_index == 22 and not os.path.exists(log):
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().update(batch)
'''


def test_the_requeue_signal_saves_requeues_and_the_same_command_goes_on(smoke, tmp_path):
    (tmp_path / "signalled.py").write_text(SIGNALLER)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(SCONTROL)
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    config = yaml.safe_load(smoke.read_text())
    config["agent"]["class_path"] = "signalled.Signalled"
    config["stages"]["agent"]["checkpoint_every_n_steps"] = 1000
    smoke.write_text(yaml.safe_dump(config))
    log = tmp_path / "requeued"

    def run(folder: str) -> subprocess.CompletedProcess:
        environment = SLURM | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "SCONTROL_LOG": str(log),
            "PYTHONPATH": str(tmp_path),
        }
        command = ["fit", "--config", str(smoke), "--output_dir", str(tmp_path / folder)]
        return processes.run(command, tmp_path, environment)

    stopped = run("stopped")
    assert log.read_text() == "requeue 4711\n"
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "stopped after update 25" in stopped.stderr
    assert not list((tmp_path / "stopped").rglob("hpc_ckpt*")), "a later validation would load it"
    (checkpoint,) = (tmp_path / "stopped" / "agent").glob("*/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 25
    assert run("stopped").returncode == 0
    assert run("whole").returncode == 0
    assert log.read_text() == "requeue 4711\n"
    results = [json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("stopped", "whole")]
    assert results[0]["agent"] == results[1]["agent"]
    states = [torch.load(r["stages"]["agent"]["checkpoint"], weights_only=True)["state_dict"] for r in results]
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
