from dataclasses import dataclass, replace
from functools import partial

import lightning as L
import pytest
import torch

from dawm.data.batches import BatchLoader, FixedBatches, RowStream
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Segments, Transitions
from dawm.diffusion.codecs import Absolute, Differences, InpaintedAbsolute
from dawm.diffusion.denoisers import ResidualMLP, TemporalUNet
from dawm.diffusion.preconditioning import NoisePrediction
from dawm.diffusion.samplers import DDIM, DPMSolverPP2M, Sampler
from dawm.errors import UserError
from dawm.training.build import build_module
from dawm.world_model import DiffusionWorldModel, Imagined

TINY = partial(ResidualMLP, width=16, depth=1)


def model(horizon=2, **kwargs):
    """A world model of two observations and one action with statistics that are easy to compute with."""
    world_model = DiffusionWorldModel(2, 1, horizon, **{"network": TINY, "warmup_steps": 1} | kwargs)
    for name, mean, std in (
        ("observation", [1.0, 2.0], [2.0, 4.0]),
        ("difference", [0.5, 0.0], [0.5, 2.0]),
        ("reward", [3.0], [2.0]),
        ("return", [10.0], [5.0]),
    ):
        normalizer = getattr(world_model.codec, f"{name}_normalizer")
        normalizer.load_state_dict({"mean": torch.tensor(mean), "std": torch.tensor(std)})
    return world_model


# One step from (0, 0) to (1, 2) with reward 5 that ends the task, then an absorbing step.
SEGMENT = Segments(
    observations=torch.tensor([[[0.0, 0.0], [1.0, 2.0], [1.0, 2.0]]]),
    actions=torch.tensor([[[0.7], [0.0]]]),
    rewards=torch.tensor([[5.0, 0.0]]),
    terminations=torch.tensor([[1.0, 1.0]]),
    valid=torch.tensor([[1.0, 0.0]]),
    returns_to_go=torch.tensor([5.0]),
)
DIFFERENCES = [[1.0, 1.0, 1.0, 1.0], [-1.0, 0.0, -1.5, 1.0]]
ABSOLUTE = [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, -1.5, 1.0]]
START = [-0.5, -0.5, 0.0, -1.0]
CODECS = pytest.mark.parametrize(
    ("codec", "known", "expected"),
    [(Differences, [], DIFFERENCES), (Absolute, [], ABSOLUTE), (InpaintedAbsolute, [START], ABSOLUTE)],
)
ONE = torch.ones(1)


# Codecs


@CODECS
def test_encoding_by_hand(codec, known, expected):
    codec = model(codec=codec).codec
    assert codec.encode(SEGMENT)[0].tolist() == expected
    before = codec.known(SEGMENT.observations[:, 0])
    assert ([] if before is None else before[0].tolist()) == known
    assert codec.known_steps == len(known)


@dataclass(eq=False)
class Scripted(Sampler):
    """Answers with a given x instead of sampling."""

    x: torch.Tensor
    num_steps: int = 1
    clip: float | None = None

    def step(self, x_t, sigma, lower, estimate, generator):
        assert x_t.shape == self.x.shape
        return self.x


@CODECS
def test_imagine_inverts_the_encoding(codec, known, expected):
    """Whatever the codec encodes must come out of `imagine` in the data's own units."""
    x = torch.tensor([[*known, *expected]] * 2)
    x[1, :, -1] = -1.0
    start = SEGMENT.observations[:, 0].repeat(2, 1), SEGMENT.actions[:, 0].repeat(2, 1), SEGMENT.returns_to_go.repeat(2)
    imagined = model(sampler=Scripted(x), codec=codec).imagine(*start)
    torch.testing.assert_close(imagined.observations[1:], SEGMENT.observations)
    torch.testing.assert_close(imagined.rewards[1:], SEGMENT.rewards)
    assert imagined.terminations.tolist() == [[1, 1], [0, 0]]


def test_condition_layout():
    condition = model().codec.condition(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.7]]), torch.tensor([20.0]), ONE)
    torch.testing.assert_close(condition, torch.tensor([[1.0, -0.5, 0.7, 2.0, 1.0]]))


