"""UpdateGraph: the K updates of a training step as one CUDA graph.

An update of an agent is a hundred small kernels, and launching them one by one takes a GPU's host longer than running
them. A graph is recorded once and then launched as one. It repeats kernels, not Python: what Python decided while it
was recorded stays decided. So a module says after how many updates `update` does the same again (``update_period``);
batches and learning rates lie in tensors that are refilled before every launch, and the graph advances PyTorch's
random numbers.

Symbols: K updates of a training step.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dawm.errors import first_line

__all__ = ["UpdateGraph", "plain_group", "reason_against", "set_learning_rate"]

Work = Callable[[], dict[str, Tensor]]
WARM_UP = 2  # training steps run one by one first, in which the optimisers make their state


def reason_against(module: Any, device: torch.device, world_size: int, precision: str) -> str | None:
    """Why an `UpdateModule`'s updates cannot be one CUDA graph, or None where they can."""
    reasons = {
        f"it needs a CUDA device, and training is on {device.type}": device.type != "cuda",
        "gradients are averaged over several processes": world_size > 1,
        f"trainer.precision is {precision}; it needs 32-true": precision != "32-true",
        f"{type(module).__name__} does not say its update_period": module.update_period is None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def record_on_cuda(work: Work) -> Work:
    """Records work as a CUDA graph; the function returned runs it, and answers with the same tensors, filled again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metrics = work()

    def launch() -> dict[str, Tensor]:
        graph.replay()
        return metrics

    return launch


class UpdateGraph:
    """Runs an `UpdateModule`'s updates as one graph; one by one at first, where a step is cut short, or it fails."""

    def __init__(self, module: Any, record: Callable[[Work], Work] = record_on_cuda) -> None:
        self.module, self.record = module, record  # as a CUDA graph, but for tests
        self.period = module.update_period or 1
        self._size = self._steps = 0
        self._launch: Work | None = None

    def run_updates(self, batches: Any, first: int, rates: list[list[float] | None]) -> dict[str, Tensor]:
        """As `UpdateModule.run_updates`; at most K updates."""
        count = len(getattr(batches, fields(batches)[0].name))
        self._size = self._size or count  # the last training step may have fewer
        whole = len(rates) == count == self._size and first % self.period == 0 and count % self.period == 0
        if not whole or self._steps < WARM_UP:
            self._steps += whole
            return self.module.run_updates(batches, first, rates)
        if self._launch is None:
            try:
                self._launch = self._recorded(batches, first, rates)
            except Exception as error:  # whatever an update does that a graph cannot
                self.close()
                self.module.update_graph = None
                reason = f"the updates cannot be recorded ({first_line(error)})"
                rank_zero_warn(f"cuda_graphs: {reason}; they run one by one")
                return self.module.run_updates(batches, first, rates)
        for field in fields(batches):
            getattr(self._batches, field.name).copy_(getattr(batches, field.name))
        if self._rates is not None:
            self._rates.copy_(torch.tensor(rates))
        metrics = self._launch()
        self.module.update_index = first + count
        return {key: value.clone() for key, value in metrics.items()}  # the next launch overwrites them

    def close(self) -> None:
        """Gives the memory back, and the optimisers plain learning rates."""
        self._launch = None
        for group in self.module.parameter_groups():
            plain_group(group)

    def _recorded(self, batches: Any, first: int, rates: list[list[float] | None]) -> Work:
        groups = self.module.parameter_groups()
        device = groups[0]["params"][0].device
        self._batches = replace(batches, **{f.name: getattr(batches, f.name).clone() for f in fields(batches)})
        self._rates = None if rates[0] is None else torch.tensor(rates, device=device)
        for group in groups:
            group["capturable"], group["lr"] = True, torch.tensor(group["lr"], device=device)
        table: Any = rates if self._rates is None else self._rates
        launch = self.record(lambda: self.module.run_updates(self._batches, first, table))
        if not all(isinstance(group["lr"], Tensor) for group in groups):
            raise ValueError("`update` sets learning rates itself; give them by `learning_rates`")
        return launch


def set_learning_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    """Sets the learning rate of a parameter group, in place where it is a tensor that a CUDA graph reads."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def plain_group(group: dict[str, Any]) -> None:
    """Gives a parameter group of an optimiser, or of its saved state, a learning rate that is a number again."""
    if isinstance(group["lr"], Tensor):
        group["capturable"], group["lr"] = False, float(group["lr"])
