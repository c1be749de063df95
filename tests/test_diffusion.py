"""Preconditionings, the loss, guidance and samplers, against hand-computed numbers and an exact denoiser."""

import math
from dataclasses import dataclass

import pytest
import torch

from dawm.diffusion.preconditioning import EDM, NoisePrediction, denoising_loss, guided
from dawm.diffusion.samplers import DDIM, DPMSolverPP2M, Heun
from dawm.errors import UserError

SIGMAS = torch.tensor([1e-3, 0.05, 0.5, 3.0, 50.0])


class Echo(torch.nn.Module):
    """A network that answers with a constant and keeps what it was shown."""

    def __init__(self, answer=0.0):
        super().__init__()
        self.answer = answer

    def forward(self, x_t, noise_level, condition):
        self.x_t, self.noise_level = x_t, noise_level
        return torch.full_like(x_t, self.answer)


@dataclass
class GaussianDenoiser:
    """The exact denoiser of normal data: E[x | x_t]; it counts its evaluations."""

    mean: float
    std: float
    evaluations: int = 0

    def __call__(self, x_t, sigma):
        self.evaluations += 1
        noise, data = sigma.view(-1, 1, 1) ** 2, self.std**2
        return (data * x_t + noise * self.mean) / (data + noise)


# Preconditioning


def test_edm_with_one_standard_deviation_has_the_formulas_of_karras():
    sd = 0.5
    c_skip, c_out, c_in = EDM(sigma_data=sd, sigma_conditional=sd).coefficients(SIGMAS)
    torch.testing.assert_close(c_skip, sd**2 / (SIGMAS**2 + sd**2))
    torch.testing.assert_close(c_out, SIGMAS * sd / (SIGMAS**2 + sd**2).sqrt())
    torch.testing.assert_close(c_in, 1 / (SIGMAS**2 + sd**2).sqrt())


@pytest.mark.parametrize("preconditioning", [EDM(), EDM(2.0, 0.1), NoisePrediction()])
def test_every_level_weighs_the_networks_error_alike(preconditioning):
    _, c_out, c_in = preconditioning.coefficients(SIGMAS)
    torch.testing.assert_close(c_out**2 * preconditioning.loss_weight(SIGMAS), torch.ones(5))
    std = getattr(preconditioning, "sigma_data", 1.0)
    torch.testing.assert_close(c_in * (std**2 + SIGMAS**2).sqrt(), torch.ones(5))


def test_edm_target_has_variance_one_under_a_condition():
    # The network's target (x - c_skip x_t) / c_out of 200,000 samples of standard deviation 1, at each level.
    preconditioning = EDM(sigma_data=1.0, sigma_conditional=0.1)
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 200_000, generator=generator).double()
    for sigma in (0.01, 0.1, 1.0, 10.0):
        c_skip, c_out, _ = preconditioning.coefficients(torch.tensor([sigma], dtype=torch.float64))
        target = (x - c_skip * (x + sigma * noise)) / c_out
        assert target.std().item() == pytest.approx(1, abs=0.01)


def test_denoiser_leaves_clean_samples_alone():
    x = torch.randn(5, 3, 2)
    for preconditioning in (EDM(), EDM(1.0, 1.0), NoisePrediction()):
        denoised = preconditioning.denoise(Echo(1.0), x, torch.full((5,), 1e-5), torch.zeros(5, 1))
        torch.testing.assert_close(denoised, x, atol=1e-4, rtol=0)


def test_noise_prediction_inverts_the_variance_preserving_form():
    # alpha_bar = 0.2 is sigma = 2: x_vp = sqrt(0.2) x + sqrt(0.8) n, so the network must see x_t / sqrt(5).
    network, x, noise = Echo(-0.7), torch.randn(1, 2, 3), torch.full((1, 2, 3), -0.7)
    denoised = NoisePrediction().denoise(network, x + 2 * noise, torch.tensor([2.0]), torch.zeros(1, 1))
    torch.testing.assert_close(network.x_t, math.sqrt(0.2) * x + math.sqrt(0.8) * noise)
    torch.testing.assert_close(denoised, x)