def test_a_dropped_return_leaves_no_trace():
    start, action = torch.zeros(2, 2), torch.zeros(2, 1)
    condition = model().codec.condition(start, action, torch.tensor([20.0, -3.0]), torch.zeros(2))
    assert torch.equal(condition[0], condition[1])
    assert condition[0, -2:].tolist() == [0.0, 0.0]


# Imagining


def starts(count=5):
    return torch.randn(count, 2), torch.rand(count, 1) * 2 - 1, torch.randn(count) * 5 + 10


def seeded(world_model, start, seed=0, **kwargs):
    return torch.cat(
        [
            part.flatten(1)
            for part in world_model.imagine(*start, generator=torch.Generator().manual_seed(seed), **kwargs)
        ],
        dim=1,
    )


@pytest.mark.parametrize("codec", [Differences, Absolute, InpaintedAbsolute])
def test_imagined_futures(codec):
    """They start with s_t as given, and the generator alone decides which ones they are."""
    world_model, start = model(horizon=3, codec=codec), starts()
    imagined = world_model.imagine(*start)
    assert imagined.observations.shape == (5, 4, 2)
    assert imagined.rewards.shape == imagined.terminations.shape == (5, 3)
    assert torch.equal(imagined.observations[:, 0], start[0])
    assert torch.equal(seeded(world_model, start), seeded(world_model, start))
    assert not torch.equal(seeded(world_model, start), seeded(world_model, start, seed=1))


def test_guidance_mixes_the_two_models_in_the_right_order():
    """Weight 0 is the model that does not know the return, weight 1 the one that does."""
    world_model = model()
    observations, actions, returns = starts()
    other = observations, actions, returns + 50
    for weight, blind in ((0.0, True), (1.0, False), (2.0, False)):
        first = seeded(world_model, (observations, actions, returns), guidance=weight)
        assert torch.equal(first, seeded(world_model, other, guidance=weight)) is blind


def test_a_model_that_never_saw_returns_ignores_them():
    """With return_dropout 1 the weights of the return are still random: sampling must not use them."""
    world_model = model(return_dropout=1.0)
    observations, actions, returns = starts()
    assert torch.equal(
        seeded(world_model, (observations, actions, returns)), seeded(world_model, (observations, actions, -returns))
    )


def test_guidance_needs_a_model_trained_without_returns():
    with pytest.raises(UserError, match="--guidance: got 1.5.*return_dropout"):
        model(return_dropout=0.0).imagine(*starts(), guidance=1.5)


def test_a_sampler_that_does_not_suit_is_refused_before_training():
    with pytest.raises(UserError, match="--world_model.sampler.num_steps: got 5"):
        model(preconditioning=NoisePrediction(steps=3), sampler=DDIM(num_steps=5))


# Training


def looping(segments, updates, batch_size):
    stream = RowStream(0)
    return BatchLoader(
        lambda k: segments[stream.draw(len(segments), k, batch_size)], [(stream, batch_size)], updates, 20
    )


def accelerating(count, horizon):
    """s' = s + 0.4 a with the same a at every step, r = s_1 + s_2, and the task ends once s_1 passes 1."""
    current, action = torch.rand(count, 2) * 2 - 1, torch.rand(count, 1) * 2 - 1
    observations, rewards, terminations, ended = [current], [], [], torch.zeros(count)
    for _ in range(horizon):
        alive = (1 - ended).unsqueeze(-1)
        rewards.append(current.sum(dim=-1) * alive[:, 0])
        current = current + 0.4 * action * torch.tensor([1.0, -1.0]) * alive
        ended = torch.maximum(ended, (current[:, 0] > 1).float())
        observations.append(current)
        terminations.append(ended)
    ends = torch.stack(terminations, dim=1)
    valid = 1 - torch.cat([torch.zeros(count, 1), ends[:, :-1]], dim=1)
    returns = torch.stack(rewards, dim=1)
    return Segments(
        torch.stack(observations, 1), action.unsqueeze(1) * valid.unsqueeze(-1), returns, ends, valid,
        returns.sum(dim=1),
    )  # fmt: skip


