"""What StageProgress prints where there is no terminal, and that a terminal gets a bar."""

import io

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from rich.console import Console

from dawm.training import progress
from dawm.training.progress import StageProgress


class Clock(L.Callback):
    """Ten seconds a training step."""

    def __init__(self) -> None:
        self.now = 1000.0

    def on_train_batch_start(self, *args):
        self.now += 10

    def __call__(self):
        return self.now


class Evaluate(L.Callback):
    """Logs a score after the third step and again after the sixth."""

    def __init__(self, scores=(24.125, 30.0)):
        self.scores = scores

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step in (3, 6):
            score = self.scores[trainer.global_step // 3 - 1]
            pl_module.log("eval/normalized_score", score, logger=False, prog_bar=True)


class Model(BoringModel):
    def validation_step(self, batch, batch_idx):
        self.log("world_model/validation_error", 0.25, prog_bar=True)


@pytest.fixture
def train(monkeypatch, make_trainer):
    def train(steps=10, *callbacks, terminal=False, before=None, validate_every=None, **options) -> list[str]:
        clock, file = Clock(), io.StringIO()
        monkeypatch.setattr(progress, "monotonic", clock)
        shown = StageProgress("agent", Console(file=file, force_terminal=terminal, width=200), **options)
        limits = {"val_check_interval": validate_every} if validate_every else {"limit_val_batches": 0}
        trainer = make_trainer(
            steps, callbacks=[clock, *callbacks, shown], enable_progress_bar=True, log_every_n_steps=1, **limits
        )
        if before is not None:
            before(shown)
        trainer.fit(Model())
        return file.getvalue().splitlines()

    return train


def test_a_line_every_30_seconds_and_at_both_ends(train):
    lines = train(10)
    assert lines == [
        "agent: 0 of 10 updates",
        "agent: 3 of 10 updates (30 %), 0.1 updates/s, 0:01:10 left",
        "agent: 6 of 10 updates (60 %), 0.1 updates/s, 0:00:40 left",
        "agent: 9 of 10 updates (90 %), 0.1 updates/s, 0:00:10 left",
        "agent: 10 of 10 updates (100 %), 0.1 updates/s, took 0:01:40",
    ]


def test_a_validation_gives_a_line_with_its_metrics(train):
    lines = train(4, validate_every=2)
    assert lines[1:3] == [
        "agent: 2 of 4 updates (50 %), 0.1 updates/s, 0:00:20 left, world_model/validation_error 0.25",
        "agent: 4 of 4 updates (100 %), 0.1 updates/s, 0:00:00 left, world_model/validation_error 0.25",
    ]


@pytest.mark.parametrize("scores", [(24.125, 30.0), (float("nan"), 30.0)])
def test_an_evaluation_of_a_callback_gives_one_line(train, monkeypatch, scores):
    monkeypatch.setattr(progress, "SECONDS", 1e9)
    lines = train(10, Evaluate(scores))
    assert len(lines) == 4
    assert lines[1].endswith(f"0:01:10 left, eval/normalized_score {scores[0]:.4g}")
    assert lines[2].startswith("agent: 6 of 10")
    assert lines[3].endswith("took 0:01:40, eval/normalized_score 30")


def test_quiet_and_other_ranks_print_nothing(train):
    assert train(4, quiet=True) == []
    assert train(4, before=lambda shown: shown.disable()) == []
    assert train(4, quiet=True, terminal=True) == []


def test_a_terminal_gets_a_bar_with_the_newest_score(train):
    text = "".join(train(10, Evaluate(), terminal=True))
    assert "10/10" in text
    assert "normalized_score 30" in text
    assert "of 10 updates" not in text


def test_the_unit_is_shown(train):
    assert train(2, unit="training steps")[0] == "agent: 0 of 2 training steps"
