"""Two CPU processes through all three stages."""

import json
import os
import subprocess
import sys

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


def test_two_processes_train_one_agent(smoke, tmp_path):
    (tmp_path / "probe_agent.py").write_text(PROBE)
    environment = os.environ | {"PROBE_FOLDER": str(tmp_path), "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    smoke.write_text(smoke.read_text().replace("class_path: TD3BC", "class_path: probe_agent.Probe"))
    command = [sys.executable, "-m", "dawm", "fit", "--config", str(smoke), "--trainer.devices", "2",
               "--trainer.strategy", "ddp"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0]["world_size"] == 2
    for key, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][key]), f"{key} differs between the ranks"
    assert not torch.equal(ranks[0]["rows"], ranks[1]["rows"]), "both ranks drew the same rows"
    assert not torch.equal(ranks[0]["imagined"], ranks[1]["imagined"]), "both ranks imagined the same rollouts"
    assert ranks[0]["history"] == ranks[1]["history"], "the ranks share one evaluation"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {name: stage["steps"] for name, stage in results["stages"].items()} == {
        "world_model": 20,
        "inverse_dynamics": 20,
        "agent": 40,
    }
    assert done.stdout.count("agent's score") == 1, "one table, from the first rank"
