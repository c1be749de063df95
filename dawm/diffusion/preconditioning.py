"""Diffusion: noise levels and preconditioning, the training loss, guidance.

Symbols: B batch, H horizon, D features, C condition size.

Everything is written in the variance-exploding form of Karras et al. 2022 (arXiv 2206.00364): ``x`` is clean,
``x_t = x + sigma * n`` with ``n`` standard normal is noisy, and a denoiser ``D(x_t, sigma)`` estimates ``x``. A DDPM,
which preserves the variance, is the same thing seen through ``x_t / sqrt(1 + sigma^2)``, so any sampler serves either.

A `Preconditioning` (which levels are learnt, how the network's output becomes an estimate of ``x``) and a `Sampler` of
`dawm.diffusion.samplers` (how noise becomes ``x``) are chosen by class path. In short::

    loss, metrics = denoising_loss(preconditioning, network, x, condition)
    denoise = lambda x_t, sigma: preconditioning.denoise(network, x_t, sigma, condition)
    x = sampler.sample(denoise, preconditioning.sampler_sigmas(sampler.num_steps), noise)
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from dawm.diffusion.samplers import Denoise, Inpaint
from dawm.errors import require

__all__ = ["EDM", "NoisePrediction", "Preconditioning", "denoising_loss", "guided"]

Device = torch.device | str | None


def _broadcast(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1)."""
    return values.view(-1, 1, 1)


class Preconditioning(ABC):
    """Which noise levels are learnt, and ``D(x_t, sigma) = c_skip x_t + c_out F(c_in x_t, c_noise, condition)``.

    ``F`` is the network. ``c_noise = ln(sigma) / 4`` throughout, of order one for every level in use.
    """

    @abstractmethod
    def training_sigmas(self, batch: int, generator: Generator | None = None, device: Device = None) -> Tensor:
        """Random noise levels to train on, shape (B,)."""

    @abstractmethod
    def sampler_sigmas(self, steps: int, device: Device = None) -> Tensor:
        """The levels a sampler visits, decreasing to 0, shape (steps + 1,)."""

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``c_skip``, ``c_out`` and ``c_in`` at levels sigma, each shape (B,)."""

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared error, shape (B,); ``1 / c_out^2`` makes the targets of all levels equally large."""
        return self.coefficients(sigma)[1] ** -2

    def denoise(self, network: nn.Module, x_t: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """A `Denoiser`'s estimate of ``x`` from ``x_t`` at levels sigma, shape (B,), (B, H, D) -> (B, H, D)."""
        c_skip, c_out, c_in = (_broadcast(c) for c in self.coefficients(sigma))
        return c_skip * x_t + c_out * network(c_in * x_t, sigma.log() / 4, condition)

    def inpainting(self, known: Tensor | None) -> Inpaint | None:
        """Shows the network the known first steps, (B, K, D), free of noise and at their own scale at every level."""
        if known is None:
            return None

        def inpaint(x_t: Tensor, sigma: Tensor) -> Tensor:
            # The network sees c_in * x_t; dividing by the relative c_in makes that independent of sigma.
            relative = self.coefficients(sigma)[2] / self.coefficients(torch.zeros_like(sigma))[2]
            return torch.cat([known / _broadcast(relative), x_t[:, known.shape[1] :]], dim=1)

        return inpaint


@dataclass(eq=False)
class EDM(Preconditioning):
    """Preconditioning of Karras et al. 2022 (table 1), for a condition that leaves little open.

    The condition (s_t, a_t) gives away most of the answer, so that two numbers matter here: ``sigma_data``, the
    standard deviation over all of ``x``, and ``sigma_conditional`` = s, that under a given condition. ``c_skip =
    s^2 / (s^2 + sigma^2)`` trusts ``x_t`` only where its noise is below s, ``c_in`` scales the input to variance 1,
    and ``c_out`` the network's target::

        c_out^2 = E[(x - c_skip x_t)^2] = (1 - c_skip)^2 sigma_data^2 + c_skip^2 sigma^2

    With ``sigma_conditional = sigma_data`` these are the formulas of the paper. The defaults were measured:
    `benchmarks/results/edm-and-sampler-defaults-2026-11-24.md`.

    Args:
        sigma_data: Standard deviation of ``x``; 1 for normalised data.
        sigma_conditional: Standard deviation of ``x`` under a given condition.
        log_sigma_mean: Mean of ln(sigma) in training.
        log_sigma_std: Standard deviation of ln(sigma) in training.
        sigma_min: Lowest level of sampling above 0.
        sigma_max: Level at which sampling starts.
        rho: Exponent of the sampling levels; higher puts more of them near ``sigma_min``.
    """

    sigma_data: float = 1.0
    sigma_conditional: float = 0.1
    log_sigma_mean: float = 1.0
    log_sigma_std: float = 1.2
    sigma_min: float = 0.02
    sigma_max: float = 20.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        """Checks the levels of sampling."""
        holds, expected = 0 < self.sigma_min < self.sigma_max, f"above 0 and below sigma_max {self.sigma_max}"
        require("world_model.preconditioning.sigma_min", self.sigma_min, holds, expected)

    def training_sigmas(self, batch: int, generator: Generator | None = None, device: Device = None) -> Tensor:
        """Log-normal noise levels, shape (B,)."""
        return (self.log_sigma_mean + self.log_sigma_std * torch.randn(batch, generator=generator, device=device)).exp()

    def sampler_sigmas(self, steps: int, device: Device = None) -> Tensor:
        """``sigma_max`` to ``sigma_min`` evenly in ``sigma^(1/rho)`` (equation 5), then 0, shape (steps + 1,)."""
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64, device=device)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        levels = (high + ramp * (low - high)) ** self.rho
        return torch.cat([levels, levels.new_zeros(1)]).float()

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``c_skip``, ``c_out`` and ``c_in``, each shape (B,)."""
        c_skip = self.sigma_conditional**2 / (self.sigma_conditional**2 + sigma**2)
        # 1 - c_skip is written as a quotient: the difference would lose all digits at small sigma.
        missing = sigma**2 / (self.sigma_conditional**2 + sigma**2)
        c_out = (missing**2 * self.sigma_data**2 + c_skip**2 * sigma**2).sqrt()
        return c_skip, c_out, (self.sigma_data**2 + sigma**2).rsqrt()


class NoisePrediction(Preconditioning):
    """A DDPM that predicts the noise over a few levels of the cosine schedule; DWM trains K = 5 and samples 3.

    Level k has ``sigma_k = sqrt((1 - alpha_bar_k) / alpha_bar_k)`` with the ``alpha_bar`` of Nichol and Dhariwal 2021
    (arXiv 2102.09672, equation 17; no beta above 0.999). The network sees the variance-preserving
    ``x_t / sqrt(1 + sigma^2)`` and answers with the noise: ``D = x_t - sigma F``.

    Args:
        steps: K, the number of noise levels trained on.
        offset: The schedule's small offset near the data.
    """

    def __init__(self, steps: int = 5, offset: float = 0.008) -> None:
        require("world_model.preconditioning.steps", steps, steps >= 1, "at least 1")
        self.steps, self.offset = steps, offset
        grid = torch.arange(steps + 1, dtype=torch.float64) / steps
        cosine = torch.cos((grid + offset) / (1 + offset) * math.pi / 2) ** 2
        alpha_bar = (cosine[1:] / cosine[:-1]).clamp(min=0.001).cumprod(0)
        self.levels = ((1 - alpha_bar) / alpha_bar).sqrt().float()

    def training_sigmas(self, batch: int, generator: Generator | None = None, device: Device = None) -> Tensor:
        """Noise levels drawn uniformly from the K of the schedule, shape (B,)."""
        index = torch.randint(self.steps, (batch,), generator=generator, device=device)
        return self.levels.to(index.device)[index]

    def sampler_sigmas(self, steps: int, device: Device = None) -> Tensor:
        """Every (K / steps)-th level from the K-th down, then 0, shape (steps + 1,)."""
        expected = f"at most {self.steps}, the levels that NoisePrediction trains on"
        require("world_model.sampler.num_steps", steps, steps <= self.steps, expected, "lower it")
        index = [self.steps - 1 - math.ceil(i * self.steps / steps) for i in range(steps)]
        return torch.cat([self.levels[index], torch.zeros(1)]).to(device)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``c_skip``, ``c_out`` and ``c_in``, each shape (B,)."""
        return torch.ones_like(sigma), -sigma, (1 + sigma**2).rsqrt()


