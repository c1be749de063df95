"""BatchedMLP: independent multi-layer perceptrons of equal shape, side by side.

Symbols: M networks in all, B batch, P weights of a network.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BatchedMLP"]


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

        Of any of the networks, whose weights have the shape (..., P).
        """
        parts = iter(weights.split(self._sizes, dim=-1))
        return [tuple(next(parts).unflatten(-1, shape) for shape in layer) for layer in self._shapes]

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of every network, shape (*ensemble, B, out), from one input for all, shape (B, in).

        Or from one for each of the outermost dimension: with the ensemble (5, 2) the shape (5, B, in) feeds both
        networks of each of the five.
        """
        return self._outputs(inputs, self.weights)

    def head(self, inputs: Tensor, index: int, detach: bool = True) -> Tensor:
        """Outputs of one network of the innermost dimension, shape (*ensemble[:-1], B, out), by default as a constant.

        With the ensemble (5, 2), index 0 asks the first network of each of the five. Inputs are as in `forward`.
        """
        weights = self.weights[..., index, :]
        return self._outputs(inputs, weights.detach() if detach else weights)

    def _outputs(self, inputs: Tensor, weights: Tensor) -> Tensor:
        ensemble = weights.shape[:-1]
        missing = len(ensemble) - (inputs.dim() - 2)
        x = inputs[(..., *missing * (None,), slice(None), slice(None))].expand(*ensemble, -1, -1).mT
        if not ensemble:
            return self._network(x, weights, torch.addmm).mT
        x, weights = x.flatten(end_dim=-3), weights.flatten(end_dim=-2)
        if x.device.type == "cpu":  # one network after the other, whose activations then stay in the cache
            outputs = torch.stack([self._network(*network, torch.addmm) for network in zip(x, weights)])
        else:
            outputs = self._network(x, weights, torch.baddbmm)
        return outputs.mT.unflatten(0, ensemble)

    def _network(self, x: Tensor, weights: Tensor, matmul: Callable[..., Tensor]) -> Tensor:
        """From x, shape (..., in, B), to (..., out, B); batch-major, a layer with one output is slow on a CPU."""
        *hidden, (last_weight, last_bias) = self.layers(weights)
        for weight, bias, *norm in hidden:
            x = matmul(bias, weight, x)
            if norm:
                scale, shift = norm
                x = torch.addcmul(shift, functional.layer_norm(x.mT, x.mT.shape[-1:]).mT, scale)
            x = functional.dropout(x.relu(), self.dropout, self.training)
        return matmul(last_bias, last_weight, x)
