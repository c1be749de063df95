"""Two CPU processes through all three stages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.ddp

PROBE = '''
"""An agent that keeps what its rank drew and ended with."""
import os, torch
from dawm.agents import TD3BC

class Probe(TD3BC):
    def on_train_start(self):
        self.rows, self.imagined = [], self.trainer.datamodule.synthetic.observations[:5].clone()

    def update(self, batch):
        self.rows.append(batch.observations[0].clone())
        return super().update(batch)

    def on_train_end(self):
        rank = self.trainer.global_rank
        callback = [c for c in self.trainer.callbacks if hasattr(c, "history")][0]
        torch.save(
            {"weights": self.state_dict(), "rows": torch.stack(self.rows), "imagined": self.imagined,
             "history": callback.history, "world_size": self.trainer.world_size},
            os.path.join(os.environ["PROBE_FOLDER"], f"rank{rank}.pt"),
        )
'''


SCRIPT = '''
"""The three stages and both callbacks by hand, as in the README, on two devices."""
import os, sys
import lightning as L
from dawm.callbacks import EvaluateInEnvironment, RegenerateRollouts
from dawm.data.module import TransitionDataModule
from dawm.inverse_dynamics import InverseDynamics
from dawm.world_model import DiffusionWorldModel
from probe_agent import Probe

def trainer(**settings):
    return L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=-1, logger=False, num_sanity_val_steps=0,
                     enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False, **settings)

L.seed_everything(0)
data = TransitionDataModule(sys.argv[1], horizon=3, batch_size=16, segment_batch_size=16, updates_per_step=5)
sizes = data.observation_size, data.action_size
world_model = DiffusionWorldModel(*sizes, horizon=3)
inverse_dynamics = InverseDynamics(*sizes, hidden=(16,), members=2)
agent = Probe(*sizes, hidden=(16, 16))
trainer(max_steps=20).fit(world_model, datamodule=data)
trainer(max_steps=20).fit(inverse_dynamics, datamodule=data)
regenerate = RegenerateRollouts(every_n_steps=10, rollouts=50, margin=10)
regenerate.connect(world_model, inverse_dynamics)
trainer(max_steps=40, callbacks=[regenerate, EvaluateInEnvironment(20, episodes=2)]).fit(agent, datamodule=data)
'''


def run(command: list[str], tmp_path: Path) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """Runs a command whose agent is the probe; what each of its two ranks kept."""
    (tmp_path / "probe_agent.py").write_text(PROBE)
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PROBE_FOLDER": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0]["world_size"] == 2
    for key, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][key]), f"{key} differs between the ranks"
    assert ranks[0]["rows"].shape[0] == 40
    assert not torch.equal(ranks[0]["rows"], ranks[1]["rows"]), "both ranks drew the same rows"
    assert not torch.equal(ranks[0]["imagined"], ranks[1]["imagined"]), "both ranks imagined the same rollouts"
    assert ranks[0]["history"] == ranks[1]["history"], "the ranks share one evaluation"
    assert len(ranks[0]["history"]) == 2
    return done, ranks


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_processes_train_one_agent(smoke, tmp_path, launcher):
    smoke.write_text(smoke.read_text().replace("class_path: TD3BC", "class_path: probe_agent.Probe"))
    command = [sys.executable, "-m", "dawm"]
    if launcher == "torchrun":
        command[2:2] = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["fit", "--config", str(smoke), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done, _ = run(command, tmp_path)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {name: stage["steps"] for name, stage in results["stages"].items()} == {
        "world_model": 20,
        "inverse_dynamics": 20,
        "agent": 40,
    }
    assert done.stdout.count("agent's score") == 1, "one table, from the first rank"


def test_two_processes_from_a_script(hopper, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run([sys.executable, str(tmp_path / "script.py"), hopper], tmp_path)
