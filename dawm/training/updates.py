"""UpdateModule: the training loop that the world model, the inverse dynamics and the agents share.

An *update* is one gradient step of a module's main network, and it is the one unit of training everywhere:
``max_steps``, ``every_n_steps``, logs, progress bars and checkpoints all count updates. A loader hands over K batches
at once; `UpdateModule.training_step` runs K updates on them, so that what Lightning costs per training step (hooks,
logging, progress bar) is paid once for K updates. Results do not depend on K.
"""

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from dawm.errors import UserError, require
from dawm.nn.compiled import has_bf16, rounding
from dawm.nn.normalizer import Normalizer
from dawm.training.replay import Replay

__all__ = ["UpdateModule", "cosine_decay"]


class UpdateModule(L.LightningModule):
    """A LightningModule that trains by `update`, several times per training step.

    Subclasses build their networks and optimisers in the constructor, list the optimisers in `configure_optimizers`,
    and write the update itself with `minimize`. ``name`` prefixes the logged metrics. One that validates has a
    ``validation_loader(data, rank, world_size)`` too, which gives the held-out batches of a rank.
    """

    name: str
    update_period: int | None = None
    """After how many updates the control flow in `update` repeats itself; None disables CUDA graphs and, for DAWM's own
    classes on a CPU, replaying (`dawm.training.replay`)."""
    schedule_follows_max_steps = False
    """Whether a learning rate depends on ``trainer.max_steps``, so that more updates cannot follow a finished run."""
    matmul_precision = "fp32"
    """Of MLPs in updates: "bf16" rounds the factors of matmuls, which processors with AVX512_BF16 multiply faster."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # several optimisers, several updates per training step
        self.update_index = 0  # number of the current update, from 0; set by run_updates alone
        self._replay = Replay()
        self.update_graph: Callable[..., dict[str, Tensor]] | None = None  # instead of run_updates; set by CUDAGraphs

    # What a subclass writes

    @abstractmethod
    def update(self, batch: Any) -> dict[str, Tensor]:
        """One gradient update on one batch.

        Args:
            batch: One batch, fields of shape (B, ...).

        Returns:
            Metrics without gradient, of any shape, whose mean is logged under ``<name>/<key>``.
        """

    @abstractmethod
    def configure_optimizers(self) -> list[Optimizer]:
        """The optimisers made in the constructor, always the same ones in the same order."""

    def learning_rates(self, index: int) -> list[float] | None:
        """Learning rate of each parameter group at the update ``index``, from 0; None leaves them as they are."""
        return None

    def fit_normalizers(self, data: Any) -> None:
        """Takes the normalizers' statistics from the real data of a `TransitionDataModule`; `setup` calls it."""

    def forget_best(self) -> None:
        """Forgets what belongs to the training that given weights (``init_from``) come from; here nothing."""

    def train_loader(self, data: Any, updates: int, rank: int) -> Iterable[Any]:
        """The batches of this rank: by default the mixture of real and synthetic transitions.

        Args:
            data: The data module, a `TransitionDataModule`.
            updates: Updates to draw for.
            rank: This process.
        """
        return data.mixed_loader(updates, rank, seeds=getattr(self, "seeds", 1))

    # Updates

    def minimize(self, loss: Tensor, optimizer: Optimizer, max_norm: float | None = None) -> None:
        """Takes one gradient step of one optimiser on a loss, with gradients averaged over the ranks.

        Only the gradients of the optimiser's own parameters are computed: an actor's loss that runs through a critic
        leaves the critic's weights without a gradient.

        Args:
            loss: The loss of this rank's batch, shape (), or one for each of several independent networks, shape (...).
            optimizer: The optimiser to step.
            max_norm: Gradient clipping: the largest norm of the gradient; None disables it.
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

    def run_updates(self, batches: Any, first: int = 0, rates: Sequence[Any] | None = None) -> dict[str, Tensor]:
        """Some updates, one after the other; in a script of one's own, the training loop.

        Args:
            batches: A dataclass of tensors, fields of shape (K, B, ...).
            first: Number of the first update.
            rates: Learning rates of the parameter groups at each update, or None for it; as many as updates to run.
                None asks `learning_rates` for each batch.

        Returns:
            Metrics of `update`, each the mean over the updates that gave it, shape ().
        """
        values: dict[str, list[Tensor]] = defaultdict(list)  # some metrics come with every update, others with some
        groups = self.parameter_groups()
        rates = [self.learning_rates(first + k) for k in range(len(batches))] if rates is None else rates
        scheduled = any(group_rates is not None for group_rates in rates)
        with rounding(self.matmul_precision == "bf16"), self._replay.of(self, scheduled) as update:
            for k, group_rates in enumerate(rates):
                self.update_index = first + k
                if group_rates is not None:
                    for group, rate in zip(groups, group_rates):
                        set_learning_rate(group, rate)
                for key, value in update(batches[k]).items():
                    values[key].append(value)
        self.update_index = first + len(rates)
        return {key: torch.stack(parts).mean() for key, parts in values.items()}

    def decayed(self, learning_rate: float, index: int) -> float:
        """A learning rate that falls to 0 along a cosine over the run; constant where no trainer sets a length."""
        total = self._trainer.max_steps if self._trainer is not None else -1
        return learning_rate * cosine_decay(index, total) if total > 0 else learning_rate

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimisers, in order."""
        return [group for optimizer in self.configure_optimizers() for group in optimizer.param_groups]

    # Under Lightning

    def setup(self, stage: str) -> None:
        """Fits the normalizers to the data module's data before a training, unless they were fitted or loaded."""
        if stage != "fit" or all(part.fitted for part in self.modules() if isinstance(part, Normalizer)):
            return
        data = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "episodes"):
            self.fit_normalizers(data)
        else:
            rank_zero_warn(
                f"the normalizers of {type(self).__name__} are not fitted, so it learns from raw numbers; call "
                "`fit_normalizers`, or train with `datamodule=TransitionDataModule(...)`"
            )

    def on_fit_start(self) -> None:
        """Refuses precisions that need what these updates lack: gradient scaling, or data in another type."""
        expected = "32-true or bf16-mixed, as the updates neither scale gradients nor convert data"
        require(
            "trainer.precision", self.trainer.precision, self.trainer.precision in ("32-true", "bf16-mixed"), expected
        )
        holds = self.matmul_precision == "fp32" or (self.matmul_precision == "bf16" and has_bf16())
        expected = "fp32, or bf16 where dawm/nn/mlp.c was compiled and the processor has AVX512_BF16"
        require("matmul_precision", self.matmul_precision, holds, expected)

    def on_fit_end(self) -> None:
        """Frees what replaying has kept."""
        self._replay = Replay()

    def training_step(self, batches: Any, batch_idx: int) -> None:
        """Runs one update per batch: ``batches`` is a dataclass of tensors, fields of shape (K, B, ...)."""
        count, first = len(batches), self.trainer.global_step
        if self.trainer.max_steps > 0:
            count = min(count, self.trainer.max_steps - first)
        run = self.update_graph or self.run_updates
        values = run(batches, first, [self.learning_rates(first + k) for k in range(count)])
        metrics = {f"{self.name}/{key}": value for key, value in values.items()}
        self._count_updates(count)
        if not torch.stack(list(metrics.values())).isfinite().all():
            wrong = ", ".join(key for key, value in metrics.items() if not value.isfinite())
            raise UserError(
                f"--{self.name}: got NaN or infinite {wrong} between updates {first} and {first + count}, expected "
                "finite numbers; lower its learning_rate, or look at the data with `datasets check` (the last "
                "checkpoint was kept)"
            )
        # "step" sets the loggers' x-axis; Lightning would otherwise count training steps, not updates
        self.log_dict({**metrics, "step": float(self.trainer.global_step)}, sync_dist=self.trainer.world_size > 1)

    def _count_updates(self, count: int) -> None:
        """Advances ``trainer.global_step`` by the updates done.

        Lightning counts the steps of optimisers that it wraps: several per update for an agent with an actor and
        critics, none for the optimisers stepped here. This keeps its one counter, which max_steps, checkpoints and
        callbacks read, equal to the number of updates.
        """
        steps = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        for progress in (steps.total, steps.current):
            progress.ready += count
            progress.completed += count


def set_learning_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    """Sets the learning rate of a parameter group, in place where it is a tensor that a graph or a recording reads."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def cosine_decay(step: int, total: int) -> float:
    """Factor of a learning rate that falls from 1 to 0 along half a cosine, after ``step`` of ``total`` updates."""
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / total))