def test_cosine_schedule_by_hand():
    # alpha_bar(k) = cos^2(pi/2 (k/5 + 0.008) / 1.008) / cos^2(pi/2 0.008 / 1.008); at k = 1 the ratio is 0.89872, at
    # k = 4 it is 0.09405, and the last beta would be 1 but is held at 0.999.
    levels = NoisePrediction(steps=5).levels
    assert levels[0].item() == pytest.approx(math.sqrt(1 / 0.89872 - 1), rel=1e-4)
    assert levels[3].item() == pytest.approx(math.sqrt(1 / 0.09405 - 1), rel=1e-3)
    assert levels[4].item() == pytest.approx(math.sqrt(1 / 0.09405e-3 - 1), rel=1e-3)
    schedule = NoisePrediction(steps=5)
    assert schedule.sampler_sigmas(3).tolist() == [levels[4].item(), levels[2].item(), levels[0].item(), 0.0]
    assert set(schedule.training_sigmas(200).tolist()) == set(levels.tolist())
    with pytest.raises(UserError, match="--world_model.sampler.num_steps: got 6"):
        schedule.sampler_sigmas(6)


def test_edm_levels():
    edm = EDM(sigma_min=0.1, sigma_max=10.0, rho=2.0, log_sigma_mean=0.5, log_sigma_std=2.0)
    middle = ((math.sqrt(10) + math.sqrt(0.1)) / 2) ** 2
    torch.testing.assert_close(edm.sampler_sigmas(3), torch.tensor([10.0, middle, 0.1, 0.0]))
    assert edm.sampler_sigmas(1).tolist() == [10.0, 0.0]
    drawn = edm.training_sigmas(10_000, torch.Generator().manual_seed(0)).log()
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.06)
    assert drawn.std().item() == pytest.approx(2.0, abs=0.06)
    with pytest.raises(UserError, match="--world_model.preconditioning.sigma_min: got 2.0"):
        EDM(sigma_min=2.0, sigma_max=1.0)


# Loss and guidance