def fit_normalizers(world_model, segments):
    first = Transitions(
        segments.observations[:, 0], segments.actions[:, 0], segments.rewards[:, 0], segments.observations[:, 1],
        segments.terminations[:, 0],
    )  # fmt: skip
    world_model.codec.fit(first, segments.returns_to_go)


def test_learns_a_deterministic_system(make_trainer):
    """Dynamics, reward and termination within a few per cent of their variance, on starts it has not seen."""
    data, held_out = accelerating(4000, 3), accelerating(500, 3)
    world_model = DiffusionWorldModel(
        2, 1, horizon=3, network=partial(ResidualMLP, width=64, depth=1), learning_rate=4e-3, warmup_steps=20,
        ema_decay=0.98, regression_baseline=False,
    )  # fmt: skip
    fit_normalizers(world_model, data)
    make_trainer(500).fit(world_model, looping(data, 500, 128))
    imagined = world_model.imagine(held_out.observations[:, 0], held_out.actions[:, 0], held_out.returns_to_go)

    def error(values, truth):
        counted = held_out.valid.view(500, 3, *[1] * (truth.dim() - 2)).bool().expand_as(truth)
        return float((values - truth)[counted].square().mean() / truth[counted].var())

    assert error(imagined.observations[:, 1:], held_out.observations[:, 1:]) < 0.01
    assert error(imagined.rewards, held_out.rewards) < 0.03
    wrong = ((imagined.terminations > 0.5) != (held_out.terminations > 0.5)) & held_out.valid.bool()
    assert float(held_out.terminations.mean()) > 0.05
    assert float(wrong.float().mean()) < 0.02


def test_the_ema_weights_are_sampled(make_trainer):
    data = accelerating(100, 2)
    world_model = model(ema_decay=0.9)
    untrained = seeded(world_model, starts_of(data))
    make_trainer(20).fit(world_model, looping(data, 20, 32))
    trained = seeded(world_model, starts_of(data))
    assert not torch.equal(trained, untrained)
    with torch.no_grad():
        for parameter in world_model.network.parameters():
            parameter.add_(1.0)
    assert torch.equal(seeded(world_model, starts_of(data)), trained)


def starts_of(segments):
    return segments.observations[:, 0], segments.actions[:, 0], segments.returns_to_go


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_return_dropout_is_the_fraction_hidden(make_trainer, monkeypatch, fraction):
    world_model, kept = model(return_dropout=fraction), []
    condition = world_model.codec.condition
    monkeypatch.setattr(world_model.codec, "condition", lambda *args: kept.append(args[-1]) or condition(*args))
    make_trainer(10).fit(world_model, looping(accelerating(50, 2), 10, 400))
    assert float(torch.cat(kept).mean()) == pytest.approx(1 - fraction, abs=0.03 * (0 < fraction < 1))


def test_normalizers_are_fitted_to_what_they_normalise():
    codec = Differences(2, 1)
    data = Transitions(
        observations=torch.tensor([[0.0, 10.0], [2.0, 14.0]]),
        actions=torch.zeros(2, 1),
        rewards=torch.tensor([5.0, 11.0]),
        next_observations=torch.tensor([[1.0, 10.0], [5.0, 22.0]]),
        terminations=torch.zeros(2),
    )
    codec.fit(data, torch.tensor([100.0, 120.0]))
    for name, mean, std in (
        ("observation", [1, 12], [1, 2]),
        ("difference", [2, 4], [1, 4]),
        ("reward", [8], [3]),
        ("return", [110], [10]),
    ):
        normalizer = getattr(codec, f"{name}_normalizer")
        assert (normalizer.mean.tolist(), normalizer.std.tolist()) == (mean, std), name


def test_learning_rate_rises_then_falls(make_trainer):
    seen = []

    class Spy(DiffusionWorldModel):
        def update(self, batch):
            metrics = super().update(batch)
            seen.append(self.optimizer.param_groups[0]["lr"])
            return metrics

    world_model = Spy(2, 1, 2, network=TINY, warmup_steps=5, learning_rate=1.0, regression_baseline=False)
    make_trainer(20).fit(world_model, looping(accelerating(50, 2), 20, 8))
    assert seen[0] == pytest.approx(0.2)
    assert seen[10] == pytest.approx(0.5)
    assert max(seen) == seen[4] < 1
    assert 0 < seen[-1] < 0.01


