"""Agents and callbacks of a user's own, with arguments and state of every usual kind, train, save, load and resume."""

import json
import sys
from pathlib import Path

import processes
import pytest
import torch
import yaml

from dawm.cli.main import main
from dawm.training.build import load_module

AGENTS = '''
import enum
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Literal

import numpy as np

import lightning as L
import torch
from torch import nn
from dawm.agents import OfflineAgent

class Kind(enum.Enum):
    RELU = "relu"
    TANH = "tanh"

@dataclass
class Sizes:
    hidden: int = 16

class Typed(OfflineAgent):
    def __init__(self, observation_size: int, action_size: int, kind: Kind = Kind.RELU, where: Path = Path("x"),
                 activation: type[nn.Module] = nn.ReLU, function: Callable = torch.relu, sizes: Sizes = Sizes(),
                 mode: Literal["a", "b"] = "a", dtype: Any = None, betas: tuple[float, float] = (0.9, 0.99),
                 optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.Adam):
        super().__init__(observation_size, action_size)
        self.save_hyperparameters()
        assert isinstance(kind, Kind) and isinstance(where, Path) and isinstance(sizes, Sizes) and callable(function)
        self.kind, self.sizes = kind, sizes
        layers = nn.Linear(observation_size, sizes.hidden), activation(), nn.Linear(sizes.hidden, action_size)
        self.body = nn.Sequential(*layers)
        self.optimizer = optimizer(self.body.parameters())

    def update(self, batch):
        batch = self.prepare(batch)
        loss = (self.act(batch.observations) - batch.actions).square().mean()
        self.minimize(loss, self.optimizer)
        return {"loss": loss.detach()}

    def act(self, observations, deterministic=True):
        return self.body(observations).tanh()

    def configure_optimizers(self):
        return [self.optimizer]

class Validated(Typed):
    """Logs an error of its own in validation."""
    def validation_loader(self, data, rank, world_size):
        return data.validation_transition_loader(rank, world_size)
    def validation_step(self, batch, batch_idx):
        self.log("agent/own", (self.act(batch.observations) - batch.actions).square().mean())

class Stopping(L.pytorch.callbacks.EarlyStopping):
    def __init__(self):
        super().__init__("agent/loss")

class Noisy(Typed):
    """Draws from NumPy and from Python."""
    def update(self, batch):
        kept = torch.from_numpy(np.random.rand(*batch.actions.shape) < random.random()).float()
        return super().update(replace(batch, actions=batch.actions * kept))

class Two(L.LightningModule):
    """A plain module with an actor and a critic, optimised by hand."""
    def __init__(self, observation_size: int, action_size: int):
        super().__init__()
        self.automatic_optimization = False
        self.actor, self.critic = nn.Linear(observation_size, action_size), nn.Linear(observation_size, 1)
        self.register_buffer("batches", torch.zeros(()))
    def configure_optimizers(self):
        return torch.optim.Adam(self.actor.parameters()), torch.optim.Adam(self.critic.parameters())
    def training_step(self, batch, batch_idx):
        cloning = self.act(batch.observations) - batch.actions
        errors = self.critic(batch.observations).squeeze(-1) - batch.rewards
        for optimizer, loss in zip(self.optimizers(), (cloning, errors)):
            optimizer.zero_grad()
            self.manual_backward(loss.square().mean())
            optimizer.step()
        self.batches += 1
    def act(self, observations):
        return self.actor(observations).tanh()
'''
CALLBACKS = '''
import os
from pathlib import Path

import lightning as L
import numpy as np
import torch

class Best(L.Callback):
    """Keeps what NumPy gives it, and dies at an update if the environment says so."""
    def __init__(self):
        self.best, self.curve = np.float64(-1e9), []
    def on_train_batch_end(self, trainer, module, *args):
        self.best = max(self.best, np.float64(trainer.global_step))
        self.curve.append(np.float32(self.best))
        if trainer.global_step >= 30 and os.environ.get("DIE"):
            os._exit(9)
    def state_dict(self):
        return {"best": self.best, "curve": np.array(self.curve), "where": Path("x")}
    def load_state_dict(self, state):
        self.best, self.curve = state["best"], list(state["curve"])

class Holder(L.Callback):
    def state_dict(self):
        return {"model": torch.nn.Linear(1, 1)}
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "typed_agents.py").write_text(AGENTS)
    (tmp_path / "own_callbacks.py").write_text(CALLBACKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("typed_agents", "own_callbacks"):
        sys.modules.pop(name, None)


def config_with(smoke: Path, agent: dict, *callbacks: str) -> str:
    config = yaml.safe_load(smoke.read_text())
    config["agent"] = agent
    config["stages"]["agent"]["callbacks"] += [{"class_path": name} for name in callbacks]
    smoke.write_text(yaml.safe_dump(config))
    return str(smoke)


def test_arguments_of_every_kind_are_saved_in_plain_forms(own, smoke):
    arguments = {"kind": "TANH", "where": "some/place", "activation": "torch.nn.Tanh", "sizes": {"hidden": 8}}
    path = config_with(smoke, {"class_path": "typed_agents.Typed", "init_args": arguments})
    options = ["--data.synthetic_fraction", "0"]
    assert main(["fit", "--config", path, *options]) == 0
    run = own / "run"
    agent = load_module(Path(json.loads((run / "results.json").read_text())["stages"]["agent"]["checkpoint"]))
    assert (agent.kind.name, agent.sizes.hidden, type(agent.body[1]).__name__) == ("TANH", 8, "Tanh")
    assert main(["evaluate", "--run", str(run), "--episodes", "1"]) == 0
    assert main(["fit", "--config", str(run / "config.yaml")]) == 0, "the written config is itself one"
    assert json.loads((run / "results.json").read_text())["stages"]["agent"]["reused"]


def test_an_edited_class_is_trained_anew(own, smoke):
    path = config_with(smoke, {"class_path": "typed_agents.Typed"})
    command = ["fit", "--config", path, "--data.synthetic_fraction", "0"]

    def reused():
        assert main(command) == 0
        return json.loads((own / "run" / "results.json").read_text())["stages"]["agent"]["reused"]

    assert (reused(), reused()) == (False, True)
    (own / "typed_agents.py").write_text(AGENTS + "# another loss")
    assert not reused()


def test_numpys_and_pythons_random_numbers_resume_too(own, smoke):
    path = config_with(smoke, {"class_path": "typed_agents.Noisy"})
    command = ["fit", "--config", path, "--data.synthetic_fraction", "0"]

    def weights(name, *lengths):
        for length in lengths:
            assert main([*command, "--output_dir", str(own / name), "--stages.agent.max_steps", length]) == 0
        stages = json.loads((own / name / "results.json").read_text())["stages"]
        return load_module(Path(stages["agent"]["checkpoint"])).state_dict()

    once, resumed = weights("once", "40"), weights("resumed", "20", "40")
    assert all(torch.equal(once[name], value) for name, value in resumed.items())


def test_a_callbacks_state_survives_a_kill(own, smoke):
    path = config_with(smoke, {"class_path": "TD3BC", "init_args": {"hidden": [16]}}, "own_callbacks.Best")
    command = ["fit", "--config", path, "--data.synthetic_fraction", "0"]
    environment = {"PYTHONPATH": str(own)}
    assert processes.run(command, own, environment | {"DIE": "1"}).returncode == 9
    done = processes.run(command, own, environment)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout


def test_state_that_no_checkpoint_can_hold_is_refused_before_training(own, smoke, capsys):
    path = config_with(smoke, {"class_path": "TD3BC", "init_args": {"hidden": [16]}}, "own_callbacks.Holder")
    assert main(["fit", "--config", path]) == 2
    assert "Holder.model of type Linear" in capsys.readouterr().err
    assert not list((own / "run").glob("*/*/last.ckpt"))


def test_a_plain_module_with_two_optimisers_makes_max_steps_training_steps(own, smoke, capsys):
    path = config_with(smoke, {"class_path": "typed_agents.Two"})
    options = ["--data.synthetic_fraction", "0", "--data.updates_per_step", "1"]
    assert main(["fit", "--config", path, *options]) == 0
    result = json.loads((own / "run" / "results.json").read_text())["stages"]["agent"]
    assert (result["steps"], result["unit"]) == (40, "training steps")
    assert load_module(Path(result["checkpoint"])).batches == 40
    assert "40 training steps" in capsys.readouterr().out


def test_early_stopping_that_could_never_stop_is_said_in_one_line(own, smoke, capsys):
    config = config_with(smoke, {"class_path": "typed_agents.Validated"})
    assert main(["fit", "--config", config, "--stages.agent.patience", "1"]) == 2
    expected = "error: --stages: got early stopping by agent/validation_error, which nothing logs"
    assert expected in " ".join(capsys.readouterr().err.split())
    config = config_with(smoke, {"class_path": "typed_agents.Typed"}, "typed_agents.Stopping")
    assert main(["fit", "--config", config]) == 2
    expected = "--stages.agent.callbacks: got 'Stopping', expected none that stops early, as Typed has no validation"
    assert expected in " ".join(capsys.readouterr().err.split())


def test_checkpoints_that_are_all_damaged_end_the_run_instead_of_starting_again(smoke, tmp_path, capsys):
    assert main(["fit", "--config", str(smoke)]) == 0
    (complete,) = (tmp_path / "run" / "agent").glob("*/complete.json")
    complete.unlink()
    for path in complete.parent.glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:1000])
    assert main(["fit", "--config", str(smoke)]) == 2
    line = capsys.readouterr().err
    assert "delete that folder to train agent from the start" in " ".join(line.split())
