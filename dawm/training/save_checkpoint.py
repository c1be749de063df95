"""SaveCheckpoint: when to save a stage, and what to do when a signal ends it."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT

from dawm.training.checkpoints import ORIGIN
from dawm.training.random_states import random_states, restore_random_states

__all__ = ["Interrupted", "SaveCheckpoint", "remove_requeue_checkpoints"]


class Interrupted(Exception):
    """Training was stopped from outside (Ctrl-C, SIGTERM), after a checkpoint was saved."""


def remove_requeue_checkpoints(folder: Path) -> None:
    """Removes what Lightning's handler of SLURM's requeue signal saved, beside ``last.ckpt`` with the same state."""
    for path in folder.glob("hpc_ckpt_*.ckpt"):
        path.unlink(missing_ok=True)


class SaveCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` every N updates and at the end, and the random states with it.

    Before the first update a checkpoint is saved on trial: what cannot be saved and loaded again ends the run there.
    Ctrl-C and SIGTERM save too, once the updates under way are done, and then end the training with `Interrupted`. So
    does SLURM's requeue signal, for which Lightning's own handler then asks SLURM to start the job again. ``origin``
    says what the checkpoint was trained on; every ``keep_every_n_steps`` one is kept as ``step-N.ckpt``.
    """

    def __init__(
        self, path: Path, every_n_steps: int, origin: dict[str, Any], keep_every_n_steps: int | None = None
    ) -> None:
        self.path, self.origin = path, origin
        self.every_n_steps, self.keep_every_n_steps = every_n_steps, keep_every_n_steps
        self.seconds = 0.0  # of training, over all starts of the run
        self._started = 0.0
        self.finished = False  # a callback has ended the stage before its last update
        self._last_step = self._last_kept = 0  # updates after which ``last.ckpt`` was saved, and one was kept
        self._signals: list[int] = []
        self._handlers: dict[int, Any] = {}
        self._requeue: int | None = None  # upon which Lightning asks SLURM to start this job again

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock, before the other callbacks begin their work."""
        self._started = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes over the signals, and does not resume what was stopped early."""
        trainer.should_stop |= self.finished
        self._last_step = self._last_kept = trainer.global_step
        trial = self.path.with_name(".trial.ckpt")
        trainer.save_checkpoint(trial, weights_only=False)
        if trainer.is_global_zero:
            trial.unlink()
        if threading.current_thread() is threading.main_thread():
            environment = trainer._accelerator_connector.cluster_environment
            if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
                self._requeue = environment.requeue_signal
            for number in {signal.SIGINT, signal.SIGTERM, self._requeue or signal.SIGTERM}:
                self._handlers[number] = signal.signal(number, lambda received, frame: self._signals.append(received))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Saves when the count of updates has passed a multiple of ``every_n_steps``.

        A resumed run does not make up for a validation that was still to come, so a checkpoint waits for it.
        """
        interval = trainer.val_check_batch or 1
        if not (trainer.enable_validation and (trainer.fit_loop.total_batch_idx + 1) % interval == 0):
            self._save_or_stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves what was due at the validation's update, with what the validation changed."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._save_or_stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the last state, if it is not saved yet."""
        if trainer.global_step != self._last_step or not self.path.exists():
            self._save(trainer)
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restores the signal handlers."""
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)

    def _save_or_stop(self, trainer: L.Trainer) -> None:
        """Saves if a checkpoint is due; saves and stops where a signal has come to any rank."""
        keep, step = self.keep_every_n_steps, trainer.global_step
        if step // self.every_n_steps > self._last_step // self.every_n_steps:
            self._save(trainer)
        if keep is not None and step // keep > self._last_kept // keep:
            self._last_kept = step
            self._save(trainer, self.path.with_name(f"step-{step}.ckpt"))
        if trainer.strategy.reduce_boolean_decision(bool(self._signals), all=False):
            self._save(trainer)
            if trainer.strategy.reduce_boolean_decision(self._requeue in self._signals, all=False):
                # Lightning would do this in the middle of an update. Its own checkpoint is one too many: it would be
                # loaded in place of a finished stage's weights.
                self._handlers[self._requeue](self._requeue, None)  # type: ignore[index]
                remove_requeue_checkpoints(self.path.parent)
            raise Interrupted(f"stopped after update {trainer.global_step}; the same command resumes from {self.path}")

    def _save(self, trainer: L.Trainer, path: Path | None = None) -> None:
        now = time.monotonic()
        self.seconds, self._started = self.seconds + now - self._started, now
        self._last_step = trainer.global_step if path is None else self._last_step
        self.finished = trainer.should_stop
        trainer.save_checkpoint(path or self.path, weights_only=False)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the origin and every rank's random states."""
        checkpoint[ORIGIN] = self.origin
        device = trainer.strategy.root_device
        state = random_states(device).to(device)
        checkpoint["random_states"] = trainer.strategy.all_gather(state).reshape(trainer.world_size, -1).cpu()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resumes the random numbers where the interrupted run stopped."""
        states = checkpoint["random_states"]
        if len(states) == trainer.world_size:
            restore_random_states(states[trainer.global_rank], trainer.strategy.root_device)

    def state_dict(self) -> dict[str, Any]:
        """The seconds trained so far, and whether the stage has ended early."""
        return {"seconds": self.seconds, "finished": self.finished}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes counting the seconds."""
        self.seconds, self.finished = state_dict["seconds"], state_dict.get("finished", False)
