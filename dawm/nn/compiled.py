"""The networks' arithmetic compiled ahead of time (`mlp.c`), for float32 on processors with AVX-512 or AVX2.

An MLP's layers, their gradients, bias, ReLU and layer norm as a few calls, instead of some twenty operations that each
read and write whole matrices. They run in as many threads as PyTorch's operations, and in the same ones: the library
uses the OpenMP that PyTorch has loaded. Where it was not built, or does not apply, PyTorch computes the same. Which of
the two depends on the installation and the processor alone, so that a run that is resumed rounds as before.

Symbols: M networks, C inputs, B batch, P weights of a network.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["CompiledMLP", "CompiledResidual", "Layout", "applies", "has_bf16", "rounding"]


class _Thread(threading.local):
    """What holds in one thread alone, beside which others may act."""

    rounds = False  # whether matmuls round their factors to bfloat16
    watch: Callable[[Any, tuple[Any, ...]], object] | None = None  # is told of every call of the library


_thread = _Thread()

PANEL = 48  # columns of a matrix that mlp.c packs at once, at most

# the builds, best first, and what a processor needs to run them
BUILDS = {"_avx512": ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"), "_avx2": ("avx2", "fma3")}


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
    """The compiled half; None where it was not built, or the processor has neither AVX-512 nor AVX2."""
    return next((load(build) for build in usable_builds()), None)


def usable_builds() -> list[str]:
    """Of the builds those that are installed and that this processor can run, best first."""
    processor = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return [build for build, needed in BUILDS.items() if _path(build) and all(map(processor.get, needed))]


def load(build: str) -> ctypes.CDLL:
    """One of the builds, ready to be called."""
    found = ctypes.CDLL(str(_path(build)))
    n, p = ctypes.c_int64, ctypes.c_void_p
    found.mlp_forward.argtypes = [n, n, n, n, p, n, n, p, p, n, p, n, p, p, p]
    found.mlp_backward.argtypes = [n, n, n, n, p, n, n, p, p, n, p, n, p, p, n, p, p, p, p]
    found.residual_saved.argtypes, found.residual_saved.restype = 5 * [n], n
    found.residual_forward.argtypes = [*6 * [n], *7 * [p]]
    found.residual_backward.argtypes = [*6 * [n], *8 * [p]]
    return found


def _path(build: str) -> Path | None:
    paths = (Path(__file__).with_name(build + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def has_bf16() -> bool:
    """Whether the build in use is the one that multiplies bfloat16, and the processor does so, too."""
    return "_avx512" in usable_builds() and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


@contextmanager
def rounding(bf16: bool) -> Iterator[None]:
    """Within it forward passes, and the backward passes of these, round the factors of their matmuls to bfloat16.

    Sums, activations, gradients and weights stay in single precision.
    """
    before, _thread.rounds = _thread.rounds, bf16
    try:
        yield
    finally:
        _thread.rounds = before


@contextmanager
def watched(watch: Callable[[Any, tuple[Any, ...]], object]) -> Iterator[None]:
    """Within it ``watch(function, arguments)`` is told of every call of the library, of which PyTorch sees nothing."""
    before, _thread.watch = _thread.watch, watch
    try:
        yield
    finally:
        _thread.watch = before


def _call(name: str, *arguments: Any) -> None:
    function, arguments = getattr(library(), name), (torch.get_num_threads(), *arguments)
    function(*arguments)
    if _thread.watch is not None:
        _thread.watch(function, arguments)


def applies(x: Tensor, *others: Tensor) -> bool:
    """Whether the compiled half can compute these: plain float32 on a CPU."""
    plain = all(part.dtype == torch.float32 and part.device.type == "cpu" for part in (x, *others))
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
        shared = not any(ctx.needs_input_grad)
        saved = x.new_empty(1 if shared else count, batch * layout.saved)
        outputs = x.new_empty(count, batch, layout.out_size)
        ctx.save_for_backward(x, weights, saved)
        ctx.layout, ctx.plain, ctx.rounds = layout, plain, _thread.rounds
        panel, halves = _scratch(x, max(batch, layout.widest), ctx.rounds)
        _call(
            "mlp_forward", count, count // len(x), *layout.arguments, batch, x.data_ptr(), weights.data_ptr(),
            weights.stride(0), saved.data_ptr(), 0 if shared else saved.stride(0), outputs.data_ptr(), panel.data_ptr(),
            _address(halves),
        )  # fmt: skip
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
        panel, halves = _scratch(x, max(batch, layout.widest), ctx.rounds)
        between = x.new_empty(2 * batch * layout.widest)
        _call(
            "mlp_backward", count, count // len(x), *layout.arguments, batch, x.data_ptr(), weights.data_ptr(),
            weights.stride(0), saved.data_ptr(), saved.stride(0), gradient.data_ptr(), _address(of_weights),
            weights.shape[1], _address(of_x), panel.data_ptr(), _address(halves), between.data_ptr(),
        )  # fmt: skip
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
        sizes = len(x), x.shape[1], features.shape[1], width, (len(parameters) - 8) // 6
        outputs, saved = torch.empty_like(x), x.new_empty(library().residual_saved(*sizes))  # type: ignore[union-attr]
        ctx.save_for_backward(features, saved, *parameters)
        ctx.sizes, ctx.rounds = sizes, _thread.rounds
        ctx.widest = max(len(x), 2 * width, width + x.shape[1], features.shape[1])
        panel, halves = _scratch(x, ctx.widest, ctx.rounds)
        _call(
            "residual_forward", *sizes, x.data_ptr(), features.data_ptr(), _pointers(parameters), saved.data_ptr(),
            outputs.data_ptr(), panel.data_ptr(), _address(halves),
        )  # fmt: skip
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the parameters."""
        (features, saved, *parameters), gradient = ctx.saved_tensors, gradient.contiguous()
        batch, size, _, width, _ = ctx.sizes
        found = [torch.empty_like(parameter) for parameter in parameters]
        panel, halves = _scratch(features, ctx.widest, ctx.rounds)
        between = features.new_empty(batch * (6 * width + size))
        _call(
            "residual_backward", *ctx.sizes, features.data_ptr(), _pointers(parameters), saved.data_ptr(),
            gradient.data_ptr(), _pointers(found), panel.data_ptr(), _address(halves), between.data_ptr(),
        )  # fmt: skip
        return None, None, None, *found


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _scratch(like: Tensor, size: int, rounds: bool) -> tuple[Tensor, Tensor | None]:
    # aligned to 64 bytes, as all of PyTorch's memory; a panel for each thread
    panel = like.new_empty(torch.get_num_threads() * PANEL * size)
    return panel, like.new_empty((size + 1) // 2 * size) if rounds else None
