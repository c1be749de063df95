"""Gradient updates: the training loop that the world model, the inverse dynamics and the agents share.

An *update* is one gradient step of a module's main network, and the one unit of training everywhere: ``max_steps``,
``every_n_steps``, logs and checkpoints all count updates. A loader hands over K batches at once, so that what Lightning
costs per training step (hooks, logging, progress bar) is paid once for K updates. Results do not depend on K.
"""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import lightning as L
import torch
import torch.distributed
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from dawm.errors import UserError
from dawm.nn.normalizer import Normalizer
from dawm.training.graphs import UpdateGraph, plain_group, reason_against, set_learning_rate

__all__ = ["UpdateModule"]


class UpdateModule(L.LightningModule):
    """A LightningModule that trains by `update`, several times per training step.

    Subclasses build their networks and optimisers in the constructor, return the optimisers from
    `configure_optimizers`, and write the update itself with `minimize`. ``name`` prefixes the logged metrics.
    """

    name: str
    update_period: int | None = None
    """Period of the control flow in `update`; None disables CUDA graphs."""
    schedule_follows_max_steps = False
    """Whether a learning rate depends on ``trainer.max_steps``, so that more updates cannot follow a finished run."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # several optimisers, several updates per training step
        self.update_index = 0  # number of the update under way, from 0; set by run_updates
        self.cuda_graphs = False  # run the updates of a training step as one CUDA graph, where that can be
        self.update_graph: UpdateGraph | None = None

    @abstractmethod
    def update(self, batch: Any) -> dict[str, Tensor]:
        """One gradient update on one batch, fields of shape (B, ...).

        Returns:
            Metrics without gradient, of any shape, whose mean is logged under ``<name>/<key>``.
        """

    @abstractmethod
    def configure_optimizers(self) -> list[Optimizer]:
        """The module's optimisers: the same objects in the same order at every call."""

    def fit_normalizers(self, data: Any) -> None:
        """Takes the normalizers' statistics from real data; called once, before training."""

    def train_loader(self, data: Any, updates: int, rank: int) -> Iterable[Any]:
        """What to train on: by default a mixture of real and synthetic transitions, of other draws on each rank."""
        return data.mixed_loader(updates, rank, seeds=getattr(self, "seeds", 1))

    def validation_loader(self, data: Any, rank: int, world_size: int) -> Iterable[Any] | None:
        """What to validate on; None for no validation."""
        return None

    def setup(self, stage: str) -> None:
        """Takes the normalizers' statistics from the data module, unless they were taken or loaded before."""
        normalizers = [part for part in self.modules() if isinstance(part, Normalizer)]
        if stage != "fit" or all(normalizer.fitted for normalizer in normalizers):
            return
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            found = f"{type(self).__name__} trains on data that are not normalised"
            rank_zero_warn(f"{found}; give its Trainer the data as `datamodule=`, or call `fit_normalizers` before")
        else:
            self.fit_normalizers(data)

    def learning_rates(self, index: int) -> list[float] | None:
        """Learning rate of each parameter group at an update, counted from 0; None leaves them as they are."""
        return None

    def minimize(self, loss: Tensor, optimizer: Optimizer, max_norm: float | None = None) -> None:
        """Takes one gradient step of one optimiser on a loss, with gradients averaged over the ranks.

        Only the gradients of the optimiser's own parameters are computed: an actor's loss that runs through a critic
        leaves the critic's weights without a gradient. The loss has shape (), or that of several independent networks.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # autograd.grad instead of backward: DDP's hooks sit on backward and expect one pass per training step
        gradients = torch.autograd.grad(loss if loss.dim() == 0 else loss.sum(), parameters)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            flat = torch.cat([g.reshape(-1) for g in gradients])
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
            gradients = tuple(part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gradients]), gradients))
        for parameter, gradient in zip(parameters, gradients):
            # fused Adam walks both in memory order and would go wrong, silently, where the orders differ
            same = gradient.stride() == parameter.stride()
            parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()

    def training_step(self, batches: Any, batch_idx: int) -> None:
        """Runs one update per batch, on a dataclass of tensors (K, B, ...)."""
        count = getattr(batches, fields(batches)[0].name).shape[0]
        if self.trainer.max_steps > 0:
            count = min(count, self.trainer.max_steps - self.trainer.global_step)
        first = self.trainer.global_step
        rates = [self.learning_rates(first + k) for k in range(count)]
        run = self.run_updates if self.update_graph is None else self.update_graph.run_updates
        metrics = {f"{self.name}/{key}": value for key, value in run(batches, first, rates).items()}
        # Lightning counts the steps of the optimisers that it wraps: several per update for an actor and critics, none
        # for those stepped here. Its counter, which max_steps, checkpoints and callbacks read, is set to the updates.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        for counter in (progress.total, progress.current):
            counter.ready += count
            counter.completed += count
        if not torch.stack(list(metrics.values())).isfinite().all():
            wrong = ", ".join(key for key, value in metrics.items() if not value.isfinite())
            raise UserError(
                f"--{self.name}: got NaN or infinite {wrong} between updates {first} and {first + count}, expected "
                "numbers; lower its learning_rate, or try `datasets check` on the data (the last checkpoint is kept)"
            )
        # "step" sets the loggers' x-axis; Lightning would otherwise count training steps, not updates
        self.log_dict({**metrics, "step": float(self.trainer.global_step)}, sync_dist=self.trainer.world_size > 1)

    def run_updates(self, batches: Any, first: int, rates: Sequence[Any]) -> dict[str, Tensor]:
        """Some updates from number ``first`` on, one after the other, on a dataclass of tensors (K, B, ...).

        There are as many as ``rates``, each the learning rates of all parameter groups at an update, or None.

        Returns:
            Metrics of `update`, each the mean over the updates that gave it, shape ().
        """
        values: dict[str, list[Tensor]] = defaultdict(list)  # some metrics come with every update, others with some
        groups = self.parameter_groups()
        for k, group_rates in enumerate(rates):
            self.update_index = first + k
            if group_rates is not None:
                for group, rate in zip(groups, group_rates):
                    set_learning_rate(group, rate)
            for key, value in self.update(batches[k]).items():
                values[key].append(value)
        self.update_index = first + len(rates)
        return {key: torch.stack(parts).mean() for key, parts in values.items()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimisers, in order."""
        return [group for optimizer in self.configure_optimizers() for group in optimizer.param_groups]

    def on_fit_start(self) -> None:
        """Refuses precisions that need what these updates lack: gradient scaling, or data in another type."""
        if self.trainer.precision not in ("32-true", "bf16-mixed"):
            raise UserError(
                f"--trainer.precision: got {self.trainer.precision}, expected 32-true or bf16-mixed (others need "
                "gradient scaling or converted data); set one of them"
            )
        if self.cuda_graphs:
            trainer = self.trainer
            reason = reason_against(self, trainer.strategy.root_device, trainer.world_size, trainer.precision)
            if reason is None:
                self.update_graph = UpdateGraph(self)
            else:
                rank_zero_warn(f"cuda_graphs: {reason}; the updates of {self.name} run one by one")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves no trace of a CUDA graph in the checkpoint, which may be resumed without one."""
        for state in checkpoint.get("optimizer_states", []):  # a checkpoint of weights alone has none
            for group in state["param_groups"]:
                plain_group(group)

    def on_train_end(self) -> None:
        """Ends the CUDA graph."""
        if self.update_graph is not None:
            self.update_graph.close()
            self.update_graph = None
