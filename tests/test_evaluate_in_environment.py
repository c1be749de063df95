"""Evaluation by callback, in an environment whose returns are known on paper."""

from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from test_evaluation import Counter, still
from torch import nn
from torch.utils.data import DataLoader

from dawm.callbacks import EvaluateInEnvironment
from dawm.data.sources.scores import ReferenceScores
from dawm.errors import UserError
from dawm.evaluation.episodes import run_episodes


class Boring(L.LightningModule):
    """Counts K updates per training step and does nothing else."""

    def __init__(self, chunk: int = 4) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.chunk = chunk
        self.layer = nn.Linear(2, 1)
        self.draws: list[float] = []

    def training_step(self, batch, batch_idx):
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.total.completed += self.chunk
        self.draws.append(torch.rand(()).item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def act(self, observations):
        assert not self.training
        torch.rand(5)  # a policy that draws
        return still(observations)


class Data(L.LightningDataModule):
    """What the callback asks of the data module."""

    def __init__(self, reference=None, env_spec=Counter, updates_per_step: int = 4) -> None:
        super().__init__()
        self.reference, self.env_spec, self.updates_per_step = reference, env_spec, updates_per_step
        self.episodes = SimpleNamespace(action_space=Counter.action_space)
        self.max_episode_steps = None

    def train_dataloader(self):
        return DataLoader(torch.zeros(1000, 1), batch_size=1)


def fit(tmp_path, callback, data, max_steps, ckpt_path=None, agent=None):
    agent = Boring() if agent is None else agent
    trainer = L.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        callbacks=[] if callback is None else [callback],
        logger=CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(agent, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, agent


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers
def test_callback_fires_at_crossings_logs_and_leaves_training_alone(tmp_path):
    callback = EvaluateInEnvironment(every_n_steps=8, episodes=7, seed=0, num_envs=2)
    torch.manual_seed(3)
    trainer, agent = fit(tmp_path, callback, Data(ReferenceScores(0.0, 40.0, "paper")), 28)
    assert [entry["step"] for entry in callback.history] == [8, 16, 24]
    assert callback.history[0]["return"] == 20.0
    assert callback.history[0]["score"] == 50.0
    assert agent.training
    assert trainer.callback_metrics["eval/normalized_score"] == 50.0

    table = np.genfromtxt(trainer.logger.experiment.metrics_file_path, delimiter=",", names=True)
    assert table["step"].tolist() == [8, 16, 24]
    assert {"evalreturn", "evalnormalized_score", "evalnormalized_score_low", "evalnormalized_score_high"} < set(
        table.dtype.names
    )

    torch.manual_seed(3)
    _, undisturbed = fit(tmp_path, None, Data(), 28)
    assert agent.draws == undisturbed.draws


@pytest.mark.filterwarnings("ignore")
def test_callback_goes_on_where_a_checkpoint_left_it(tmp_path):
    callback = EvaluateInEnvironment(every_n_steps=8, episodes=2)
    trainer, _ = fit(tmp_path, callback, Data(updates_per_step=2), 10, agent=Boring(chunk=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = EvaluateInEnvironment(every_n_steps=8, episodes=2)
    # 10, 14, 18, 22: the multiple 16 is crossed, not met
    fit(tmp_path, resumed, Data(), 22, ckpt_path=tmp_path / "last.ckpt")
    assert [entry["step"] for entry in resumed.history] == [8, 18]
    assert resumed.history[0] == callback.history[0]
    assert "score" not in resumed.history[0]  # no reference


@pytest.mark.filterwarnings("ignore")
def test_callback_names_the_settings_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"EvaluateInEnvironment.every_n_steps: got 6, .*data.updates_per_step"):
        fit(tmp_path, EvaluateInEnvironment(every_n_steps=6), Data(), 12)
    with pytest.raises(UserError, match="data.env_id"):
        fit(tmp_path, EvaluateInEnvironment(every_n_steps=8), Data(env_spec=None), 12)
    named = EvaluateInEnvironment(every_n_steps=8, env_id="Nope-v0")
    with pytest.raises(UserError, match=r"--stages\.agent\.callbacks\.EvaluateInEnvironment\.env_id: got 'Nope-v0'"):
        fit(tmp_path, named, Data(), 12)
    with pytest.raises(UserError, match="--data.env_id: got 'Nope-v0'"):
        fit(tmp_path, EvaluateInEnvironment(every_n_steps=8), Data(env_spec="Nope-v0"), 12)
    with pytest.raises(UserError, match="episodes"):
        EvaluateInEnvironment(episodes=0)


def test_ranks_share_the_episodes():
    total = np.zeros(5)
    for rank in range(2):
        callback = EvaluateInEnvironment(episodes=5, seed=3)
        parts = []

        def reduce(tensor, reduce_op, parts=parts):
            parts.append(tensor)
            return tensor

        strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("cpu"))
        datamodule = Data()
        trainer = SimpleNamespace(global_rank=rank, world_size=2, strategy=strategy, datamodule=datamodule)
        callback.evaluate(trainer, Boring())
        total += parts[0].numpy()
        assert np.count_nonzero(parts[0]) == (3, 2)[rank]
    assert total.tolist() == run_episodes(still, Counter, range(3, 8)).tolist()