def test_the_papers_parts_train_and_sample(make_trainer):
    """Noise prediction, few DDPM steps, U-Net and inpainting of s_t together learn the first step."""
    data = accelerating(1000, 3)
    world_model = DiffusionWorldModel(
        2, 1, horizon=3, network=partial(TemporalUNet, width=16, multipliers=(1, 2), kernel_size=3),
        preconditioning=NoisePrediction(5), sampler=DDIM(3, eta=1.0, temperature=0.5, clip=2.0),
        codec=InpaintedAbsolute, learning_rate=8e-3, warmup_steps=20, ema_decay=0.98,
        regression_baseline=False,
    )  # fmt: skip
    fit_normalizers(world_model, data)
    make_trainer(160).fit(world_model, looping(data, 160, 64))
    imagined = world_model.imagine(*starts_of(data))
    assert imagined.observations.shape == (1000, 4, 2)
    assert all(part.isfinite().all() for part in imagined)
    error = (imagined.observations - data.observations)[:, 1].square().mean() / data.observations[:, 1].var()
    assert float(error) < 0.15


def test_a_checkpoint_loads_without_unpickling_and_imagines_the_same(make_trainer, tmp_path):
    description = {
        "class_path": "dawm.world_model.DiffusionWorldModel",
        "init_args": {
            "horizon": 2,
            "codec": {"class_path": "dawm.diffusion.codecs.Absolute"},
            "network": {"class_path": "dawm.diffusion.denoisers.ResidualMLP", "init_args": {"width": 16, "depth": 1}},
            "sampler": {"class_path": "dawm.diffusion.samplers.DDIM", "init_args": {"num_steps": 4}},
        },
    }
    data = accelerating(50, 2)
    world_model = build_module(description)(2, 1)
    fit_normalizers(world_model, data)
    trainer = make_trainer(10)
    trainer.fit(world_model, looping(data, 10, 16))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = DiffusionWorldModel.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert torch.equal(seeded(loaded, starts_of(data)), seeded(world_model, starts_of(data)))


# Validation


def test_errors_per_step_by_hand_without_invalid_steps(make_trainer, monkeypatch):
    """Errors in units of the variance; the absorbing step, wildly wrong here, must not count."""
    world_model = model()
    later = Segments(*(torch.cat([values] * 2) for values in vars(SEGMENT).values()))
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


def test_the_baseline_is_rolled_out_by_hand(make_trainer, monkeypatch):
    """The regression predicts one step at a time from its own last observation and the recorded action."""
    world_model, asked = model(), []

    def predict(codec, observations, actions):
        asked.append((observations.tolist(), actions.tolist()))
        return torch.tensor([[1.0, 1.0, 1.0, 1.0]])  # difference (1, 2), reward 5, terminated

    monkeypatch.setattr(world_model.baseline, "forward", predict)
    recorded = replace(SEGMENT, valid=torch.ones(1, 2))
    metrics = make_trainer(1).validate(world_model, FixedBatches([recorded]), verbose=False)[0]
    assert metrics["world_model/regression_observation_error/step_1"] == 0
    assert metrics["world_model/regression_observation_error/step_2"] == ((1 / 2) ** 2 + (2 / 4) ** 2) / 2
    assert metrics["world_model/regression_reward_error/step_1"] == 0
    assert metrics["world_model/regression_termination_error/step_1"] == 0
    torch.testing.assert_close(torch.tensor(asked[1][0]), torch.tensor([[1.0, 2.0]]))
    assert asked[1][1] == SEGMENT.actions[:, 1].tolist()


@pytest.mark.parametrize("horizon", [1, 2])
def test_validation_uses_the_same_noise_every_time(make_trainer, horizon):
    """With a horizon of 1 as well, where torchmetrics makes a number of a vector."""
    world_model = model(horizon, sampler=DPMSolverPP2M(2))
    loader = FixedBatches([accelerating(20, horizon)])
    first, second = (make_trainer(1).validate(world_model, loader, verbose=False)[0] for _ in range(2))
    assert first == second


# With a plain Trainer


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
