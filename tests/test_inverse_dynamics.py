import lightning as L
import pytest
import torch
from conftest import data_of

from dawm.data.batches import BatchLoader, FixedBatches, RowStream
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Transitions
from dawm.inverse_dynamics import InverseDynamics
from dawm.training.save_checkpoint import SaveCheckpoint


def linear(count):
    """s' = s + M a, of three observations and two actions, each dimension on a scale of its own."""
    generator = torch.Generator().manual_seed(count)
    observations = torch.randn(count, 3, generator=generator) * torch.tensor([1.0, 10.0, 0.1])
    actions = torch.rand(count, 2, generator=generator) * 2 - 1
    push = actions @ torch.tensor([[0.1, 2.0, 0.0], [-0.2, 1.0, 0.01]])
    return Transitions(observations, actions, torch.zeros(count), observations + push, torch.zeros(count))


def looping(transitions, updates, batch_size=64, updates_per_step=10):
    stream = RowStream(0)

    def draw(count):
        return transitions[stream.draw(len(transitions), count, batch_size)]

    return BatchLoader(draw, [(stream, batch_size)], updates, updates_per_step)


def test_linear_dynamics_are_recovered(make_trainer):
    data, held_out = linear(2000), linear(200)
    model = InverseDynamics(3, 2, members=2, hidden=(32,), learning_rate=5e-3)
    model.fit_normalizers(data_of(data))
    make_trainer(400, val_check_interval=20).fit(model, looping(data, 400), FixedBatches([linear(300)]))
    inferred = model.infer(held_out.observations, held_out.next_observations)
    assert float((inferred.actions - held_out.actions).abs().mean()) < 0.03
    assert inferred.disagreement.shape == (200,)
    assert float(model.best_errors.mean()) < 0.002


def test_a_plain_trainer_draws_normalizes_and_validates(dataset, make_trainer):
    data = TransitionDataModule(dataset, horizon=2, batch_size=8, updates_per_step=2)
    model = InverseDynamics(2, 1, members=2, hidden=(8,))
    make_trainer(4, val_check_interval=1).fit(model, datamodule=data)
    trained_on = data.episodes.transitions[data.episodes.sample_rows(data.training_episodes)]
    torch.testing.assert_close(model.observation_normalizer.mean, trained_on.observations.mean(dim=0))
    differences = trained_on.next_observations - trained_on.observations
    torch.testing.assert_close(model.difference_normalizer.mean, differences.mean(dim=0))
    assert model.best_errors.isfinite().all(), "held-out transitions were validated on"


class Stepping(InverseDynamics):
    """After each update its answer is the next number of a script."""

    def __init__(self, script):
        super().__init__(1, 1, members=1, hidden=())
        self.script = script
        with torch.no_grad():
            self.network.layers(self.network.weights)[0][0].zero_()

    def update(self, batch):
        self.network.layers(self.network.weights.data)[0][1].fill_(self.script[self.update_index])
        return {"loss": torch.zeros(())}

    def answer(self):
        return round(float(self.infer(torch.zeros(1, 1), torch.ones(1, 1)).actions), 4)


HALF = Transitions(torch.zeros(4, 1), torch.full((4, 1), 0.5), torch.zeros(4), torch.ones(4, 1), torch.zeros(4))


def step_through(model, make_trainer, validation=True, interval=1):
    count = len(model.script)
    trainer = make_trainer(count, val_check_interval=interval)
    trainer.fit(model, looping(HALF, count, 4, 1), FixedBatches([HALF]) if validation else None)
    return trainer


def test_the_network_of_the_best_validation_infers(make_trainer):
    model = Stepping([0.1, 0.4, 0.9, 0.7])
    step_through(model, make_trainer)
    assert model.answer() == 0.4
    assert float(model.best_errors) == pytest.approx(0.01)


def test_validating_afterwards_does_not_change_a_trained_model(make_trainer):
    """The last checkpoint is written before this validation: a change would make checkpoint and module differ."""
    model = Stepping([0.1, 0.4, 0.5])
    trainer = step_through(model, make_trainer, interval=2)
    assert model.answer() == 0.4
    trainer.validate(model, FixedBatches([HALF]), verbose=False)
    assert model.answer() == 0.4


