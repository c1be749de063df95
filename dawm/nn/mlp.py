"""BatchedMLP: independent multi-layer perceptrons of equal shape, side by side.

Symbols: M networks in all, B batch, P weights of a network.

The weights of all networks lie in one tensor, so that an optimiser or a moving average is one call, and on a GPU twin
critics, ensembles and whole independent seeds cost one matrix product per layer.
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

Layers = list[tuple[Tensor, ...]]
"""Weight and bias of each layer."""


class BatchedMLP(nn.Module):
    """Independent multi-layer perceptrons of equal shape side by side; no gradient passes between them.

    All weights are one parameter with a row for each network, so that an optimiser, a moving average or a sum over
    processes is one call, and one network is one row. Within a row, layer by layer: weight (out, in), bias (out, 1),
    and with ``layer_norm`` scale and shift of the hidden layer. Each layer starts as `torch.nn.Linear` does.

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
        self.members = tuple(members)
        self.dropout = dropout
        self.layer_norm = layer_norm
        sizes = (in_size, *hidden, out_size)
        self._shapes = [[(b, a), (b, 1)] for a, b in pairwise(sizes)]
        if layer_norm:
            for layer, size in zip(self._shapes, hidden):
                layer += [(size, 1), (size, 1)]
        self._sizes = [math.prod(shape) for layer in self._shapes for shape in layer]
        self.weights = nn.Parameter(torch.zeros(*members, sum(self._sizes)))
        self._views: tuple[int, dict[int | None, list[Layers]]] = (0, {})
        with torch.no_grad():
            for (weight, bias, *norm), in_size in zip(self.layers(), sizes):
                bound = 1 / math.sqrt(in_size)
                weight.uniform_(-bound, bound)
                bias.uniform_(-bound, bound)
                for scale in norm[:1]:
                    scale.fill_(1.0)

    def __getstate__(self) -> dict[str, Any]:
        """Without the views: a copy makes its own, of its own weights."""
        return {**self.__dict__, "_views": (0, {})}

    def layers(self, weights: Tensor | None = None) -> Layers:
        """Weight (..., out, in), bias (..., out, 1), and scale and shift of a layer norm, of each layer; views.

        Args:
            weights: Rows of weights, or of as many numbers that belong to them, shape (..., P); None takes the
                module's own.
        """
        weights = self.weights if weights is None else weights
        parts = iter(weights.split(self._sizes, dim=-1))
        return [tuple(next(parts).view(*weights.shape[:-1], *shape) for shape in layer) for layer in self._shapes]

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of every network, shape (*members, B, out).

        Args:
            inputs: Inputs, one for all networks, shape (B, in), or one for each of the outermost members: with members
                (5, 2) the shape (5, B, in) feeds both networks of each of the five.
        """
        return self._run(inputs, self.members, None)

    def frozen(self, inputs: Tensor, copy: int) -> Tensor:
        """Outputs of one of the innermost members, whose weights are constants, shape (*members[:-1], B, out).

        Args:
            inputs: Inputs, as in `forward`.
            copy: Number of the member; with members (5, 2), 0 asks the first network of each of the five.
        """
        return self._run(inputs, self.members[:-1], copy)

    def _run(self, inputs: Tensor, members: tuple[int, ...], copy: int | None) -> Tensor:
        if inputs.shape[:-2] != members:
            missing = len(members) - (inputs.dim() - 2)
            inputs = inputs[(..., *(None,) * missing, slice(None), slice(None))].expand(*members, -1, -1)
        inputs = inputs.reshape(-1, *inputs.shape[-2:])
        plain = not self.layer_norm and (self.dropout == 0 or not self.training)
        # automatic mixed precision changes types between the layers, which only the general way can follow
        if plain and not torch.is_autocast_enabled(inputs.device.type):
            outputs = _ReLUNetworks.apply(inputs, self.weights if copy is None else None, self, copy)
        else:
            outputs = self._general(inputs, copy)
        return outputs.view(*members, *outputs.shape[1:])

    def _general(self, inputs: Tensor, copy: int | None) -> Tensor:
        *layers, (last_weight, last_bias) = self.layers(_rows(self.weights, copy))
        for weight, bias, *norm in layers:
            inputs = torch.baddbmm(bias.mT, inputs, weight.mT)
            if norm:
                scale, shift = norm
                inputs = torch.addcmul(shift.mT, functional.layer_norm(inputs, inputs.shape[-1:]), scale.mT)
            inputs = functional.dropout(inputs.relu(), self.dropout, self.training)
        return torch.baddbmm(last_bias.mT, inputs, last_weight.mT)

    def _constants(self, copy: int | None) -> list[Layers]:
        """The layers, part by part, of all networks or of one innermost member; made once, not at every use."""
        place = self.weights.data_ptr()
        if self._views[0] != place:  # first use, or moved to another device
            self._views = (place, {})
        views = self._views[1]
        if copy not in views:
            views[copy] = [self.layers(part) for part in _parts(_rows(self.weights.detach(), copy))]
        return views[copy]


class _ReLUNetworks(torch.autograd.Function):
    """`BatchedMLP` with ReLU between plain layers, and its gradient, written out by hand.

    It saves three things that autograd over the single operations cannot know: activations are made in place, every
    layer's gradient is written straight to its place in the one tensor of weights, and what nobody asked for (the
    gradient of constant weights, of the data) is not computed. With n the pre-activations, h the activations, each
    with a column for every row of the batch (the last layer's few outputs as columns would be slow on a CPU):

        n_l = W_l h_{l-1} + b_l        h_l = max(n_l, 0)
        dn_l = dh_l 1(h_l > 0)         dW_l = dn_l h_{l-1}^T       db_l = sum_B dn_l       dh_{l-1} = W_l^T dn_l
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weights: Tensor | None, network: BatchedMLP, copy: int | None) -> Tensor:
        """Outputs, shape (M, B, out), for inputs of shape (M, B, in); without ``weights`` they are constants."""
        activations, outputs = [], []
        for layers, part in zip(network._constants(copy), _parts(inputs)):
            hidden = part.mT
            for weight, bias in layers[:-1]:
                activations.append(hidden)
                hidden = torch.matmul(weight, hidden).add_(bias).relu_()
            activations.append(hidden)
            outputs.append(torch.matmul(layers[-1][0], hidden).add_(layers[-1][1]))
        ctx.network, ctx.copy = network, copy
        ctx.save_for_backward(network.weights, *activations)
        return _whole(outputs).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of inputs and weights, where they are asked for."""
        weights, *activations = ctx.saved_tensors
        wants_inputs, wants_weights, *_ = ctx.needs_input_grad
        constants = ctx.network._constants(ctx.copy)
        weights_gradient, places = None, len(constants) * [None]
        if wants_weights:
            weights_gradient = torch.empty_like(weights)
            places = [ctx.network.layers(part) for part in _parts(_rows(weights_gradient, ctx.copy))]
        inputs_gradients: list[Tensor] = []
        for layers, place, part in zip(constants, places, _parts(gradient)):
            gradient = part.mT
            for index in reversed(range(len(layers))):
                hidden = activations[len(layers) * len(inputs_gradients) + index]
                if place is not None:
                    torch.matmul(gradient, hidden.mT, out=place[index][0])
                    torch.sum(gradient, dim=-1, keepdim=True, out=place[index][1])
                if index > 0 or wants_inputs:
                    gradient = torch.matmul(layers[index][0].mT, gradient)
                if index > 0:
                    # the derivative of ReLU, in place
                    torch.ops.aten.threshold_backward.grad_input(gradient, hidden, 0, grad_input=gradient)
            inputs_gradients.append(gradient)
        return (_whole(inputs_gradients).mT if wants_inputs else None), weights_gradient, None, None


def _rows(weights: Tensor, copy: int | None) -> Tensor:
    """Weights with a row for each network, or for one innermost member of each stack and as constants, shape (M, P)."""
    chosen = weights if copy is None else weights.detach()[..., copy, :]
    return chosen.reshape(-1, weights.shape[-1])


def _parts(networks: Tensor) -> Sequence[Tensor]:
    """What to compute at once: all networks on a GPU; on a CPU one at a time, whose numbers then stay in its cache."""
    return networks.unbind() if networks.device.type == "cpu" else (networks,)


def _whole(parts: list[Tensor]) -> Tensor:
    """The inverse of `_parts` for feature-major results, shape (M, features, B)."""
    return torch.stack(parts) if parts[0].dim() == 2 else parts[0]
