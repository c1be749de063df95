"""A run killed at any moment and started again ends as one that never stopped."""

import json
import os
import subprocess
import sys

import torch
import yaml

KILLER = '''
import os, signal
import lightning as L


class Kill(L.Callback):
    """Kills its own process, once, as a pulled plug would."""

    def __init__(self, stage: str, at: int):
        self.stage, self.at = stage, at

    def on_train_batch_end(self, trainer, *args):
        marker = os.path.join(os.environ["KILLER_FOLDER"], self.stage)
        if trainer.global_step >= self.at and not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
'''
KILLS = {"world_model": 15, "inverse_dynamics": 20, "agent": 35}


def test_killed_in_every_stage_and_resumed_equals_never_stopped(smoke, tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    config = yaml.safe_load(smoke.read_text())
    for stage, at in KILLS.items():
        kill = {"class_path": "killer.Kill", "init_args": {"stage": stage, "at": at}}
        config["stages"][stage].setdefault("callbacks", []).append(kill)
    smoke.write_text(yaml.safe_dump(config))

    def run(folder: str) -> int:
        (tmp_path / folder).mkdir(exist_ok=True)
        environment = os.environ | {"KILLER_FOLDER": str(tmp_path / folder), "PYTHONPATH": str(tmp_path)}
        command = [
            sys.executable,
            "-m",
            "dawm",
            "fit",
            "--config",
            str(smoke),
            "--output_dir",
            str(tmp_path / folder / "run"),
        ]
        return subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode

    assert [run("killed") for _ in range(4)] == [-9, -9, -9, 0]
    for stage in KILLS:
        (tmp_path / "whole").mkdir(exist_ok=True)
        (tmp_path / "whole" / stage).touch()
    assert run("whole") == 0

    results = [json.loads((tmp_path / folder / "run" / "results.json").read_text()) for folder in ("killed", "whole")]
    assert results[0]["agent"] == results[1]["agent"]
    for stage in KILLS:
        killed, whole = (torch.load(result["stages"][stage]["checkpoint"], weights_only=True) for result in results)
        assert killed["global_step"] == whole["global_step"]
        for key, value in whole["state_dict"].items():
            assert torch.equal(value, killed["state_dict"][key]), f"{stage}: {key}"
        first, second = (str(checkpoint["optimizer_states"]) for checkpoint in (killed, whole))
        assert first == second
