"""BatchedMLP: independent multi-layer perceptrons of equal shape, side by side.

Symbols: M networks in all, C inputs, B batch, P weights of a network.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from dawm.nn import compiled

__all__ = ["BatchedMLP"]

ONE_BY_ONE = "cpu"
"""Device on which one matmul per network is faster than a batched one."""


class BatchedMLP(nn.Module):
    """Independent multi-layer perceptrons of equal shape side by side; no gradient passes between them.

    All weights are one parameter, so that an optimiser, a soft update or a sum over processes is one call. The last
    dimension holds one network, layer by layer: weight (out, in), bias (out, 1), and with ``layer_norm`` scale and
    shift of the hidden layer. Each layer is initialised as `torch.nn.Linear` is.

    Args:
        ensemble: Shape of the ensemble: () for one network, (2,) for two critics, (5, 2) for two critics of five seeds.
        in_size: Size of the input.
        hidden: Sizes of the hidden layers; empty for a linear map.
        out_size: Size of the output.
        dropout: Fraction of the hidden units dropped in training.
        layer_norm: Normalise each hidden layer before its activation, which is ReLU.
    """

    def __init__(
        self,
        ensemble: Sequence[int],
        in_size: int,
        hidden: Sequence[int],
        out_size: int,
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.layer_norm = layer_norm
        sizes = (in_size, *hidden, out_size)
        norms = [2 * [(size, 1)] if layer_norm else [] for size in hidden]
        self._shapes = [[(b, a), (b, 1), *norm] for (a, b), norm in zip(pairwise(sizes), [*norms, []])]
        self._layout = compiled.Layout(sizes, layer_norm)
        self._sizes = [math.prod(shape) for layer in self._shapes for shape in layer]
        self.weights = nn.Parameter(torch.zeros(*ensemble, sum(self._sizes)))
        with torch.no_grad():
            for weight, bias, *norm in self.layers(self.weights):
                bound = 1 / math.sqrt(weight.shape[-1])
                weight.uniform_(-bound, bound)
                bias.uniform_(-bound, bound)
                for scale in norm[:1]:
                    scale.fill_(1.0)

    def layers(self, weights: Tensor) -> list[tuple[Tensor, ...]]:
        """Weight (..., out, in), bias (..., out, 1), and scale and shift of a layer norm, of each layer; views.

        Args:
            weights: The weights of any of the networks, shape (..., P).
        """
        parts = iter(weights.split(self._sizes, dim=-1))
        return [tuple(next(parts).unflatten(-1, shape) for shape in layer) for layer in self._shapes]

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of every network, shape (*ensemble, B, out).

        Args:
            inputs: Inputs, one for all networks, shape (B, in), or one for each of the outermost dimension: with the
                ensemble (5, 2) the shape (5, B, in) feeds both networks of each of the five.
        """
        return self._outputs(inputs, self.weights)

    def head(self, inputs: Tensor, index: int) -> Tensor:
        """Outputs of one network of the innermost dimension, with constant weights, shape (*ensemble[:-1], B, out).

        Args:
            inputs: Inputs, as in `forward`.
            index: Its number; with the ensemble (5, 2), 0 asks the first network of each of the five.
        """
        return self._outputs(inputs, self.weights[..., index, :].detach())

    def _outputs(self, inputs: Tensor, weights: Tensor) -> Tensor:
        ensemble = weights.shape[:-1]
        if inputs.shape[:-2] != ensemble[: inputs.dim() - 2]:
            raise ValueError(f"inputs of shape {tuple(inputs.shape)} for networks of shape {tuple(ensemble)}")
        x = inputs.reshape(math.prod(inputs.shape[:-2]), *inputs.shape[-2:])
        weights = weights.reshape(-1, weights.shape[-1])
        if not (self.training and self.dropout) and compiled.applies(x, weights):
            outputs = compiled.CompiledMLP.apply(x, weights, self._layout, self._networks)
        else:
            outputs = self._networks(x, weights)
        return outputs.reshape(*ensemble, *outputs.shape[-2:])

    def _networks(self, x: Tensor, weights: Tensor) -> Tensor:
        """From C inputs, shape (C, B, in), each for M / C networks in a row, to (M, B, out); weights (M, P)."""
        share = len(weights) // len(x)
        if x.device.type == ONE_BY_ONE:  # one network after the other, whose activations then stay in the cache
            return torch.stack([self._network(x[m // share], own) for m, own in enumerate(weights)])
        return self._network(x.repeat_interleave(share, dim=0) if share > 1 else x, weights)

    def _network(self, x: Tensor, weights: Tensor) -> Tensor:
        """From x, shape (..., B, in), to (..., B, out)."""
        *hidden, last = self.layers(weights)
        for weight, bias, *norm in hidden:
            x = self._affine(x, weight, bias)
            if norm:
                scale, shift = norm
                x = torch.addcmul(shift.mT, functional.layer_norm(x, x.shape[-1:]), scale.mT)
            x = functional.dropout(x.relu(), self.dropout, self.training)
        return self._affine(x, *last)

    @staticmethod
    def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (torch.addmm if x.dim() == 2 else torch.baddbmm)(bias.mT, x, weight.mT)
