"""CUDAGraphs: the K updates of a training step as one CUDA graph.

An update of an agent is a hundred small kernels, and launching them one by one takes a GPU's host longer than running
them. A graph is recorded once and then launched as one. It repeats kernels, not Python: what Python decided while it
was recorded stays decided. So a module declares the period of the control flow in its update (``update_period``), the
batches and the learning rates lie in tensors that are refilled before every launch, and random numbers come from
PyTorch's generator, which a graph advances.

Symbols: K updates of a training step, G parameter groups of all optimisers.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dawm.errors import first_line
from dawm.training.recording import given
from dawm.training.updates import UpdateModule

__all__ = ["CUDAGraphs"]

Work = Callable[[], dict[str, Tensor]]
WARM_UP = 2
"""Training steps run one by one first, in which the optimisers create their state."""


class CUDAGraphs(L.Callback):
    """Runs the updates of each training step as one CUDA graph where it can, and one by one where it cannot.

    The first few training steps run one by one, as does one that is cut short, and all where a graph is ruled out or
    the recording fails, which is reported in one line.
    """

    module: UpdateModule

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes over the module's updates."""
        reason = reason_against(pl_module, trainer)
        if reason is not None:
            rank_zero_warn(f"cuda_graphs: {reason}; the updates of {type(pl_module).__name__} run one by one")
            return
        assert isinstance(pl_module, UpdateModule)
        self.module = pl_module
        self.module.update_graph = self.run_updates
        self._size = self._steps = 0
        self._launch: Work | None = None

    def run_updates(self, batches: Any, first: int, rates: list[list[float] | None]) -> dict[str, Tensor]:
        """Some updates, with learning rates for at most K of them; as `UpdateModule.run_updates`."""
        count, period = len(batches), self.module.update_period or 1
        self._size = self._size or count  # the last training step may have fewer
        whole = len(rates) == count == self._size and first % period == 0 and count % period == 0
        if not whole or self._steps < WARM_UP:
            self._steps += whole
            return self.module.run_updates(batches, first, rates)
        if self._launch is None:
            try:
                self._launch = self._recorded(batches, first, rates)
            except Exception as error:  # whatever an update does that a graph cannot
                self._close()
                rank_zero_warn(
                    f"cuda_graphs: the updates cannot be recorded ({first_line(error)}); they run one by one"
                )
                return self.module.run_updates(batches, first, rates)
        for name, values in given(batches):
            getattr(self._batches, name).copy_(values)
        if self._rates is not None:
            self._rates.copy_(torch.tensor(rates))
        metrics = self._launch()
        self.module.update_index = first + count
        return {key: value.clone() for key, value in metrics.items()}  # the next launch overwrites them

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leaves no trace of a graph in the checkpoint, which may be resumed without one."""
        for state in checkpoint.get("optimizer_states", []):
            for group in state["param_groups"]:
                _plain_group(group)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hands the updates back."""
        if isinstance(pl_module, UpdateModule) and pl_module.update_graph is not None:
            self._close()

    def _close(self) -> None:
        """Frees the graph's memory, and gives the optimisers plain learning rates again."""
        self._launch = None
        self.module.update_graph = None
        for group in self.module.parameter_groups():
            _plain_group(group)

    def _recorded(self, batches: Any, first: int, rates: list[list[float] | None]) -> Work:
        groups = self.module.parameter_groups()
        device = groups[0]["params"][0].device
        self._batches = replace(batches, **{name: values.clone() for name, values in given(batches)})
        self._rates = None if rates[0] is None else torch.tensor(rates, device=device)
        for group in groups:
            group["capturable"], group["lr"] = True, torch.tensor(group["lr"], device=device)
        table: Any = rates if self._rates is None else self._rates
        launch = record(lambda: self.module.run_updates(self._batches, first, table))
        if not all(isinstance(group["lr"], Tensor) for group in groups):
            raise ValueError("`update` sets learning rates itself; give them by `learning_rates`")
        return launch


def reason_against(module: L.LightningModule, trainer: L.Trainer) -> str | None:
    """Why a module's updates cannot be one CUDA graph, or None where they can."""
    if trainer.strategy.root_device.type != "cuda":
        return f"it needs a CUDA device, and training is on {trainer.strategy.root_device.type}"
    if trainer.world_size > 1:
        return "gradients are averaged over several processes"
    if trainer.precision != "32-true":
        return f"trainer.precision is {trainer.precision}; it needs 32-true"
    if not isinstance(module, UpdateModule) or module.update_period is None:
        return f"{type(module).__name__} does not declare its update_period"
    return None


def record(work: Work) -> Work:
    """Records the kernels that work launches, and returns what launches them again and refills the same tensors."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metrics = work()

    def launch() -> dict[str, Tensor]:
        graph.replay()
        return metrics

    return launch


def _plain_group(group: dict[str, Any]) -> None:
    """Makes the learning rate of a parameter group, or of its saved state, a number again."""
    if isinstance(group["lr"], Tensor):
        group["capturable"], group["lr"] = False, float(group["lr"])
