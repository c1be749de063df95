"""Denoisers of the world model.

Symbols: B batch, H horizon, D features, C condition size.

A `Denoiser` is what the world model trains; any class that keeps its contract can be named in a config.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from dawm.errors import require
from dawm.nn import compiled

__all__ = ["Denoiser", "ResidualMLP", "TemporalTransformer", "TemporalUNet"]
DEEPEST = 1000  # more layers would only run out of memory


class Denoiser(nn.Module, ABC):
    """The network ``F`` inside a preconditioning.

    A subclass takes the three sizes H, D, C first and its own typed settings, which its docstring explains, after them.
    """

    def __init__(self, horizon: int, features: int, condition_size: int) -> None:
        super().__init__()
        self.horizon, self.features, self.condition_size = horizon, features, condition_size

    @abstractmethod
    def forward(self, x_t: Tensor, noise_level: Tensor, condition: Tensor) -> Tensor:
        """The network's answer, shape (B, H, D), to noisy samples scaled to variance 1, shape (B, H, D).

        ``noise_level``, shape (B,), is the preconditioning's ``c_noise``, of order 1; ``condition`` has shape (B, C).
        """


class _Embedding(nn.Module):
    """Noise level and condition together as one vector.

    The noise level enters as sines and cosines of geometrically spaced frequencies: with ``c_noise = ln(sigma) / 4``
    their periods run from 16 to 0.5 in ln(sigma), from slower than the whole range to finer than a sampler's step.
    """

    frequencies: Tensor

    def __init__(self, condition_size: int, width: int, frequencies: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-2, 3, frequencies, base=2) * 2 * math.pi, persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(condition_size + 2 * frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def inputs(self, noise_level: Tensor, condition: Tensor) -> Tensor:
        """What the layers see."""
        angles = noise_level.unsqueeze(-1) * self.frequencies
        return torch.cat([condition, angles.sin(), angles.cos()], dim=-1)

    def forward(self, noise_level: Tensor, condition: Tensor) -> Tensor:
        """The embedding, shape (B, width)."""
        return self.layers(self.inputs(noise_level, condition))


class _MLPBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(2 * width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        inner = functional.silu(self.inner(torch.cat([self.norm(hidden), embedding], dim=-1)))
        return hidden + self.outer(inner)


class ResidualMLP(Denoiser):
    """The whole horizon as one vector through residual blocks; the fastest on CPU.

    Args:
        width: Size of the hidden layers.
        depth: Number of residual blocks, of two layers each.
    """

    def __init__(self, horizon: int, features: int, condition_size: int, width: int = 256, depth: int = 2) -> None:
        require("world_model.network.width", width, width >= 1, "at least 1")
        require("world_model.network.depth", depth, 1 <= depth <= DEEPEST, f"from 1 to {DEEPEST}")
        super().__init__(horizon, features, condition_size)
        self.embedding = _Embedding(condition_size, width)
        self.first = nn.Linear(horizon * features + width, width)
        self.blocks = nn.ModuleList(_MLPBlock(width) for _ in range(depth))
        self.last = nn.Linear(width, horizon * features)

    def forward(self, x_t: Tensor, noise_level: Tensor, condition: Tensor) -> Tensor:
        """The network's answer, shape (B, H, D)."""
        inputs = self.embedding.inputs(noise_level, condition)
        applies = compiled.applies(x_t, inputs, self.last.weight)
        if applies and not (x_t.requires_grad or inputs.requires_grad):
            width = self.last.in_features
            return compiled.CompiledResidual.apply(x_t.flatten(1), inputs, width, *self.parameters()).view_as(x_t)
        embedding = self.embedding.layers(inputs)
        hidden = self.first(torch.cat([x_t.flatten(1), embedding], dim=-1))
        for block in self.blocks:
            hidden = block(hidden, embedding)
        return self.last(hidden).view_as(x_t)


class _TemporalBlock(nn.Module):
    """Two convolutions over time with group norm and Mish; the embedding is added between them."""

    def __init__(self, channels_in: int, channels: int, embedding_size: int, kernel_size: int) -> None:
        super().__init__()
        groups = math.gcd(8, channels)
        self.first = nn.Conv1d(channels_in, channels, kernel_size, padding="same")
        self.first_norm = nn.GroupNorm(groups, channels)
        self.embedding = nn.Linear(embedding_size, channels)
        self.second = nn.Conv1d(channels, channels, kernel_size, padding="same")
        self.second_norm = nn.GroupNorm(groups, channels)
        self.skip = nn.Conv1d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = functional.mish(self.first_norm(self.first(x))) + self.embedding(embedding).unsqueeze(-1)
        return functional.mish(self.second_norm(self.second(hidden))) + self.skip(x)


