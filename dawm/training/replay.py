"""Replay: an update on a CPU is recorded once; its operations are then repeated without the Python around them.

An update of an agent is a hundred small operations around a few large ones. Autograd, the optimiser's Python and fresh
memory for every result take as long as the small operations themselves. A recording holds the operations alone, with
the memory that each reads and writes, as a CUDA graph does on a GPU. It repeats operations, not Python: what Python
decided while it was recorded stays decided. So it is made only for a class that declares the period of its own control
flow (``update_period``), anew whenever a setting, a parameter or the shape of a batch is another, and it is compared
with the update itself before it is used: every number has to be the same, to the last bit.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.distributed
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dawm.errors import first_line
from dawm.nn import compiled

__all__ = ["Recording", "Replay", "given"]

Metrics = dict[str, Tensor]
Update = Callable[[Any], Metrics]

NEW_MEMORY = ("dtype", "layout", "device", "pin_memory")  # settings of results, which an `out=` has already
NUMBERS = (bool, int, float, str, tuple)
KNOWN = {"dawm", "lightning", "torch", "torchmetrics", *sys.stdlib_module_names}


class Replay:
    """The recordings of one module's updates; copies of it start without any."""

    def __init__(self) -> None:
        # by phase of the period and kind of batch; None after the first update of a kind, which is run as it is
        self._recordings: dict[Any, Recording | None] = {}
        self._surroundings: list[Any] = []
        self._rates: list[Tensor] = []
        self._given_up = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles as a new one."""
        return Replay, ()

    @contextmanager
    def of(self, module: Any, scheduled: bool) -> Iterator[Update]:
        """What to call in place of an `UpdateModule`'s ``update``, for some updates.

        Args:
            module: The module.
            scheduled: Whether its learning rates are set before each update; they are tensors within.
        """
        if self._given_up or not applies(module):
            yield module.update
            return
        groups = module.parameter_groups()
        if self._surroundings != surroundings(module, groups, scheduled):
            self._recordings.clear()
        if scheduled:
            self._rates = self._rates or [torch.zeros((), dtype=torch.float64) for _ in groups]  # as Python's numbers
            for group, rate in zip(groups, self._rates):
                group["lr"] = rate.fill_(group["lr"])
        try:
            yield lambda batch: self._update(module, batch)
        finally:
            if scheduled:
                for group in groups:
                    group["lr"] = float(group["lr"])
            self._surroundings = surroundings(module, groups, scheduled)

    def _update(self, module: Any, batch: Any) -> Metrics:
        if self._given_up or not is_dataclass(batch):
            return module.update(batch)
        kind = module.update_index % module.update_period, *((n, v.shape, v.dtype) for n, v in given(batch))
        if kind not in self._recordings:
            self._recordings[kind] = None  # optimisers make their state in the first update
            return module.update(batch)
        recording = self._recordings[kind]
        if recording is None:
            recording = self._recordings[kind] = Recording(batch)
            metrics = recording.record(module.update)
        elif not recording.checked:
            metrics = recording.check(module.update, batch)
        else:
            return recording(batch)
        if recording.reason is not None:
            self._given_up = True
            self._recordings.clear()
            rank_zero_warn(
                f"the updates of {type(module).__name__} declare an update_period, but cannot be recorded and "
                f"replayed: {recording.reason}; they run as they are"
            )
        return metrics


class Recording(TorchDispatchMode):
    """The operations of one update, with the memory that each reads and writes.

    Args:
        batch: A batch of the kind that it is for, a dataclass of tensors.
    """

    def __init__(self, batch: Any) -> None:
        super().__init__()
        self.checked = False
        self.reason: str | None = None
        """Why the update cannot be repeated, or None."""
        self._batch = replace(batch, **{name: values.clone() for name, values in given(batch)})
        self._metrics: Metrics = {}
        self._steps: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self._results: list[Any] = [self._batch]  # kept, for the compiled networks know addresses alone
        self._own = {address(values) for _, values in given(self._batch)}
        self._changed: dict[int, Tensor] = {}  # what is not its own: parameters, states of optimisers

    def record(self, update: Update) -> Metrics:
        """Runs an update and records it."""
        with self, compiled.watched(lambda function, arguments: self._steps.append((function, arguments, {}))):
            self._metrics = update(self._batch)
        return {key: value.clone() for key, value in self._metrics.items()}

    def __call__(self, batch: Any) -> Metrics:
        """Repeats the recorded operations on another batch."""
        for name, values in given(self._batch):
            values.copy_(getattr(batch, name))
        with torch.no_grad():
            for function, arguments, options in self._steps:
                function(*arguments, **options)
        return {key: value.clone() for key, value in self._metrics.items()}

    def check(self, update: Update, batch: Any) -> Metrics:
        """Runs an update as it is, after the recording has done the same to the same state; compares the two."""
        *before, random_state = self._state()
        try:
            metrics, self.reason = self(batch), None
        except Exception as error:  # whatever an operation cannot do in given memory
            metrics, self.reason = {}, first_line(error)
        replayed = self._state()
        for tensor, value in zip(self._changed.values(), before):
            tensor.detach().copy_(value)
        torch.set_rng_state(random_state)
        found = update(batch)
        pairs = [*zip(replayed, self._state()), *((metrics[key], found[key]) for key in metrics.keys() & found.keys())]
        self.checked = metrics.keys() == found.keys() and all(torch.equal(*pair) for pair in pairs)
        if not self.checked:
            self.reason = self.reason or "an update and its recording gave different numbers"
        return found

    def _state(self) -> list[Tensor]:
        return [*(tensor.detach().clone() for tensor in self._changed.values()), torch.get_rng_state()]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and records how to repeat it."""
        kwargs = kwargs or {}
        results = function(*args, **kwargs)
        if tells_python(function, args):
            self.reason = f"Python sees a number or a size by `{function}`"
        tensors = tensors_in(results)
        taken = {address(tensor) for tensor in tensors_in((args, kwargs))}
        self._results.append(tensors)
        if function._schema.is_mutable:
            named = {argument.name: value for argument, value in zip(function._schema.arguments, args)} | kwargs
            for tensor in tensors_in([named.get(a.name) for a in function._schema.arguments if a.is_write]):
                if address(tensor) not in self._own:
                    self._changed[id(tensor)] = tensor
            self._steps.append((function, args, kwargs))
        elif any(address(tensor) not in taken for tensor in tensors):  # not a view
            self._own |= {address(tensor) for tensor in tensors}
            if not function._schema.name.startswith(("aten::empty", "aten::new_empty")):
                self._steps.append(into(function, args, kwargs, tensors))
        return results