def test_loss_of_a_blind_network_is_known():
    # A network that answers 0 leaves D = c_skip x_t. With c_out^2 * weight = 1 the weighted error is that of the
    # target, whose variance is 1 at every level when x has variance 1. Weights 3 and 0 on two steps make that 3 / 2.
    x = torch.randn(20_000, 2, 3, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([[[3.0], [0.0]]])
    loss, metrics = denoising_loss(
        EDM(), Echo(), x, torch.zeros(20_000, 1), torch.Generator().manual_seed(2), weights=weights
    )
    assert loss.item() == pytest.approx(1.5, abs=0.03)
    assert set(metrics) == {"denoising_error"}


def test_known_steps_are_seen_but_not_learnt():
    network, x, known = Echo(), torch.randn(4, 2, 3), torch.full((4, 1, 3), 1e6)
    loss, metrics = denoising_loss(EDM(), network, x, torch.zeros(4, 1), known=known)
    assert network.x_t.shape == (4, 3, 3)
    torch.testing.assert_close(network.x_t[:, :1], known)
    assert max(loss.item(), metrics["denoising_error"].item()) < 100


def test_guidance_mixes_and_saves_the_second_evaluation():
    with_, without = GaussianDenoiser(3.0, 0.0), GaussianDenoiser(1.0, 0.0)
    x_t, sigma = torch.zeros(2, 1, 1), torch.ones(2)
    assert guided(with_, without, 1.5)(x_t, sigma).flatten().tolist() == [4.0, 4.0]  # 1.5 * 3 - 0.5 * 1
    assert without.evaluations == 1
    assert guided(with_, without, 1.0)(x_t, sigma).flatten().tolist() == [3.0, 3.0]
    assert without.evaluations == 1


# Samplers

MEAN, STD = 0.7, 0.5


def moments(sampler, sigma_max):
    """Mean and standard deviation that a sampler makes of N(MEAN, STD^2), and the evaluations it took.

    It starts from exactly N(MEAN, sigma_max^2), so that what is measured is the sampler and not its start.
    """
    half = torch.randn(20_000, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noise = torch.cat([half, -half]) / half.square().mean().sqrt() + MEAN / sigma_max
    sigmas = EDM(sigma_min=0.002, sigma_max=sigma_max).sampler_sigmas(sampler.num_steps)
    denoiser = GaussianDenoiser(MEAN, STD)
    x = sampler.sample(denoiser, sigmas, noise, torch.Generator().manual_seed(4))
    return x.mean().item(), x.std().item(), denoiser.evaluations


def test_deterministic_samplers_converge_at_their_order():
    def error(sampler):
        # The exact flow of a Gaussian ends at STD * sigma_max / sqrt(sigma_max^2 + STD^2), minus what sigma_min hides.
        return abs(moments(sampler, 80.0)[1] - STD * 80 / math.hypot(80, STD))

    for sampler, order in ((DDIM, 1), (DPMSolverPP2M, 2), (Heun, 2)):
        coarse, fine = error(sampler(40)), error(sampler(160))
        assert fine < 0.02 * STD
        assert coarse / fine > 0.6 * 4**order, sampler


@pytest.mark.parametrize(
    ("sampler", "evaluations", "tolerance"),
    [
        (DDIM(100), 100, 0.03),
        (DPMSolverPP2M(20), 20, 0.03),
        (Heun(20), 39, 0.03),
        (DDIM(100, eta=1.0), 100, 0.05),
        (Heun(50, churn=10.0), 99, 0.03),
        (Heun(50, churn=10.0, churn_min=0.1, churn_max=5.0), 99, 0.03),
    ],
)
def test_samplers_reach_mean_and_std(sampler, evaluations, tolerance):
    mean, std, counted = moments(sampler, 10.0)
    assert counted == evaluations
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert std == pytest.approx(STD, rel=tolerance)


@pytest.mark.parametrize(("low", "high", "equal"), [(0.0, 1e-3, True), (1e3, 2e3, True), (0.1, 1.0, False)])
def test_churn_adds_noise_within_its_levels_alone(low, high, equal):
    plain, churned = (moments(sampler, 10.0) for sampler in (Heun(10), Heun(10, 10.0, churn_min=low, churn_max=high)))
    assert (plain == churned) is equal


@pytest.mark.parametrize("sampler", [DDIM(1), DPMSolverPP2M(1), Heun(1), DDIM(1, eta=1.0)])
def test_one_step_returns_the_estimate(sampler):
    x = sampler.sample(GaussianDenoiser(MEAN, STD), torch.tensor([2.0, 0.0]), torch.ones(1, 1, 1))
    assert x.item() == pytest.approx((0.25 * 2.0 + 4.0 * MEAN) / 4.25)


def test_ancestral_step_is_the_posterior_with_low_temperature():
    # From sigma 2 at x_t = 2 with x estimated as 0 (a denoiser sure of 0), down to sigma 1: mean 2 / 4, variance
    # 1 * (1 - 1/4); temperature 0.5 halves the standard deviation. The last step returns x = 0, so it is watched.
    seen = []

    def watch(x_t, sigma):
        seen.append((x_t.mean().item(), x_t.std().item()))
        return x_t

    sampler = DDIM(2, eta=1.0, temperature=0.5)
    noise = torch.ones(50_000, 1, 1)
    sigmas = torch.tensor([2.0, 1.0, 0.0])
    sampler.sample(GaussianDenoiser(0.0, 0.0), sigmas, noise, torch.Generator().manual_seed(5), watch)
    assert seen[1][0] == pytest.approx(0.5, abs=0.01)
    assert seen[1][1] == pytest.approx(0.5 * math.sqrt(0.75), abs=0.01)


def test_clip_bounds_the_estimate():
    x = DDIM(3, clip=0.4).sample(GaussianDenoiser(MEAN, 0.0), torch.tensor([9.0, 3.0, 1.0, 0.0]), torch.ones(2, 1, 1))
    assert x.flatten().tolist() == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("sampler", [DDIM(4), DPMSolverPP2M(4), Heun(4), Heun(4, churn=2.0)])
@pytest.mark.parametrize("preconditioning", [EDM(), NoisePrediction()])
def test_inpainting_shows_the_network_clean_entries_at_every_evaluation(sampler, preconditioning):
    known, network, shown = torch.full((2, 1, 1), 0.3), Echo(), []

    def denoise(x_t, sigma):
        x = preconditioning.denoise(network, x_t, sigma, torch.zeros(len(x_t), 1))
        shown.append(network.x_t[:, 0, 0])
        return x

    noise = torch.full((2, 2, 1), 9.0)
    x = sampler.sample(denoise, preconditioning.sampler_sigmas(4), noise, inpaint=preconditioning.inpainting(known))
    torch.testing.assert_close(x[:, :1], known)
    assert not torch.allclose(x[:, 1], known[:, 0])
    assert len(shown) == (7 if isinstance(sampler, Heun) else 4)
    for entry in shown:
        torch.testing.assert_close(entry, torch.full((2,), 0.3))


def test_nothing_known_is_nothing_inpainted():
    assert EDM().inpainting(None) is None
