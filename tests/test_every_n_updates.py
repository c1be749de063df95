"""The base of callbacks, as somebody's own callback uses it."""

from types import SimpleNamespace

import pytest

from dawm.callbacks import EveryNUpdates
from dawm.data.module import TransitionDataModule
from dawm.errors import UserError


class Noting(EveryNUpdates):
    """Notes when it runs."""

    def __init__(self, every_n_steps):
        super().__init__(every_n_steps)
        self.ran = []

    def run(self, trainer, pl_module):
        self.ran.append(trainer.global_step)


class Keeping(Noting):
    """Keeps its notes in checkpoints."""

    kept = (*EveryNUpdates.kept, "ran")


@pytest.fixture
def fit(dataset, make_trainer, recorder):
    """Trains with a callback and returns the trainer."""

    def fit(callback, max_steps, updates_per_step=2, **options):
        data = TransitionDataModule(dataset, horizon=2, batch_size=4, updates_per_step=updates_per_step)
        trainer = make_trainer(max_steps, callbacks=[callback])
        trainer.fit(recorder, datamodule=data, weights_only=True, **options)
        return trainer

    return fit


def test_it_runs_every_n_updates_and_begins_again_in_a_second_training(fit):
    callback = Noting(8)
    fit(callback, 20)
    assert callback.ran == [8, 16]
    fit(callback, 12)
    assert callback.ran == [8, 16, 8]


def test_a_resumed_training_runs_when_an_uninterrupted_one_would(fit, tmp_path):
    """From update 10 in steps of 4, the first of which ends at 12; 8 is not made up for."""
    for kind, ran in ((Noting, [16]), (Keeping, [8, 16])):
        fit(kind(8), 10).save_checkpoint(tmp_path / "last.ckpt")
        resumed = kind(8)
        fit(resumed, 22, updates_per_step=4, ckpt_path=tmp_path / "last.ckpt")
        assert resumed.ran == ran


def test_without_a_state_it_begins_where_training_begins(fit):
    callback = Noting(8)
    callback.on_train_start(SimpleNamespace(datamodule=None, global_step=20), None)
    assert [callback.should_run(step) for step in (21, 23, 24)] == [False, False, True]


def test_mistakes_name_the_setting(fit):
    key = r"--stages\.agent\.callbacks\.Noting\.every_n_steps"
    with pytest.raises(UserError, match=f"{key}: got 0, expected at least 1"):
        Noting(0)
    with pytest.raises(UserError, match=f"{key}: got 5, expected a multiple of data.updates_per_step, which is 2"):
        fit(Noting(5), 8)
