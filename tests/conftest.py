"""What all tests share: seeds, one thread, no touching of the user's data, a data set whose rows know who they are."""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import h5py
import lightning as L
import numpy as np
import pytest
import torch

from dawm.data.transitions import Transitions
from dawm.nn.matmul import prefer_onednn
from dawm.training.updates import UpdateModule

pytest_plugins = ["small_experiment", "own_environments"]  # beside this file

prefer_onednn()  # as the command line does: which tests ran before must not change how the others round

LENGTHS = (5, 3, 7, 4, 1, 6)
TERMINATED = (True, False, True, False, False, True)


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("DAWM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of processes that a test starts, beside those of other tests
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Runs of `fit` within a test draw nothing, which takes a second each; the tests of pictures do."""
    if "pictures" not in request.keywords:
        for name in ("draw_curves", "write_report"):
            monkeypatch.setattr(f"dawm.cli.report.{name}", lambda *args: None)


@pytest.fixture
def write_dataset(tmp_path):
    """Writes a D4RL-layout file in which every field says which row it is in.

    Row i of episode e: observation (i, e), action i / 1000, reward i + 0.25, next observation (i + 1, e). Rows count
    from ``first``.
    """

    def write(
        lengths: Sequence[int] = LENGTHS, terminated: Sequence[bool] = TERMINATED, next_observations=True, first=0
    ) -> str:
        rows = first + np.arange(sum(lengths), dtype=np.float32)
        episode = np.repeat(np.arange(len(lengths)), lengths).astype(np.float32)
        last = first + np.cumsum(lengths) - 1
        path = tmp_path / f"rows-{len(list(tmp_path.iterdir()))}.hdf5"
        with h5py.File(path, "w") as file:
            file["observations"] = np.stack([rows, episode], axis=1)
            file["actions"] = rows[:, None] / 1000
            file["rewards"] = rows + 0.25
            file["terminals"] = np.isin(rows, last[list(terminated)])
            file["timeouts"] = np.isin(rows, last[~np.array(terminated)])
            if next_observations:
                file["next_observations"] = np.stack([rows + 1, episode], axis=1)
        return str(path)

    return write


@pytest.fixture
def dataset(write_dataset):
    """Six episodes of 26 rows in all: three end with a termination, three are truncated."""
    return write_dataset()


@pytest.fixture
def make_trainer(tmp_path):
    """A silent Trainer on the CPU."""

    def make(max_steps: int, **kwargs) -> L.Trainer:
        settings = {
            "accelerator": "cpu",
            "max_epochs": -1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(max_steps=max_steps, **settings | kwargs)

    return make


def update_each(module: UpdateModule, batches: Iterable[Any]) -> None:
    """One update on each batch, numbered from 0 as training numbers them."""
    for module.update_index, batch in enumerate(batches):
        module.update(batch)


def data_of(transitions: Transitions, episode_returns: Sequence[float] = (0.0,)) -> SimpleNamespace:
    """What `fit_normalizers` asks of a data module whose rows are all used for training."""
    rows = torch.arange(len(transitions))
    episodes = SimpleNamespace(
        transitions=transitions, sample_rows=lambda *_: rows, observed_rows=lambda *_: rows,
        episode_returns=torch.tensor(episode_returns),
    )  # fmt: skip
    return SimpleNamespace(episodes=episodes, training_episodes=None)


class Recorder(UpdateModule):
    """A module that learns nothing and keeps every batch it is given."""

    name = "recorder"

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1)
        self.batches = []

    def update(self, batch):
        self.batches.append(batch[:])
        loss = (self.weight * batch.rewards).mean()
        self.minimize(loss, self.optimizer)
        return {"loss": loss.detach()}

    def configure_optimizers(self):
        return [self.optimizer]


@pytest.fixture
def recorder():
    return Recorder()
