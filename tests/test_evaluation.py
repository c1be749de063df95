"""Evaluation by function and by callback, in an environment whose returns are known on paper."""

from types import SimpleNamespace

import gymnasium as gym
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from dawm.callbacks import EvaluateInEnvironment
from dawm.data.sources.scores import ReferenceScores
from dawm.errors import UserError
from dawm.evaluation.episodes import bootstrap_interval, evaluate, run_episodes, summarize


class Counter(gym.Env):
    """Starts at seed % 7 and pays the action at each step; truncated after seed % 7 + 1 steps, or by an action of 9."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.array([1.0], np.float32), np.array([9.0], np.float32))
    made: list["Counter"] = []

    def __init__(self, as_dict: bool = False) -> None:
        if as_dict:
            part = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
            self.observation_space = gym.spaces.Dict({"left": part, "step": part})
        self.as_dict = as_dict
        self.closed = False
        self.over = True
        Counter.made.append(self)

    def _observation(self):
        if self.as_dict:
            return {"left": np.array([float(self.left)]), "step": np.array([float(self.steps)])}
        return np.array([self.left, self.steps], dtype=np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.steps, self.over = seed % 7 + 1, 0, False
        return self._observation(), {}

    def step(self, action):
        assert not self.over, "stepped behind an episode's end"
        assert action.dtype == np.float32
        self.left, self.steps = self.left - 1, self.steps + 1
        terminated, truncated = bool(action[0] == 9), self.left == 0
        self.over = terminated or truncated
        return self._observation(), float(action[0]), terminated, truncated, {}

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def _clean():
    Counter.made.clear()
    torch.manual_seed(0)


def still(observations):
    """Action 0, which is 5 in the environment's units."""
    return torch.zeros(len(observations), 1)


# Functions


@pytest.mark.parametrize("num_envs", [1, 2, 4, 20])
def test_returns_of_seeded_episodes(num_envs):
    returns = run_episodes(still, Counter, range(5, 14), num_envs)
    assert returns.tolist() == [5.0 * (seed % 7 + 1) for seed in range(5, 14)]
    assert len(Counter.made) == min(num_envs, 9)
    assert all(env.closed for env in Counter.made)


def test_actions_are_scaled_to_the_box_and_clipped():
    assert run_episodes(lambda o: torch.full((len(o), 1), -0.5), Counter, [0], 1).tolist() == [3.0]
    assert run_episodes(lambda o: torch.full((len(o), 1), -2.0), Counter, [0], 1).tolist() == [1.0]
    # 9 ends the episode at once
    assert run_episodes(lambda o: torch.full((len(o), 1), 2.0), Counter, [6], 1).tolist() == [9.0]


def test_dict_observations_are_flattened_to_float32():
    seen = []

    def act(observations):
        seen.append(observations[0])
        return still(observations)

    run_episodes(act, lambda: Counter(as_dict=True), [2], 1)
    torch.testing.assert_close(torch.stack(seen), torch.tensor([[3.0, 0.0], [2.0, 1.0], [1.0, 2.0]]))


def test_environments_are_closed_after_an_error():
    with pytest.raises(RuntimeError):
        run_episodes(lambda o: (_ for _ in ()).throw(RuntimeError()), Counter, range(3), 3)
    assert len(Counter.made) == 3
    assert all(env.closed for env in Counter.made)


@pytest.mark.parametrize("environment", ["NoSuchEnvironment-v0", "no_such_module:Env-v0", gym.spec("CartPole-v1")])
def test_unusable_environment_is_a_user_error(environment):
    with pytest.raises(UserError, match="data.env_id"):
        run_episodes(still, environment, [0])


def test_bootstrap_interval():
    assert bootstrap_interval([4.0]) == (4.0, 4.0)
    values = np.random.default_rng(1).normal(10, 2, size=400)
    low, high = bootstrap_interval(values)
    # the normal approximation: mean plus or minus 1.96 standard errors
    half_width = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=0.02)
    assert bootstrap_interval(values) == (low, high)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_summary_gives_scores_where_there_is_a_reference():
    result = evaluate(still, Counter, episodes=7, seed=0, normalize=ReferenceScores(0.0, 40.0, "paper").normalize)
    assert result.mean_return == 20.0
    assert result.score == 50.0
    assert result.score_low == pytest.approx(result.low * 2.5)
    assert result.score_high == pytest.approx(result.high * 2.5)
    assert result.low < 20 < result.high
    assert summarize(np.array([1.0, 2.0])).score is None


# Callback


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
        datamodule = SimpleNamespace(env_spec=Counter, reference=None)
        trainer = SimpleNamespace(global_rank=rank, world_size=2, strategy=strategy, datamodule=datamodule)
        callback.evaluate(trainer, Boring())
        total += parts[0].numpy()
        assert np.count_nonzero(parts[0]) == (3, 2)[rank]
    assert total.tolist() == run_episodes(still, Counter, range(3, 8)).tolist()
