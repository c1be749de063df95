"""BatchedMLP: independent multi-layer perceptrons of equal shape, side by side.

Symbols: M networks in all, B batch, P weights of a network.

The weights of all networks lie in one tensor, so that twin critics, ensembles and whole independent seeds cost one
matrix product per layer.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["BatchedMLP"]


class BatchedMLP(nn.Module):
    """Independent multi-layer perceptrons of equal shape side by side; no gradient passes between them.

    All weights are one parameter with a row for each network, so that an optimiser, a moving average or a sum over
    processes is one call, and one network is one row. Within a row, layer by layer: weight (in, out), bias (out), and
    with ``layer_norm`` scale and shift of the hidden layer. Each layer starts as `torch.nn.Linear` does.

    Args:
        members: Shape of the stack: () for one network, (2,) for two critics, (5, 2) for two critics of five seeds.
        in_size: Size of the input.
        hidden: Sizes of the hidden layers; empty for a linear map.
        out_size: Size of the output.
        dropout: Share of the hidden units dropped in training.
        layer_norm: Normalise each hidden layer before its activation, which is ReLU.
    """

    def __init__(
        self,
        members: Sequence[int],
        in_size: int,
        hidden: Sequence[int],
        out_size: int,
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.sizes = (in_size, *hidden, out_size)
        self.dropout = dropout
        self.layer_norm = layer_norm
        shapes = [[(a, b), (1, b)] for a, b in pairwise(self.sizes)]
        if layer_norm:
            for layer, size in zip(shapes, hidden):
                layer += [(1, size), (1, size)]
        self._shapes = shapes
        count = sum(math.prod(shape) for layer in shapes for shape in layer)
        self.weights = nn.Parameter(torch.zeros(*members, count))
        with torch.no_grad():
            for (weight, bias, *norm), in_size in zip(self.layers(), self.sizes):
                bound = 1 / math.sqrt(in_size)
                weight.uniform_(-bound, bound)
                bias.uniform_(-bound, bound)
                for scale in norm[:1]:
                    scale.fill_(1.0)

    def layers(self, weights: Tensor | None = None) -> list[tuple[Tensor, ...]]:
        """Weight (..., in, out), bias (..., 1, out), and scale and shift of a layer norm, of each layer; views.

        Args:
            weights: Rows of weights, shape (..., P); None takes the module's own.
        """
        weights = self.weights if weights is None else weights
        members = weights.shape[:-1]
        parts = iter(weights.split([math.prod(shape) for layer in self._shapes for shape in layer], dim=-1))
        return [tuple(next(parts).view(*members, *shape) for shape in layer) for layer in self._shapes]

    def forward(self, inputs: Tensor, weights: Tensor | None = None) -> Tensor:
        """Outputs of every network, shape (*members, B, out).

        Args:
            inputs: Inputs, one for all networks, shape (B, in), or one for each of the outermost members: with members
                (5, 2) the shape (5, B, in) feeds both networks of each of the five.
            weights: Use these in place of the module's own: rows of some of the networks, or constant ones, shape
                (*members, P), where ``members`` may be another shape.
        """
        weights = self.weights if weights is None else weights
        members = weights.shape[:-1]
        missing = len(members) - (inputs.dim() - 2)
        inputs = inputs[(..., *(None,) * missing, slice(None), slice(None))]
        inputs = inputs.expand(*members, -1, -1).reshape(math.prod(members), *inputs.shape[-2:])
        weights = weights.reshape(len(inputs), -1)
        plain = not self.layer_norm and (self.dropout == 0 or not self.training)
        # automatic mixed precision changes types between the layers, which only the general way can follow
        if plain and not torch.is_autocast_enabled(inputs.device.type):
            outputs = _ReLUNetworks.apply(inputs, weights, self)
        else:
            outputs = self._general(inputs, weights)
        return outputs.view(*members, *outputs.shape[1:])

    def _general(self, inputs: Tensor, weights: Tensor) -> Tensor:
        *layers, (last_weight, last_bias) = self.layers(weights)
        for weight, bias, *norm in layers:
            inputs = torch.baddbmm(bias, inputs, weight)
            if norm:
                scale, shift = norm
                inputs = torch.addcmul(shift, functional.layer_norm(inputs, inputs.shape[-1:]), scale)
            inputs = functional.dropout(inputs.relu(), self.dropout, self.training)
        return torch.baddbmm(last_bias, inputs, last_weight)


class _ReLUNetworks(torch.autograd.Function):
    """`BatchedMLP` with ReLU between plain layers, and its gradient, written out by hand.

    It saves three things that autograd over the single operations cannot know: activations are made in place, every
    layer's gradient is written straight to its place in the one vector of weights, and what nobody asked for (the
    gradient of constant weights, of the data) is not computed. With n the pre-activations, h the activations:

        n_l = h_{l-1} W_l + b_l        h_l = max(n_l, 0)
        dn_l = dh_l 1(h_l > 0)         dW_l = h_{l-1}^T dn_l       db_l = sum_B dn_l       dh_{l-1} = dn_l W_l^T
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weights: Tensor, network: BatchedMLP) -> Tensor:
        """Outputs, shape (M, B, out), for inputs of shape (M, B, in) and weights of shape (M, P)."""
        activations = [inputs]
        *layers, last = network.layers(weights)
        for weight, bias in layers:
            activations.append(_affine(activations[-1], weight, bias).relu_())
        ctx.network = network
        ctx.save_for_backward(weights, *activations)
        return _affine(activations[-1], *last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of inputs and weights, where they are asked for."""
        weights, *activations = ctx.saved_tensors
        wants_inputs, wants_weights, _ = ctx.needs_input_grad
        layers = ctx.network.layers(weights)
        weights_gradient = torch.empty_like(weights, memory_format=torch.contiguous_format) if wants_weights else None
        places = ctx.network.layers(weights_gradient) if wants_weights else layers
        for index in reversed(range(len(layers))):
            if wants_weights:
                torch.bmm(activations[index].transpose(1, 2), gradient, out=places[index][0])
                torch.sum(gradient, dim=1, keepdim=True, out=places[index][1])
            if index > 0 or wants_inputs:
                gradient = torch.bmm(gradient, layers[index][0].transpose(1, 2))
            if index > 0:
                # the derivative of ReLU, in place
                torch.ops.aten.threshold_backward(gradient, activations[index], 0, grad_input=gradient)
        return (gradient if wants_inputs else None), weights_gradient, None


def _affine(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if len(inputs) == 1:  # a plain product is faster than a batch of one
        return torch.addmm(bias[0], inputs[0], weight[0]).unsqueeze(0)
    return torch.baddbmm(bias, inputs, weight)
