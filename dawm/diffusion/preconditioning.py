"""Diffusion: noise levels and preconditioning, the training loss, samplers, guidance.

Symbols: B batch, H horizon, R size of a row, C size of the condition.

Everything is written in the variance-exploding form of Karras et al. 2022 (arXiv 2206.00364): noisy rows are
``x = x0 + sigma * n`` with ``n`` standard normal, and a denoiser ``D(x, sigma)`` estimates ``x0``. A DDPM, which
preserves the variance, is the same thing seen through ``x / sqrt(1 + sigma^2)``, so any sampler serves either.

Two parts are chosen by class path: a `Preconditioning` (which noise levels are learnt, and how the network's output
becomes an estimate of ``x0``) and a `Sampler` from `dawm.diffusion.samplers` (how noise becomes rows). In short::

    loss, metrics = denoising_loss(preconditioning, network, rows, condition)
    denoise = lambda x, sigma: preconditioning.denoise(network, x, sigma, condition)
    rows = sampler.sample(denoise, preconditioning.sampling_sigmas(sampler.num_steps), noise)
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dawm.diffusion.samplers import Denoise, Observe
from dawm.errors import UserError

__all__ = ["EDM", "NoisePrediction", "Preconditioning", "denoising_loss", "guided"]


def _per_row(values: Tensor) -> Tensor:
    """Numbers per sample, shape (B,), as factors of rows, shape (B, 1, 1)."""
    return values.view(-1, 1, 1)


class Preconditioning(ABC):
    """Which noise levels are learnt, and ``D(x, sigma) = c_skip x + c_out F(c_in x, c_noise, condition)``.

    ``F`` is the network. ``c_noise = ln(sigma) / 4`` throughout, of order one for every level in use.
    """

    @abstractmethod
    def sample_sigmas(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Noise levels to train on, shape (B,)."""

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``c_skip``, ``c_out`` and ``c_in``, each shape (B,).

        Args:
            sigma: Noise levels, shape (B,).
        """

    @abstractmethod
    def sampling_sigmas(self, steps: int, device: torch.device | str | None = None) -> Tensor:
        """The levels a sampler visits, decreasing to 0, shape (steps + 1,)."""

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared error of ``x0``; ``1 / c_out^2`` makes every level's target equally large, shape (B,).

        Args:
            sigma: Noise levels, shape (B,).
        """
        return self.coefficients(sigma)[1] ** -2

    def denoise(self, network: nn.Module, noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """Estimate of the clean rows, shape (B, H, R).

        Args:
            network: A `dawm.diffusion.denoisers.Denoiser`.
            noisy: Noisy rows ``x``, shape (B, H, R).
            sigma: Their noise levels, shape (B,).
            condition: What the rows depend on, shape (B, C).
        """
        c_skip, c_out, c_in = (_per_row(c) for c in self.coefficients(sigma))
        return c_skip * noisy + c_out * network(c_in * noisy, sigma.log() / 4, condition)

    def inpainting(self, known: Tensor, mask: Tensor) -> Observe:
        """Hook that shows the network the known entries free of noise, at their own scale, at every level.

        Args:
            known: Values of the known entries (elsewhere ignored), shape (B, H, R) or broadcastable.
            mask: True where an entry is known, shape (B, H, R) or broadcastable.
        """

        def observe(noisy: Tensor, sigma: Tensor) -> Tensor:
            # The network sees c_in * x; dividing by the relative c_in makes that independent of sigma.
            relative = self.coefficients(sigma)[2] / self.coefficients(torch.zeros_like(sigma))[2]
            return torch.where(mask, known / _per_row(relative), noisy)

        return observe


class EDM(Preconditioning):
    """Preconditioning of Karras et al. 2022 (table 1), with the spread that is left once the condition is known.

    Karras et al. know one number about the data, their standard deviation. Here the condition (s_t, a_t) tells most
    of the answer, so that two numbers matter: ``sigma_data``, the spread of all rows, and ``sigma_conditional`` = s,
    the spread left under a given condition. ``c_skip = s^2 / (s^2 + sigma^2)`` trusts the noisy rows only where their
    noise is below s, ``c_in`` scales the input to variance 1, and ``c_out`` the target of the network to variance 1::

        c_out^2 = E[(x0 - c_skip x)^2] = (1 - c_skip)^2 sigma_data^2 + c_skip^2 sigma^2

    With ``sigma_conditional = sigma_data`` these are the formulas of the paper.

    The defaults were measured on Hopper medium-replay (H = 8, `ResidualMLP`, 3,000 updates of 128; squared error of the
    first sampled difference in units of the observations' variance). Equal spreads: 0.014; s = 0.15: 0.010, as the
    network at high noise becomes a regression of ``x0``; s = 0.05: 0.012. Mean of ln(sigma) 0 or -0.8 instead of 1, at
    s = 0.15: 0.012 and 0.017; 1.7: 0.010 with a poorer energy score. With the first row weighted 3 and s = 0.1,
    10 steps of `DPMSolverPP2M` from 20 down to 0.02: 0.0046 and the spread right to 1 %; down to 0.002: 0.0050 and 2 %
    too wide; from 5 instead of 20: 6 % too narrow.

    Args:
        sigma_data: Standard deviation of the rows; 1 for normalised rows.
        sigma_conditional: Standard deviation of the rows under a given condition.
        log_sigma_mean: Mean of ln(sigma) in training.
        log_sigma_std: Standard deviation of ln(sigma) in training.
        sigma_min: Lowest level of sampling above 0.
        sigma_max: Level at which sampling starts.
        rho: Exponent of the sampling levels; higher puts more of them near ``sigma_min``.
    """

    def __init__(
        self,
        sigma_data: float = 1.0,
        sigma_conditional: float = 0.1,
        log_sigma_mean: float = 1.0,
        log_sigma_std: float = 1.2,
        sigma_min: float = 0.02,
        sigma_max: float = 20.0,
        rho: float = 7.0,
    ) -> None:
        if not 0 < sigma_min < sigma_max:
            raise UserError(f"sigma_min {sigma_min} and sigma_max {sigma_max}: choose 0 < sigma_min < sigma_max")
        self.sigma_data = sigma_data
        self.sigma_conditional = sigma_conditional
        self.log_sigma_mean = log_sigma_mean
        self.log_sigma_std = log_sigma_std
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.rho = rho

    def sample_sigmas(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Log-normal noise levels, shape (B,)."""
        return (self.log_sigma_mean + self.log_sigma_std * torch.randn(batch, generator=generator, device=device)).exp()

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``c_skip``, ``c_out`` and ``c_in``, each shape (B,).

        Args:
            sigma: Noise levels, shape (B,).
        """
        c_skip = self.sigma_conditional**2 / (self.sigma_conditional**2 + sigma**2)
        # 1 - c_skip is written as a quotient: the difference would lose all digits at small sigma.
        missing = sigma**2 / (self.sigma_conditional**2 + sigma**2)
        c_out = (missing**2 * self.sigma_data**2 + c_skip**2 * sigma**2).sqrt()
        return c_skip, c_out, (self.sigma_data**2 + sigma**2).rsqrt()

    def sampling_sigmas(self, steps: int, device: torch.device | str | None = None) -> Tensor:
        """``sigma_max`` to ``sigma_min`` evenly in ``sigma^(1/rho)`` (equation 5), then 0, shape (steps + 1,)."""
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64, device=device)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        levels = (high + ramp * (low - high)) ** self.rho
        return torch.cat([levels, levels.new_zeros(1)]).float()


class NoisePrediction(Preconditioning):
    """A DDPM that predicts the noise over a few levels of the cosine schedule; DWM trains K = 5 and samples 3.

    Level k has ``sigma_k = sqrt((1 - alpha_bar_k) / alpha_bar_k)`` with the ``alpha_bar`` of Nichol and Dhariwal 2021
    (arXiv 2102.09672, equation 17; no beta above 0.999). The network sees the variance-preserving
    ``x / sqrt(1 + sigma^2)`` and answers with the noise: ``D = x - sigma F``.

    Args:
        steps: K, the number of noise levels trained on.
        offset: The schedule's small offset near the data.
    """

    def __init__(self, steps: int = 5, offset: float = 0.008) -> None:
        if steps < 1:
            raise UserError(f"steps {steps} of NoisePrediction: choose at least 1")
        self.steps = steps
        self.offset = offset
        grid = torch.arange(steps + 1, dtype=torch.float64) / steps
        cosine = torch.cos((grid + offset) / (1 + offset) * math.pi / 2) ** 2
        alpha_bar = (cosine[1:] / cosine[:-1]).clamp(min=0.001).cumprod(0)
        self.levels = ((1 - alpha_bar) / alpha_bar).sqrt().float()

    def sample_sigmas(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Noise levels drawn uniformly from the K of the schedule, shape (B,)."""
        index = torch.randint(self.steps, (batch,), generator=generator, device=device)
        return self.levels.to(index.device)[index]

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``c_skip``, ``c_out`` and ``c_in``, each shape (B,).

        Args:
            sigma: Noise levels, shape (B,).
        """
        return torch.ones_like(sigma), -sigma, (1 + sigma**2).rsqrt()

    def sampling_sigmas(self, steps: int, device: torch.device | str | None = None) -> Tensor:
        """Every (K / steps)-th level from the K-th down, then 0, shape (steps + 1,)."""
        if steps > self.steps:
            raise UserError(
                f"num_steps {steps} of the sampler: NoisePrediction was trained on {self.steps} steps, lower it"
            )
        index = [self.steps - 1 - math.ceil(i * self.steps / steps) for i in range(steps)]
        return torch.cat([self.levels[index], torch.zeros(1)]).to(device)


def denoising_loss(
    preconditioning: Preconditioning,
    network: nn.Module,
    rows: Tensor,
    condition: Tensor,
    generator: torch.Generator | None = None,
    weights: Tensor | None = None,
    observe: Observe | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted squared error of the denoiser (Karras et al. 2022, equation 8).

    Args:
        preconditioning: Which noise levels, and how the network is wrapped.
        network: A `dawm.diffusion.denoisers.Denoiser`.
        rows: Clean rows ``x0``, shape (B, H, R).
        condition: What the rows depend on, shape (B, C).
        generator: Source of the noise.
        weights: Weight of each entry, of mean 1 where all entries count, shape broadcastable to (B, H, R).
        observe: Puts known entries into the noisy rows, as the sampler will; give those entries weight 0.

    Returns:
        The loss, and metrics: ``denoising_error``, the unweighted squared error.
    """
    sigma = preconditioning.sample_sigmas(len(rows), generator, rows.device)
    noise = torch.randn(rows.shape, generator=generator, device=rows.device, dtype=rows.dtype)
    noisy = rows + _per_row(sigma) * noise
    if observe is not None:
        noisy = observe(noisy, sigma)
    squared_error = (preconditioning.denoise(network, noisy, sigma, condition) - rows) ** 2
    weighted = _per_row(preconditioning.loss_weight(sigma)) * squared_error
    if weights is not None:
        weighted = weights * weighted
    return weighted.mean(), {"denoising_error": squared_error.mean().detach()}


def guided(denoise_with: Denoise, denoise_without: Denoise, weight: float) -> Denoise:
    """Classifier-free guidance: ``weight * with + (1 - weight) * without``; weight 1 costs one evaluation.

    Args:
        denoise_with: The denoiser under the wanted condition.
        denoise_without: The denoiser with that condition left out.
        weight: 1 is the plain conditional model, more pulls harder.
    """
    if weight == 1:
        return denoise_with
    return lambda x, sigma: weight * denoise_with(x, sigma) + (1 - weight) * denoise_without(x, sigma)
