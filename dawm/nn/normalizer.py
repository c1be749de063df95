"""Normalizer: per-dimension shift and scale, kept as buffers so that it is saved with the model."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Normalizer"]


class Normalizer(nn.Module):
    """Standardises values by the mean and standard deviation of the data it was fitted to.

    A dimension that does not vary in the data is only shifted (scale 1), so that nothing is divided by zero.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.fitted = False

    @torch.no_grad()
    def fit(self, values: Tensor) -> None:
        """Takes mean and standard deviation from data, shape (N, D)."""
        std, mean = torch.std_mean(values.double(), dim=0, correction=0)
        # relative to the size of the values: float32 rounding of a constant is not variation
        constant = std <= 1e-6 * values.abs().amax(dim=0).clamp(min=1e-6)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(constant, torch.ones_like(std), std))
        self.fitted = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.fitted = True

    def forward(self, values: Tensor) -> Tensor:
        """Normalised values from those in the data's units, shape (..., D)."""
        return (values - self.mean) / self.std

    def inverse(self, values: Tensor) -> Tensor:
        """Values in the data's units from normalised ones, shape (..., D)."""
        return values * self.std + self.mean
