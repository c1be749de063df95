"""The networks' arithmetic compiled ahead of time (`mlp.c`), for float32 on processors with AVX-512.

An MLP's layers, their gradients, bias, ReLU and layer norm as a few calls, instead of some twenty operations that each
read and write whole matrices. Where it was not built, or does not apply, PyTorch computes the same; the choice depends
on the installation and the processor alone, so that a run that is resumed rounds as before.

Symbols: M networks, C inputs, B batch, P weights of a network.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["CompiledMLP", "CompiledResidual", "Layout", "applies", "has_bf16", "rounding"]

_rounds = False  # whether matmuls round their factors to bfloat16

FEWEST = 32  # rows of a residual MLP for a thread of its own
PANEL = 48  # columns of a matrix that mlp.c packs at once
NEEDED = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")


class Layout:
    """What each of some networks of equal shape looks like.

    Args:
        sizes: Sizes of the input, the hidden layers and the output.
        layer_norm: Whether each hidden layer is normalised.
    """

    def __init__(self, sizes: Sequence[int], layer_norm: bool) -> None:
        self.out_size, self.widest = sizes[-1], max(sizes)
        self.saved = sum(2 * size + 1 if layer_norm else size for size in sizes[1:-1])  # for the backward pass, per row
        self._numbers = (ctypes.c_int64 * len(sizes))(*sizes)
        self.arguments = len(sizes) - 1, self._numbers, layer_norm

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles as its two arguments."""
        return Layout, (tuple(self._numbers), self.arguments[2])


@cache
def library() -> ctypes.CDLL | None:
    """The compiled half; None where it was not built or the processor lacks AVX-512."""
    processor = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    paths = (Path(__file__).with_name(f"_mlp{suffix}") for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.exists()), None)
    if path is None or not all(processor.get(name) for name in NEEDED):
        return None
    found = ctypes.CDLL(str(path))
    n, p = ctypes.c_int64, ctypes.c_void_p
    found.mlp_forward.argtypes = [n, n, n, n, p, n, n, p, p, n, p, n, p, p, p]
    found.mlp_backward.argtypes = [n, n, n, n, p, n, n, p, p, n, p, n, p, p, n, p, p, p, p]
    found.residual_saved.argtypes, found.residual_saved.restype = 5 * [n], n
    found.residual_forward.argtypes = [*5 * [n], *7 * [p]]
    found.residual_backward.argtypes = [*5 * [n], *8 * [p]]
    return found


def has_bf16() -> bool:
    """Whether the compiled half is in use and the processor multiplies bfloat16."""
    return library() is not None and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


@contextmanager
def rounding(bf16: bool) -> Iterator[None]:
    """Within it forward passes, and the backward passes of these, round the factors of their matmuls to bfloat16.

    Sums, activations, gradients and weights stay in single precision.
    """
    global _rounds
    before, _rounds = _rounds, bf16
    try:
        yield
    finally:
        _rounds = before


def applies(x: Tensor, weights: Tensor) -> bool:
    """Whether the compiled half can compute these: plain float32 on a CPU."""
    plain = x.dtype == weights.dtype == torch.float32 and x.device.type == weights.device.type == "cpu"
    traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    return plain and x.numel() > 0 and not traced and not torch.is_autocast_enabled("cpu") and library() is not None


