"""Samplers: from noise to ``x`` in a few evaluations of a denoiser.

Symbols: B batch, H horizon, D features, N steps. As in `dawm.diffusion.preconditioning`, ``x`` is clean and
``x_t = x + sigma * n`` is noisy.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Generator, Tensor

from dawm.errors import require

__all__ = ["DDIM", "DPMSolverPP2M", "Denoise", "Estimate", "Heun", "Inpaint", "Sampler"]

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Estimates ``x``, shape (B, H, D), from ``x_t``, shape (B, H, D), at level sigma, shape (B,)."""
Inpaint = Callable[[Tensor, Tensor], Tensor]
"""Overwrites the known steps of ``x_t``, shape (B, H, D), at level sigma, shape (B,)."""


class Estimate:
    """A `Denoise` at one level for the whole batch; it inpaints, clips, and remembers its last level and estimate."""

    def __init__(self, denoise: Denoise, inpaint: Inpaint | None, clip: float | None) -> None:
        self._denoise, self._inpaint, self._clip = denoise, inpaint, clip
        self.last: tuple[float, Tensor] | None = None

    def __call__(self, x_t: Tensor, sigma: float) -> Tensor:
        """Estimate of ``x`` from ``x_t``, (B, H, D) -> (B, H, D); the denoiser never sees a known step with noise."""
        level = _full(x_t, sigma)
        x = self._denoise(x_t if self._inpaint is None else self._inpaint(x_t, level), level)
        x = x if self._clip is None else x.clamp(-self._clip, self._clip)
        self.last = sigma, x
        return x


class Sampler(ABC):
    """Goes down the noise levels; a subclass is a dataclass with the two fields below, and writes one `step`.

    Args:
        num_steps: N, the number of noise levels above 0.
        clip: Estimates of ``x`` are held within [-clip, clip]; None leaves them. For data with known bounds.
    """

    num_steps: int
    clip: float | None

    def __post_init__(self) -> None:
        """Checks the number of steps."""
        require("world_model.sampler.num_steps", self.num_steps, self.num_steps >= 1, "at least 1")

    def sample(
        self,
        denoise: Denoise,
        sigmas: Tensor,
        noise: Tensor,
        generator: Generator | None = None,
        inpaint: Inpaint | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """Clean samples ``x`` from standard normal numbers, (B, H, D) -> (B, H, D).

        Over decreasing levels that end in 0, shape (N + 1,); the known steps are inpainted before every evaluation and
        at the end. Some samplers add noise of the generator on the way. Clean samples ``x``, if given, are noised to
        the first level to begin with.
        """
        estimate = Estimate(denoise, inpaint, self.clip)
        levels: list[float] = sigmas.tolist()
        x_t = levels[0] * noise if x is None else x + levels[0] * noise
        for sigma, lower in pairwise(levels):
            x_t = self.step(x_t, sigma, lower, estimate, generator)
        return x_t if inpaint is None else inpaint(x_t, _full(x_t, levels[-1]))

    @abstractmethod
    def step(self, x_t: Tensor, sigma: float, lower: float, estimate: Estimate, generator: Generator | None) -> Tensor:
        """From the level ``sigma`` of ``x_t`` to the ``lower`` one, 0 in the last step, (B, H, D) -> (B, H, D).

        ``estimate.last`` is the estimate of the step before, None in the first step.
        """


@dataclass(eq=False)
class DDIM(Sampler):
    """DDIM (Song et al. 2020, arXiv 2010.02502, equation 12) and, with eta 1, ancestral DDPM sampling; N evaluations.

    Args:
        eta: 0 is deterministic; 1 samples the posterior of the level below.
        temperature: Factor on the standard deviation of the added noise; DWM samples with eta 1 and temperature 0.5.
    """

    num_steps: int = 10
    eta: float = 0.0
    temperature: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        """Checks the settings."""
        super().__post_init__()
        require("world_model.sampler.eta", self.eta, 0 <= self.eta <= 1, "from 0 to 1")

    def step(self, x_t: Tensor, sigma: float, lower: float, estimate: Estimate, generator: Generator | None) -> Tensor:
        """Keeps a part of the level's noise and draws the rest, shape (B, H, D)."""
        x = estimate(x_t, sigma)
        # Given x_t and x, the noise at the lower level is normal with variance lower^2 (1 - lower^2 / sigma^2).
        # That much is drawn afresh (times eta^2); the rest of the level's noise is kept from x_t.
        fresh = self.eta * lower * math.sqrt(1 - (lower / sigma) ** 2)
        kept = math.sqrt(lower**2 - fresh**2)
        x_t = x + kept / sigma * (x_t - x)
        if self.temperature * fresh > 0:
            x_t = x_t + self.temperature * fresh * _normal_like(x_t, generator)
        return x_t


@dataclass(eq=False)
class DPMSolverPP2M(Sampler):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order at N evaluations.

    Six steps were as good as 128 on three data sets: `benchmarks/results/edm-and-sampler-defaults-2026-11-24.md`.
    """

    num_steps: int = 6
    clip: float | None = None

    def step(self, x_t: Tensor, sigma: float, lower: float, estimate: Estimate, generator: Generator | None) -> Tensor:
        """Extrapolates from the estimate before, shape (B, H, D)."""
        last, x = estimate.last, estimate(x_t, sigma)
        ahead = x
        if last is not None and lower > 0:  # the step to 0 is of first order: ln(sigma) has no end
            ratio = math.log(last[0] / sigma) / math.log(sigma / lower)
            ahead = x + (x - last[1]) / (2 * ratio)
        return ahead + lower / sigma * (x_t - ahead)


@dataclass(eq=False)
class Heun(Sampler):
    """Heun's second-order sampler of Karras et al. 2022 (algorithms 1 and 2); 2 N - 1 evaluations.

    Args:
        churn: S_churn, the noise added and removed again over the whole run; 0 is deterministic.
        churn_min: S_tmin, the lowest level at which noise is added.
        churn_max: S_tmax, the highest level at which noise is added.
    """

    num_steps: int = 10
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    clip: float | None = None

    def step(self, x_t: Tensor, sigma: float, lower: float, estimate: Estimate, generator: Generator | None) -> Tensor:
        """An Euler step with the mean slope of its two ends, shape (B, H, D)."""
        growth = 1 + min(self.churn / self.num_steps, math.sqrt(2) - 1)
        if growth > 1 and self.churn_min <= sigma <= self.churn_max:
            x_t = x_t + sigma * math.sqrt(growth**2 - 1) * _normal_like(x_t, generator)
            sigma *= growth
        slope = (x_t - estimate(x_t, sigma)) / sigma
        if lower > 0:
            euler = x_t + (lower - sigma) * slope
            slope = (slope + (euler - estimate(euler, lower)) / lower) / 2
        return x_t + (lower - sigma) * slope


def _full(x_t: Tensor, sigma: float) -> Tensor:
    """One noise level for each sample, shape (B,)."""
    return x_t.new_full((len(x_t),), sigma)


def _normal_like(x: Tensor, generator: Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
