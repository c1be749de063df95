from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from small_world_model import (
    SEGMENT,
    TINY,
    accelerating,
    fit_normalizers,
    looping,
    model,
    seeded,
    starts,
    starts_of,
)

from dawm.data.transitions import Segments, Transitions
from dawm.diffusion.codecs import Absolute, Differences, InpaintedAbsolute, JointDifferences, JointSegments
from dawm.diffusion.denoisers import ResidualMLP, TemporalUNet
from dawm.diffusion.preconditioning import NoisePrediction
from dawm.diffusion.samplers import DDIM, Sampler
from dawm.errors import UserError
from dawm.training.build import build_module
from dawm.world_model import DiffusionWorldModel

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


@pytest.mark.parametrize("codec", [Differences, Absolute, InpaintedAbsolute, JointDifferences, JointSegments])
def test_an_observation_that_was_not_recorded_is_no_target(codec):
    """Whatever stands in for it: reward and end still count."""
    world_model = model(codec=codec, forward_members=3)

    def targets(after, reward=5.0, observed=0.0):
        """What the world model's loss is taken of, and the forward models' loss."""
        observations, rewards = torch.tensor([[[0.0, 0.0], [after, after]]]), torch.tensor([[reward]])
        segment = replace(
            SEGMENT[:], observations=observations, actions=SEGMENT.actions[:, :1], rewards=rewards,
            terminations=torch.ones(1, 1), valid=torch.ones(1, 1), observed=torch.full((1, 1), observed),
        )  # fmt: skip
        x = world_model.codec.encode(segment) * world_model.codec.recorded(segment.observed)
        return torch.cat([x.flatten(), world_model.forward_model.loss(world_model.codec, segment)])

    torch.testing.assert_close(targets(1.0), targets(9.0))
    assert (targets(1.0) != targets(1.0, reward=6.0)).sum() == 1 + 3
    assert (targets(1.0, observed=1.0) != targets(9.0, observed=1.0)).sum() == 2 + 3


def test_condition_layout():
    condition = model().codec.condition(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.7]]), torch.tensor([20.0]), ONE)
    torch.testing.assert_close(condition, torch.tensor([[1.0, -0.5, 0.7, 2.0, 1.0]]))


def test_a_dropped_return_leaves_no_trace():
    start, action = torch.zeros(2, 2), torch.zeros(2, 1)
    condition = model().codec.condition(start, action, torch.tensor([20.0, -3.0]), torch.zeros(2))
    assert torch.equal(condition[0], condition[1])
    assert condition[0, -2:].tolist() == [0.0, 0.0]


# Imagining


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


def test_starts_in_double_precision_give_the_same_futures():
    """As NumPy has them, for whom a target return or an environment may have been written."""
    world_model, given = model(horizon=3), (torch.randn(4, 2), torch.rand(4, 1), torch.randn(4))
    futures = [
        world_model.imagine(*map(kind, given), generator=torch.Generator().manual_seed(0))
        for kind in (torch.Tensor.float, torch.Tensor.double)
    ]
    assert torch.equal(futures[0].observations, futures[1].observations)
    assert torch.equal(futures[0].rewards, futures[1].rewards)


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


def test_learns_a_deterministic_system(make_trainer):
    """Dynamics, reward and termination within a few per cent of their variance, on starts it has not seen."""
    data, held_out = accelerating(4000, 3), accelerating(500, 3)
    world_model = DiffusionWorldModel(
        2, 1, horizon=3, network=partial(ResidualMLP, width=64, depth=1), learning_rate=4e-3, warmup_steps=20,
        ema_decay=0.98, forward_members=0,
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

    world_model = Spy(2, 1, 2, network=TINY, warmup_steps=5, learning_rate=1.0, forward_members=0)
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
        forward_members=0,
    )  # fmt: skip
    fit_normalizers(world_model, data)
    make_trainer(160).fit(world_model, looping(data, 160, 64))
    imagined = world_model.imagine(*starts_of(data))
    assert imagined.observations.shape == (1000, 4, 2)
    assert all(part.isfinite().all() for part in imagined[:3])
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
    world_model = build_module(description, 2, 1)
    fit_normalizers(world_model, data)
    trainer = make_trainer(10)
    trainer.fit(world_model, looping(data, 10, 16))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = DiffusionWorldModel.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert torch.equal(seeded(loaded, starts_of(data)), seeded(world_model, starts_of(data)))


def test_a_training_loop_of_ones_own_needs_no_trainer():
    trained = model(warmup_steps=2, learning_rate=0.5)
    batches = Segments(
        **{name: part[None].expand(2, *part.shape) for name, part in vars(SEGMENT).items() if part is not None}
    )
    trained.run_updates(batches)
    assert trained.learning_rates(0) == [0.25, 0.25]
    assert trained.optimizer.param_groups[0]["lr"] == 0.5