class CompiledMLP(torch.autograd.Function):
    """M networks on C inputs, each for M / C networks in a row: ``CompiledMLP.apply(x, weights, layout, plain)``.

    Of x, shape (C, B, in), and weights, shape (M, P), as `BatchedMLP` lays them out, to (M, B, out). ``plain`` computes
    the same in PyTorch, for gradients of gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, layout: Layout, plain: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Outputs of all networks."""
        x, weights = x.contiguous(), weights if weights.stride(1) == 1 else weights.contiguous()
        count, batch = len(weights), x.shape[1]
        # without a gradient to come networks that follow each other use the same memory, which then stays in the cache
        shared = not any(ctx.needs_input_grad) and torch.get_num_threads() == 1
        saved = x.new_empty(1 if shared else count, batch * layout.saved)
        outputs = x.new_empty(count, batch, layout.out_size)
        ctx.save_for_backward(x, weights, saved)
        ctx.layout, ctx.plain, ctx.rounds = layout, plain, _rounds
        before = count // len(x), *layout.arguments, batch, x.data_ptr(), weights.data_ptr(), weights.stride(0)
        keep = 0 if shared else saved.stride(0)
        call = library().mlp_forward  # type: ignore[union-attr]

        def compute(first: int, stop: int) -> None:
            panel, halves = _scratch(max(batch, layout.widest), ctx.rounds)
            pointers = saved.data_ptr(), keep, outputs.data_ptr(), panel.data_ptr(), _address(halves)
            call(first, stop, *before, *pointers)

        bounds = _bounds(count)
        _run(compute, bounds[:-1], bounds[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the weights."""
        x, weights, saved = ctx.saved_tensors
        (gradient,) = gradients
        if torch.is_grad_enabled():  # as in a gradient penalty
            wanted = [tensor for tensor, needed in zip((x, weights), ctx.needs_input_grad) if needed]
            found = iter(torch.autograd.grad(ctx.plain(x, weights), wanted, gradient, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None, None
        layout, count, batch = ctx.layout, len(weights), x.shape[1]
        gradient = gradient.contiguous()
        of_x = x.new_empty(count, *x.shape[1:]) if ctx.needs_input_grad[0] else None
        of_weights = weights.new_empty(weights.shape) if ctx.needs_input_grad[1] else None
        call = library().mlp_backward  # type: ignore[union-attr]
        arguments = (
            count // len(x), *layout.arguments, batch, x.data_ptr(), weights.data_ptr(), weights.stride(0),
            saved.data_ptr(), saved.stride(0), gradient.data_ptr(), _address(of_weights), weights.shape[1],
            _address(of_x),
        )  # fmt: skip

        def compute(first: int, stop: int) -> None:
            panel, halves = _scratch(max(batch, layout.widest), ctx.rounds)
            between = x.new_empty(2 * batch * layout.widest)
            call(first, stop, *arguments, panel.data_ptr(), _address(halves), between.data_ptr())

        bounds = _bounds(count)
        _run(compute, bounds[:-1], bounds[1:])
        if of_x is not None and count > len(x):
            of_x = of_x.unflatten(0, (len(x), -1)).sum(dim=1)
        return of_x, of_weights, None, None


class CompiledResidual(torch.autograd.Function):
    """A residual MLP: ``CompiledResidual.apply(x, features, width, *parameters)``; gradients are those of parameters.

    Of x, shape (B, in), and features, shape (B, F), to (B, in); parameters in the order that `residual.c` names.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, features: Tensor, width: int, *parameters: Tensor) -> Tensor:
        """The network's answer."""
        x, features = x.contiguous(), features.contiguous()
        sizes = x.shape[1], features.shape[1], width, (len(parameters) - 8) // 6
        outputs, bounds = torch.empty_like(x), _bounds(max(1, len(x) // FEWEST))
        rows = [range(*(len(x) * bound // bounds[-1] for bound in pair)) for pair in pairwise(bounds)]
        call, size = library().residual_forward, library().residual_saved  # type: ignore[union-attr]
        saved = [x.new_empty(size(len(part), *sizes)) for part in rows]
        pointers, rounds = _pointers(parameters), _rounds

        def compute(part: range, keep: Tensor) -> None:
            panel, halves = _scratch(max(len(part), 2 * width, width + sizes[0], sizes[1]), rounds)
            of_part = (tensor[part.start].data_ptr() for tensor in (x, features))
            call(len(part), *sizes, *of_part, pointers, keep.data_ptr(), outputs[part.start].data_ptr(),
                 panel.data_ptr(), _address(halves))  # fmt: skip

        _run(compute, rows, saved)
        ctx.save_for_backward(features, *saved, *parameters)
        ctx.sizes, ctx.rows, ctx.rounds = sizes, rows, rounds
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the parameters."""
        (features, *rest), sizes, rounds, gradient = ctx.saved_tensors, ctx.sizes, ctx.rounds, gradient.contiguous()
        saved, parameters = rest[: len(ctx.rows)], rest[len(ctx.rows) :]
        call, pointers, width = library().residual_backward, _pointers(parameters), sizes[2]  # type: ignore[union-attr]
        found = [[torch.empty_like(parameter) for parameter in parameters] for _ in ctx.rows]

        def compute(part: range, keep: Tensor, gradients: Sequence[Tensor]) -> None:
            panel, halves = _scratch(max(len(part), 2 * width, width + sizes[0], sizes[1]), rounds)
            between = features.new_empty(len(part) * (6 * width + sizes[0]))
            call(len(part), *sizes, features[part.start].data_ptr(), pointers, keep.data_ptr(),
                 gradient[part.start].data_ptr(), _pointers(gradients), panel.data_ptr(), _address(halves),
                 between.data_ptr())  # fmt: skip

        _run(compute, ctx.rows, saved, found)
        for other in found[1:]:
            torch._foreach_add_(found[0], other)
        return None, None, None, *found[0]


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _scratch(size: int, rounds: bool) -> tuple[Tensor, Tensor | None]:
    # aligned to 64 bytes, as all of PyTorch's memory
    return torch.empty(PANEL * size), torch.empty((size + 1) // 2 * size) if rounds else None


def _bounds(count: int) -> list[int]:
    """Bounds of consecutive parts of so many things, one for each of PyTorch's threads."""
    parts = min(torch.get_num_threads(), count)
    return [count * part // parts for part in range(parts + 1)]


def _run(compute: Callable[..., None], *arguments: Sequence[Any]) -> None:
    """Computes all parts, several at once in threads of their own; the library lets go of Python meanwhile."""
    if len(arguments[0]) == 1:
        compute(*(argument[0] for argument in arguments))
    else:
        list(_threads(len(arguments[0])).map(compute, *arguments))


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)
