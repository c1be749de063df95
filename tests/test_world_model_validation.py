"""The world model's validation, the forward models beside it, and both under a plain Trainer."""

from dataclasses import replace

import lightning as L
import pytest
import torch
from small_world_model import SEGMENT, TINY, accelerating, model

from dawm.data.batches import FixedBatches
from dawm.data.module import TransitionDataModule
from dawm.diffusion.samplers import DPMSolverPP2M
from dawm.world_model import DiffusionWorldModel, Imagined


def test_errors_per_step_by_hand_without_invalid_steps(make_trainer, monkeypatch):
    """Errors in units of the variance; the absorbing step, wildly wrong here, must not count."""
    world_model = model()
    later = SEGMENT[torch.zeros(2, dtype=torch.int64)]
    later.valid[1, 1] = 1.0
    imagined = Imagined(
        observations=later.observations + torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 4.0]]),
        rewards=later.rewards + torch.tensor([[4.0, 100.0], [4.0, 2.0]]),
        terminations=torch.tensor([[0.9, 0.0], [0.1, 1.2]]),
    )
    imagined.observations[0, 2] = 1e6
    monkeypatch.setattr(world_model, "imagine", lambda *args, **kwargs: imagined)
    metrics = make_trainer(1).validate(world_model, FixedBatches([later]), verbose=False)[0]
    expected = {
        "observation_error/step_1": ((1 / 2) ** 2 + 0) / 2,
        "observation_error/step_2": ((2 / 2) ** 2 + (4 / 4) ** 2) / 2,
        "reward_error/step_1": (4 / 2) ** 2,
        "reward_error/step_2": (2 / 2) ** 2,
        "termination_error/step_1": 0.5,
        "termination_error/step_2": 0.0,
    }
    for key, value in expected.items():
        assert metrics[f"world_model/validation_{key}"] == pytest.approx(value), key
    assert metrics["world_model/validation_error"] == pytest.approx(1 / 8)


def test_the_forward_models_are_rolled_out_by_hand(make_trainer, monkeypatch):
    """Their mean predicts one step at a time from its own last observation and the recorded action."""
    world_model, asked = model(), []

    def forward(codec, observations, actions):
        asked.append((observations.tolist(), actions.tolist()))
        # of two members; in the mean a difference of (1, 2), reward 5, terminated
        return torch.tensor([[[0.0, 1.0, 1.0, 1.0]], [[2.0, 1.0, 1.0, 1.0]]])

    monkeypatch.setattr(world_model.forward_model, "forward", forward)
    recorded = replace(SEGMENT, valid=torch.ones(1, 2))
    metrics = make_trainer(1).validate(world_model, FixedBatches([recorded]), verbose=False)[0]
    assert metrics["world_model/forward_observation_error/step_1"] == 0
    assert metrics["world_model/forward_observation_error/step_2"] == ((1 / 2) ** 2 + (2 / 4) ** 2) / 2
    assert metrics["world_model/forward_reward_error/step_1"] == 0
    assert metrics["world_model/forward_termination_error/step_1"] == 0
    torch.testing.assert_close(torch.tensor(asked[1][0]), torch.tensor([[1.0, 2.0]]))
    assert asked[1][1] == SEGMENT.actions[:, 1].tolist()


@pytest.mark.parametrize("horizon", [1, 2])
def test_validation_uses_the_same_noise_every_time(make_trainer, horizon):
    """With a horizon of 1 as well, where torchmetrics makes a number of a vector."""
    world_model = model(horizon, sampler=DPMSolverPP2M(2))
    loader = FixedBatches([accelerating(20, horizon)])
    first, second = (make_trainer(1).validate(world_model, loader, verbose=False)[0] for _ in range(2))
    assert first == second


def test_a_trainer_and_a_data_module_suffice(dataset, tmp_path):
    """A script without the command line trains on normalised segments of the training episodes, and validates."""
    data = TransitionDataModule(dataset, horizon=2, segment_batch_size=8, updates_per_step=5, validation_fraction=0.2)
    seen, losses = [], []

    class Spy(DiffusionWorldModel):
        def update(self, batch):
            seen.append(self.codec.encode(batch))
            losses.append(super().update(batch)["loss"])
            return {"loss": losses[-1]}

    world_model = Spy(data.observation_size, data.action_size, horizon=2, network=TINY, warmup_steps=1)
    trainer = L.Trainer(max_steps=20, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(world_model, datamodule=data)
    assert trainer.global_step == len(seen) == 20
    real = data.episodes.transitions[data.episodes.sample_rows(data.training_episodes)]
    normalizer = world_model.codec.observation_normalizer
    torch.testing.assert_close(normalizer.mean, real.observations.mean(dim=0))
    torch.testing.assert_close(normalizer.std, real.observations.std(dim=0, correction=0))
    x = torch.cat(seen)
    assert x.shape == (160, 2, 4)
    assert x[..., 2].mean().abs() < 0.5, "rewards of 0.25 to 25.25, normalised"
    assert float(trainer.callback_metrics["world_model/validation_error"]) > 0
    assert "world_model/first_step_error_ratio" in trainer.callback_metrics


def test_a_second_fit_keeps_the_statistics(dataset, make_trainer):
    data = TransitionDataModule(dataset, horizon=2, segment_batch_size=8, updates_per_step=5)
    world_model = model()
    make_trainer(5).fit(world_model, datamodule=data)
    assert world_model.codec.reward_normalizer.mean.tolist() == [3.0]