class TemporalUNet(Denoiser):
    """One-dimensional U-Net over the horizon (Janner et al. 2022, arXiv 2205.09991, appendix), for any horizon.

    With three multipliers it has DWM's six residual blocks: three on the way down, one in the middle, two up.

    Args:
        width: Channels of the first level.
        multipliers: Channels of each level as multiples of ``width``; each level after the first halves the length.
        kernel_size: Odd size of the convolutions.
    """

    def __init__(
        self,
        horizon: int,
        features: int,
        condition_size: int,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 4),
        kernel_size: int = 5,
    ) -> None:
        require("world_model.network.width", width, width >= 1, "at least 1")
        lowest = min(multipliers, default=0)
        require("world_model.network.multipliers", multipliers, lowest >= 1, "numbers of at least 1")
        require("world_model.network.kernel_size", kernel_size, kernel_size % 2 == 1, "an odd number")
        super().__init__(horizon, features, condition_size)
        channels = [width * multiplier for multiplier in multipliers]
        pairs = list(pairwise(channels))
        block = partial(_TemporalBlock, embedding_size=4 * width, kernel_size=kernel_size)
        self.embedding = _Embedding(condition_size, 4 * width)
        self.down = nn.ModuleList(block(a, b) for a, b in zip([features, *channels[:-1]], channels))
        self.shorten = nn.ModuleList(nn.Conv1d(a, a, 3, stride=2, padding=1) for a, _ in pairs)
        self.middle = block(channels[-1], channels[-1])
        self.lengthen = nn.ModuleList(nn.Conv1d(b, a, 3, padding=1) for a, b in reversed(pairs))
        self.up = nn.ModuleList(block(2 * a, a) for a, _ in reversed(pairs))
        self.last = nn.Conv1d(channels[0], features, 1)

    def forward(self, x_t: Tensor, noise_level: Tensor, condition: Tensor) -> Tensor:
        """The network's answer, shape (B, H, D)."""
        embedding = self.embedding(noise_level, condition)
        hidden = self.down[0](x_t.transpose(1, 2), embedding)
        skips = []
        for shorten, block in zip(self.shorten, self.down[1:]):
            skips.append(hidden)
            hidden = block(shorten(hidden), embedding)
        hidden = self.middle(hidden, embedding)
        for lengthen, block in zip(self.lengthen, self.up):
            skip = skips.pop()
            # To the skip's own length rather than twice the length: half an odd horizon was rounded up.
            hidden = lengthen(functional.interpolate(hidden, size=skip.shape[-1]))
            hidden = block(torch.cat([hidden, skip], dim=1), embedding)
        return self.last(hidden).transpose(1, 2)


class TemporalTransformer(Denoiser):
    """Steps as tokens; the embedding of noise level and condition is added to each of them before every layer.

    Args:
        width: Size of a token.
        depth: Number of layers.
        heads: Attention heads; must divide ``width``.
    """

    def __init__(
        self, horizon: int, features: int, condition_size: int, width: int = 128, depth: int = 2, heads: int = 4
    ) -> None:
        require("world_model.network.width", width, width >= 1, "at least 1")
        require("world_model.network.depth", depth, 1 <= depth <= DEEPEST, f"from 1 to {DEEPEST}")
        divides = heads >= 1 and width % heads == 0
        require("world_model.network.heads", heads, divides, f"a divisor of width {width}")
        super().__init__(horizon, features, condition_size)
        self.embedding = _Embedding(condition_size, width)
        self.first = nn.Linear(features, width)
        self.positions = nn.Parameter(0.02 * torch.randn(horizon, width))
        self.embeddings = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        layer = nn.TransformerEncoderLayer
        self.layers = nn.ModuleList(
            layer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(depth)
        )
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, features))

    def forward(self, x_t: Tensor, noise_level: Tensor, condition: Tensor) -> Tensor:
        """The network's answer, shape (B, H, D)."""
        embedding = self.embedding(noise_level, condition)
        tokens = self.first(x_t) + self.positions
        for project, layer in zip(self.embeddings, self.layers):
            tokens = layer(tokens + project(embedding).unsqueeze(1))
        return self.last(tokens)