def denoising_loss(
    preconditioning: Preconditioning,
    network: nn.Module,
    x: Tensor,
    condition: Tensor,
    generator: Generator | None = None,
    weights: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted squared error of the denoiser (Karras et al. 2022, equation 8), and the unweighted one as a metric.

    Of clean samples ``x``, shape (B, H, D), under a condition (B, C). ``weights``, of mean 1, broadcast to (B, H, D);
    the ``known`` steps before ``x`` that the sampler inpaints, shape (B, K, D), are seen but not learnt.
    """
    inpaint = preconditioning.inpainting(known)
    whole = x if known is None else torch.cat([known, x], dim=1)
    sigma = preconditioning.training_sigmas(len(x), generator, x.device)
    noise = torch.randn(whole.shape, generator=generator, device=x.device, dtype=x.dtype)
    x_t = whole + _broadcast(sigma) * noise
    x_t = x_t if inpaint is None else inpaint(x_t, sigma)
    squared_error = (preconditioning.denoise(network, x_t, sigma, condition)[:, -x.shape[1] :] - x) ** 2
    weighted = _broadcast(preconditioning.loss_weight(sigma)) * squared_error
    weighted = weighted if weights is None else weights * weighted
    return weighted.mean(), {"denoising_error": squared_error.mean().detach()}


def guided(denoise_with: Denoise, denoise_without: Denoise, weight: float) -> Denoise:
    """Classifier-free guidance: ``weight * with + (1 - weight) * without`` the wanted condition.

    Weight 1 is the plain conditional model, at the cost of one evaluation; more pulls harder.
    """
    if weight == 1:
        return denoise_with
    return lambda x_t, sigma: weight * denoise_with(x_t, sigma) + (1 - weight) * denoise_without(x_t, sigma)