def tells_python(function: Any, args: Any) -> bool:
    """Whether an operation's result is a Python number, or its shape depends on the numbers given."""
    if function is torch.ops.aten.index.Tensor:  # by a mask, or by row numbers
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    tags = function.tags
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


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


def applies(module: Any) -> bool:
    """Whether a module's updates may be recorded: on one CPU, without autocast, of a class that declares its period."""
    return (
        vars(type(module)).get("update_period") is not None  # a subclass, which may do otherwise, has to say it again
        and module.update_period is not None
        and module.update_graph is None
        and all(parameter.device.type == "cpu" for parameter in module.parameters())
        and not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1)
        and not (torch.is_autocast_enabled("cpu") or torch.is_anomaly_enabled())
        and not any(hooked(part) for part in (*module.modules(), *module.configure_optimizers()))
        and packages(module) <= KNOWN | {type(module).__module__.split(".")[0]}
    )


def surroundings(module: Any, groups: list[dict[str, Any]], scheduled: bool) -> list[Any]:
    """What a recording takes for granted: settings of the module's parts and optimisers, and where its tensors lie."""
    found: list[Any] = [torch.get_num_threads()]
    for part in module.modules():
        items = ((key, value) for key, value in vars(part).items() if key != "update_index")
        found += [(key, value if isinstance(value, NUMBERS) else id(value)) for key, value in items]
    states = [state for optimizer in module.configure_optimizers() for state in optimizer.state.values()]
    held = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    found += [(t.data_ptr(), t.requires_grad) for t in (*module.parameters(), *module.buffers(), *held)]
    left_out = ("params", "lr") if scheduled else ("params",)
    return found + [(key, value) for group in groups for key, value in group.items() if key not in left_out]


def hooked(part: Any) -> bool:
    """Whether a module or an optimiser has hooks, which a recording would leave out."""
    return any(value for key, value in vars(part).items() if key.endswith("_hooks"))


def packages(module: Any) -> set[str]:
    """Where the classes of a module's parts come from: of others nothing is known, as of a subclass."""
    parts = [*module.modules(), *(value for part in module.modules() for value in vars(part).values())]
    return {type(part).__module__.split(".")[0] for part in parts}


def given(batch: Any) -> list[tuple[str, Tensor]]:
    """The fields of a dataclass of tensors, without those that are None."""
    return [(f.name, value) for f in fields(batch) if (value := getattr(batch, f.name)) is not None]


def tensors_in(structure: Any) -> list[Tensor]:
    """The tensors in lists and dicts."""
    return [leaf for leaf in tree_leaves(structure) if isinstance(leaf, Tensor)]


def address(tensor: Tensor) -> int:
    """Where a tensor's memory begins, the same for all its views."""
    return tensor.untyped_storage().data_ptr()
