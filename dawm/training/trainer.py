"""The Trainer of one stage."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from dawm.errors import UserError, require
from dawm.training.checkpoints import AtomicCheckpointIO
from dawm.training.graphs import CUDAGraphs
from dawm.training.progress import StageProgress
from dawm.training.save_checkpoint import SaveCheckpoint
from dawm.training.stage import Stage
from dawm.training.updates import UpdateModule

__all__ = ["make_trainer"]

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def make_trainer(
    stage: Stage, module: L.LightningModule, folder: Path, save: SaveCheckpoint, settings: Mapping[str, Any],
    loggers: Iterable[Logger], console: Console,
) -> L.Trainer:  # fmt: skip
    """A Trainer that counts, logs, validates and saves by updates."""
    chunk: int = settings["data"]["updates_per_step"]
    unit = "updates" if isinstance(module, UpdateModule) else "training steps"
    callbacks = [*stage.callbacks, StageProgress(stage.name.replace("_", " "), console, settings["quiet"], unit), save]
    if not isinstance(module, UpdateModule):
        callbacks.insert(0, CountTrainingSteps())
    if settings["cuda_graphs"]:
        callbacks.append(CUDAGraphs())
    if stage.patience is not None:
        callbacks.append(EarlyStopping(f"{stage.name}/validation_error", patience=stage.patience, check_finite=True))
    chosen = dict(settings["trainer"])
    if chosen.get("accelerator") in ("auto", "mps") and MPSAccelerator.is_available():
        expected = "cpu, as Apple's GPU has no double precision, in which errors and noise levels are added up"
        require("trainer.accelerator", "mps", chosen["accelerator"] == "auto", expected, "set it")
        console.print(f"{stage.name}: trains on the CPU, as Apple's GPU has no double precision")
        chosen["accelerator"] = "cpu"
    if chosen.get("profiler") in PROFILERS:
        chosen["profiler"] = PROFILERS[chosen["profiler"]](dirpath=folder, filename="profile")
        console.print(
            f"{stage.name}: the profiler's report goes to {folder}/fit-profile*", soft_wrap=True, markup=False
        )
    try:
        return L.Trainer(
            **chosen, max_steps=stage.max_steps, max_epochs=-1, callbacks=callbacks,
            logger=[CSVLogger(folder, name="logs"), TensorBoardLogger(folder, name="tensorboard"), *loggers],
            default_root_dir=folder, plugins=[AtomicCheckpointIO()],
            log_every_n_steps=max(1, stage.log_every_n_steps // chunk),
            val_check_interval=max(1, min(stage.validate_every_n_steps, stage.max_steps) // chunk),
            check_val_every_n_epoch=None, num_sanity_val_steps=0, enable_model_summary=False,
            # Lightning shards only its own loaders' samplers; ours draw by rank themselves
            use_distributed_sampler=False,
        )  # fmt: skip
    except (MisconfigurationException, ValueError, RuntimeError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(
            f"--trainer: got settings that Lightning refuses ({str(error) or type(error).__name__}), expected those of "
            "its Trainer; change --trainer.*"
        ) from None


class CountTrainingSteps(L.Callback):
    """Counts the training steps of a plain LightningModule in ``trainer.global_step``.

    Under manual optimisation Lightning counts those of every optimiser: two per batch for an actor and a critic.
    """

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Sets the counter to the batches done."""
        if not pl_module.automatic_optimization:
            progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            progress.total.ready = progress.total.completed = trainer.fit_loop.total_batch_idx + 1