def test_a_resumed_run_remembers_the_validation_at_its_checkpoint(make_trainer, tmp_path):
    """Checkpoint and validation fall on the same update, whose network is the best; the resumed run must know it."""
    model, resumed = Stepping([0.1, 0.1, 0.1, 0.5, 0.9, 0.9]), Stepping([0.1, 0.1, 0.1, 0.5, 0.9, 0.9])

    def fit(module, folder, max_steps, ckpt_path=None):
        save = SaveCheckpoint(tmp_path / folder / "last.ckpt", 4, {})
        trainer = make_trainer(
            6, val_check_interval=2, callbacks=[save, Interrupt(max_steps)], enable_checkpointing=True
        )
        trainer.fit(module, looping(HALF, 6, 4, 1), FixedBatches([HALF]), ckpt_path=ckpt_path, weights_only=True)
        return trainer

    with pytest.raises(RuntimeError, match="pulled plug"):
        fit(model, "run", 4)
    assert fit(resumed, "again", 6, tmp_path / "run" / "last.ckpt").global_step == 6
    assert resumed.answer() == 0.5


class Interrupt(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("pulled plug")


def test_the_sanity_check_of_a_plain_trainer_is_no_validation(make_trainer):
    """It sees the untrained network."""
    model = Stepping([0.4, 0.1])
    trainer = make_trainer(2, num_sanity_val_steps=1, val_check_interval=2)
    trainer.fit(model, looping(HALF, 2, 2, 1), FixedBatches([HALF]))
    assert model.answer() == 0.1


def test_without_validation_the_last_network_infers(make_trainer):
    """Not the untrained one."""
    model = Stepping([0.1, 0.4])
    step_through(model, make_trainer, validation=False)
    assert model.answer() == 0.4


def test_the_best_network_travels_with_the_state_dict(make_trainer):
    model, other = Stepping([0.4, 0.9]), Stepping([])
    step_through(model, make_trainer)
    other.load_state_dict(model.state_dict())
    assert other.answer() == 0.4


def test_validation_error_by_hand(make_trainer):
    """Of the mean over the members, held to [-1, 1]."""
    model = InverseDynamics(1, 2, members=2, hidden=())
    with torch.no_grad():
        ((weights, biases),) = model.network.layers(model.network.weights)
        weights.zero_()
        biases.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.4]]).unsqueeze(-1))
    actions = torch.tensor([[0.5, 0.0], [0.5, 0.2]])
    data = Transitions(torch.zeros(2, 1), actions, torch.zeros(2), torch.ones(2, 1), torch.zeros(2))
    metrics = make_trainer(1).validate(model, FixedBatches([data[:1], data[1:]]), verbose=False)[0]
    assert metrics["inverse_dynamics/validation_action_error/action_0"] == pytest.approx(0.0)
    assert metrics["inverse_dynamics/validation_action_error/action_1"] == pytest.approx(0.2**2 / 2)
    assert metrics["inverse_dynamics/validation_error"] == pytest.approx(0.2**2 / 4)


def test_disagreement_of_equal_and_of_different_members():
    model = InverseDynamics(3, 2, members=3, hidden=())
    data = linear(10)
    assert (model.infer(data.observations, data.next_observations).disagreement > 0).all()
    for parameter in model.network.parameters():
        parameter.data.copy_(parameter[:1].clone().expand_as(parameter))
    inferred = model.infer(data.observations, data.next_observations)
    torch.testing.assert_close(inferred.disagreement, torch.zeros(10))


def test_disagreement_is_that_of_the_worst_dimension():
    model = InverseDynamics(1, 2, members=2, hidden=())
    ((weights, biases),) = model.network.layers(model.network.weights.data)
    weights.zero_()
    biases.copy_(torch.tensor([[0.1, -0.5], [0.3, 0.5]]).unsqueeze(-1))
    inferred = model.infer(torch.zeros(4, 1), torch.zeros(4, 1))
    torch.testing.assert_close(inferred.actions, torch.tensor([[0.2, 0.0]]).expand(4, 2))
    torch.testing.assert_close(inferred.disagreement, torch.full((4,), 0.5))


def test_weights_for_other_data_bring_no_best_network():
    model = InverseDynamics(3, 1)
    model.best_errors.fill_(0.01)
    model.forget_best()
    observations = torch.randn(4, 3)
    features = model.features(observations, observations + 1)
    expected = model.network(features).clamp(-1, 1).mean(dim=0)
    torch.testing.assert_close(model.infer(observations, observations + 1).actions, expected)
