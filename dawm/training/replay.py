"""Replay: an update on a CPU is recorded once; its operations are then repeated without the Python around them.

An update of an agent is a hundred small operations around a few large ones. Autograd, the optimiser's Python and fresh
memory for every result take as long as the small operations themselves. A `Recording` holds the operations alone, as a
CUDA graph does on a GPU. It repeats operations, not Python: what Python decided while it was recorded stays decided. So
only updates of DAWM's own classes are recorded, which say when their control flow repeats itself (``update_period``),
and again whenever a setting or the place of a weight has changed. Before it is used a recording is compared with the
update itself: the numbers have to be the same, to the last bit, and come sooner.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.optim import optimizer as optimizers

from dawm.training.recording import Recording, given, state

__all__ = ["Replay"]

CHECKS = 5  # updates in which a recording is compared
KINDS = 8  # recordings of a module at most: each keeps all that an update computes
WORTHWHILE, SHORT_LIVES = 100, 3  # replays that pay for a recording; how many may fail to in a row
KNOWN = {"dawm", "lightning", "torch", "torchmetrics", *sys.stdlib_module_names}  # packages whose classes may be parts
SCALARS = (bool, int, float, str, type(None))
NO_SETTINGS = torch.nn.Module().__dict__.keys() - {"training"} | {"_trainer", "_replay", "update_index"}


class Replay:
    """The recordings of one module's updates; copies of it start without any."""

    def __init__(self) -> None:
        # by phase of the period and kind of batch; None after the first update of a kind, which is run as it is
        self._recordings: dict[Any, Recording | None] = {}
        self._surroundings: list[Any] = []
        self._rates: list[Tensor] = []
        self._replays = self._short_lives = 0
        self._given_up = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles as a new one."""
        return Replay, ()

    @contextmanager
    def of(self, module: Any, scheduled: bool) -> Iterator[Callable[[Any], dict[str, Tensor]]]:
        """What to call in place of an `UpdateModule`'s ``update``, for some updates.

        Args:
            module: The module.
            scheduled: Whether its learning rates are set before each update; they are tensors within.
        """
        if self._given_up or not applies(module):
            self._recordings.clear()
            yield module.update
            return
        if not unchanged(self._surroundings, surroundings(module, scheduled)):
            if self._recordings:
                self._short_lives = self._short_lives + 1 if self._replays < WORTHWHILE else 0
                self._given_up = self._short_lives > SHORT_LIVES  # of what always changes nothing is worth recording
            self._recordings.clear()
            self._replays = 0
        groups = module.parameter_groups() if scheduled else []
        if len(self._rates) != len(groups):
            self._rates = [torch.zeros((), dtype=torch.float64) for _ in groups]  # as precise as Python's numbers
        for group, rate in zip(groups, self._rates):
            group["lr"] = rate.fill_(group["lr"])
        try:
            yield lambda batch: self._update(module, batch)
        finally:
            for group in groups:
                group["lr"] = float(group["lr"])
            self._surroundings = surroundings(module, scheduled)

    def _update(self, module: Any, batch: Any) -> dict[str, Tensor]:
        kind = module.update_index % module.update_period, *((name, v.shape, v.dtype) for name, v in given(batch))
        if self._given_up or (kind not in self._recordings and len(self._recordings) == KINDS):
            return module.update(batch)
        if kind not in self._recordings:
            self._recordings[kind] = None  # optimisers make their state in the first update
            return module.update(batch)
        recording = self._recordings[kind]
        if recording is None:
            recording = Recording(module, batch)
            metrics = recording.record()
            self._recordings[kind] = recording
        elif recording.checks < CHECKS:
            metrics = recording.check(batch)
        elif recording.gain > 0:
            self._replays += 1
            return recording(batch)
        else:
            return module.update(batch)
        if recording.reason is not None:
            self._given_up = True
            self._recordings.clear()
            warnings.warn(
                f"the updates of {type(module).__name__} cannot be recorded and replayed: {recording.reason}; they run "
                "as they are",
                stacklevel=2,
            )
        return metrics


def applies(module: Any) -> bool:
    """Whether a module's updates may be recorded: on one CPU, without autocast and hooks, of DAWM's own classes."""
    if module.update_period is None or module.update_graph is not None:
        return False
    held = [value for part in module.modules() for value in (part, *vars(part).values())]
    methods = [getattr(value, "func", value) for value in held]  # of partial
    packages = {(getattr(value, "__module__", None) or type(value).__module__).split(".")[0] for value in methods}
    hooked = (*module.modules(), *module.configure_optimizers())
    return (
        packages <= KNOWN  # of other classes, and of methods put in another's place, nothing is known
        and all(parameter.device.type == "cpu" for parameter in module.parameters())
        and not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1)
        and not (torch.is_autocast_enabled("cpu") or torch.is_anomaly_enabled())
        and not any(value for part in hooked for key, value in vars(part).items() if key.endswith("_hooks"))
        and not any(parameter._backward_hooks for parameter in module.parameters())
        and not (_has_any_global_hook() or optimizers._global_optimizer_pre_hooks)
        and not optimizers._global_optimizer_post_hooks
    )


def surroundings(module: Any, scheduled: bool) -> list[Any]:
    """What a recording takes for granted: settings of the module's parts and optimisers, and where its tensors lie."""
    found: list[Any] = [torch.get_num_threads()]
    for part in module.modules():
        found += settings({key: value for key, value in vars(part).items() if key not in NO_SETTINGS})
    found += [number for t in state(module) for number in (t.data_ptr(), t.requires_grad)]
    left_out = ("params", "lr") if scheduled else ("params",)
    for group in module.parameter_groups():
        found += settings({key: value for key, value in group.items() if key not in left_out})
    return found


def settings(value: Any) -> list[Any]:
    """Numbers, strings and other objects in a structure, or in DAWM's own objects, one after the other."""
    if isinstance(value, dict):
        return [item for key, part in value.items() for item in (str(key), *settings(part))]
    if isinstance(value, (list, tuple)):
        return [len(value), *(item for part in value for item in settings(part))]
    if type(value).__module__.startswith("dawm.") and not isinstance(value, torch.nn.Module):
        return [value, *settings(vars(value))]
    return [value]


def unchanged(before: list[Any], now: list[Any]) -> bool:
    """Whether scalars are equal, and other objects the same ones."""
    return len(before) == len(now) and all(
        a is b or (isinstance(a, SCALARS) and type(a) is type(b) and a == b) for a, b in zip(before, now)
    )
