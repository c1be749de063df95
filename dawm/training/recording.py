"""Recording: the operations of one update on a CPU, with the memory that each reads and writes."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dawm.errors import first_line
from dawm.nn import compiled

__all__ = ["Recording", "given", "state"]

NEW_MEMORY = ("dtype", "layout", "device", "pin_memory")  # settings of results, which an `out=` has already


class Recording(TorchDispatchMode):
    """Records an update once, and repeats it on other batches.

    Args:
        module: The `UpdateModule`.
        batch: A batch of the kind that it is for, a dataclass of tensors.
    """

    def __init__(self, module: Any, batch: Any) -> None:
        super().__init__()
        self.checks, self.gain = 0, 0.0
        """How often it was compared with the update, and the seconds by which it was faster."""
        self.reason: str | None = None
        """Why the update cannot be repeated, or None."""
        self._module = module
        self._batch = replace(batch, **{name: values.clone() for name, values in given(batch)})
        self._metrics: dict[str, Tensor] = {}
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        self._steps: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self._results: list[Any] = []  # kept, for the compiled networks know addresses alone

    def record(self) -> dict[str, Tensor]:
        """Runs an update and records it."""
        before = {parameter: parameter.grad for parameter in self._module.parameters()}
        with self, compiled.watched(lambda function, arguments: self._steps.append((function, arguments, {}))):
            self._metrics = self._module.update(self._batch)
        self._gradients = [
            (parameter, parameter.grad) for parameter, old in before.items() if parameter.grad is not old
        ]
        return {key: value.clone() for key, value in self._metrics.items()}

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Repeats the recorded operations on another batch."""
        for name, values in given(self._batch):
            values.copy_(getattr(batch, name))
        with torch.no_grad():
            for function, arguments, options in self._steps:
                function(*arguments, **options)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return {key: value.clone() for key, value in self._metrics.items()}

    def check(self, batch: Any) -> dict[str, Tensor]:
        """Runs an update as it is, after the recording has done the same to the same state; compares the two."""
        tensors = [tensor.detach() for tensor in state(self._module)]
        before, random_state = [tensor.clone() for tensor in tensors], torch.get_rng_state()
        began = perf_counter()
        try:
            metrics = self(batch)
        except Exception as error:  # whatever an operation cannot do in given memory
            metrics, self.reason = {}, first_line(error)
        replayed, took = [bits(tensor) for tensor in (*tensors, torch.get_rng_state())], perf_counter() - began
        for tensor, value in zip(tensors, before):
            tensor.copy_(value)
        torch.set_rng_state(random_state)
        began = perf_counter()
        found = self._module.update(batch)
        exact = [bits(tensor) for tensor in (*tensors, torch.get_rng_state())]
        self.gain += perf_counter() - began - took
        self.checks += 1
        if replayed != exact or {k: bits(v) for k, v in metrics.items()} != {k: bits(v) for k, v in found.items()}:
            self.reason = self.reason or "an update and its recording gave different numbers"
        return found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and records how to repeat it."""
        kwargs = kwargs or {}
        results = function(*args, **kwargs)
        if torch.Tag.data_dependent_output in function.tags:
            self.reason = f"Python sees a number by `{function}`"
        tensors = tensors_in(results)
        taken = {address(tensor) for tensor in tensors_in((args, kwargs))}
        self._results.append(tensors)
        if function._schema.is_mutable:
            self._steps.append((function, args, kwargs))
        elif any(address(tensor) not in taken for tensor in tensors) and not makes_room(function):  # no view either
            self._steps.append(into(function, args, kwargs, tensors))
        return results


def makes_room(function: Any) -> bool:
    """Whether an operation gives memory alone, which others then write to."""
    return function._schema.name.startswith(("aten::empty", "aten::new_empty"))


def into(function: Any, args: Any, kwargs: Any, results: list[Tensor]) -> tuple[Callable[..., Any], Any, Any]:
    """How to call an operation so that its results come to lie in given tensors."""
    found = out_variant(function)
    if found is None or len(found[1]) != len(results):  # an operation may leave some of its results out

        def copied() -> None:
            for result, value in zip(results, tensors_in(function(*args, **kwargs))):
                result.copy_(value)

        return copied, (), {}
    variant, outs, names = found
    return variant, args, {k: v for k, v in kwargs.items() if k in names} | dict(zip(outs, results))


@cache
def out_variant(function: Any) -> tuple[Any, list[str], set[str]] | None:
    """The overload of an operation that writes into given tensors, the names of these, and those of its arguments."""

    def inputs(schema: Any) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in schema.arguments if not a.is_out and a.name not in NEW_MEMORY]

    for name in function.overloadpacket.overloads():
        variant = getattr(function.overloadpacket, name)
        outs = [argument.name for argument in variant._schema.arguments if argument.is_out]
        lists = any(str(argument.type) != "Tensor" for argument in variant._schema.arguments if argument.is_out)
        if outs and not lists and inputs(variant._schema) == inputs(function._schema):
            return variant, outs, {argument.name for argument in variant._schema.arguments}
    return None


def state(module: Any) -> list[Tensor]:
    """All tensors of a module and its optimisers that an update may change."""
    of_optimizers = [s for optimizer in module.configure_optimizers() for s in optimizer.state.values()]
    found = [value for one in of_optimizers for value in one.values() if isinstance(value, Tensor)]
    return [*module.parameters(), *module.buffers(), *found]


def given(batch: Any) -> list[tuple[str, Tensor]]:
    """The fields of a dataclass of tensors, without those that are None."""
    return [(f.name, value) for f in fields(batch) if (value := getattr(batch, f.name)) is not None]


def tensors_in(structure: Any) -> list[Tensor]:
    """The tensors in lists and dicts."""
    return [leaf for leaf in tree_leaves(structure) if isinstance(leaf, Tensor)]


def address(tensor: Tensor) -> int:
    """Where a tensor's memory begins, the same for all its views."""
    return tensor.untyped_storage().data_ptr()


def bits(tensor: Tensor) -> bytes:
    """A tensor's numbers as they are stored: NaN equals NaN, and 0 is not -0."""
    return tensor.detach().numpy().tobytes()
