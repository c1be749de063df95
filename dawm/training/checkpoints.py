"""Checkpoints: written whole or not at all, kept twice, and read without unpickling anything but tensors."""

import os
import signal
import threading
import time
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT

from dawm.errors import UserError, first_line

__all__ = ["LAYOUT", "ORIGIN", "AtomicCheckpointIO", "Interrupted", "SaveCheckpoint", "read_checkpoint", "write_whole"]

ORIGIN = "dawm_origin"
"""Key of a checkpoint under which the data set it was trained on is named."""
LAYOUT = 2
"""Order of the numbers in a module's weights; a checkpoint of another order would load, and mean nothing."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file, syncs it to the disk and renames it; the checkpoint before is kept beside it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Saves a checkpoint; a kill at any moment leaves the old file or the new one, never half a file.

        Args:
            checkpoint: What to save.
            path: Where to.
            storage_options: Unused.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                os.replace(path, previous_of(path))
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"cannot write {path}: {error.strerror or error}; free the disk or set --output_dir"
            ) from None
        except RuntimeError as error:  # torch reports a full disk in its own words
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}; is the disk full? Free it or set --output_dir ({error})") from None

    def load_checkpoint(self, path: str | os.PathLike, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a checkpoint for Lightning, as `read_checkpoint` does.

        Args:
            path: File to read.
            args: Unused; what Lightning would choose is decided here.
            kwargs: Unused.
        """
        return read_checkpoint(path)


def previous_of(path: Path) -> Path:
    """Where the checkpoint before the last one is kept.

    Args:
        path: Where the last one is kept.
    """
    return path.with_name(f"previous{path.suffix}")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all.

    Args:
        path: Where to.
        text: What.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """A checkpoint's content, on the CPU.

    Args:
        path: File to read.

    Raises:
        UserError: The file is missing, damaged, of another layout, or holds more than tensors and plain values.
    """
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is no checkpoint but a {type(checkpoint).__name__}; name one that `fit` wrote")
    if ORIGIN in checkpoint and checkpoint[ORIGIN].get("layout", 1) != LAYOUT:
        raise UserError(f"{path} was written by another version of dawm, whose weights lie otherwise; train it anew")
    return checkpoint


def _read(path: str | os.PathLike) -> Any:
    try:
        with ZipFile(path) as archive:  # torch reads the parts without comparing them with their checksums
            if archive.testzip() is not None:
                raise BadZipFile("a checksum does not fit")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}; check the path, or train that stage first") from None
    except UnpicklingError as error:
        raise UserError(
            f"{path} is damaged or not a safe checkpoint and was not loaded ({first_line(error)})"
        ) from None
    except (BadZipFile, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint ({first_line(error)}); delete it to start anew"
        ) from None


class Interrupted(Exception):
    """Training was stopped from outside (Ctrl-C, SIGTERM), after a checkpoint was saved."""


def requeue_signal(trainer: L.Trainer) -> int | None:
    """The signal upon which Lightning asks SLURM to start this job again; None where it does not.

    Args:
        trainer: The trainer.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def remove_requeue_checkpoints(folder: Path) -> None:
    """Removes what Lightning's handler of SLURM's requeue signal saved, beside ``last.ckpt`` with the same state.

    Args:
        folder: The trainer's ``default_root_dir``.
    """
    for path in folder.glob("hpc_ckpt_*.ckpt"):
        path.unlink(missing_ok=True)


class SaveCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` every N updates and at the end, and the random states with it.

    Ctrl-C and SIGTERM save too, once the updates under way are done, and then end the training with `Interrupted`. So
    does SLURM's requeue signal, for which Lightning's own handler then asks SLURM to start the job again.

    Args:
        path: Where to save.
        every_n_steps: Updates between two checkpoints.
        origin: What the checkpoint was trained on, kept in it.
    """

    def __init__(self, path: Path, every_n_steps: int, origin: dict[str, Any]) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self.origin = origin
        self.seconds = 0.0  # of training, over all starts of the run
        self._started = 0.0
        self.finished = False  # a callback has ended the stage before its last update
        self._last_step = 0
        self._signals: list[int] = []
        self._handlers: dict[int, Any] = {}
        self._requeue: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock, takes the signals over, and does not go on with what was stopped early."""
        trainer.should_stop |= self.finished
        self._started = time.monotonic()
        self._last_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._requeue = requeue_signal(trainer)
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
        self._give_signals_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._give_signals_back()

    def _give_signals_back(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)

    def _save_or_stop(self, trainer: L.Trainer) -> None:
        """Saves if a checkpoint is due; saves and stops where a signal has come to any rank."""
        if trainer.global_step // self.every_n_steps > self._last_step // self.every_n_steps:
            self._save(trainer)
        if trainer.strategy.reduce_boolean_decision(bool(self._signals), all=False):
            self._save(trainer)
            if trainer.strategy.reduce_boolean_decision(self._requeue in self._signals, all=False):
                # Lightning would do this in the middle of an update. Its own checkpoint is one too many: it would be
                # loaded in place of a finished stage's weights.
                self._handlers[self._requeue](self._requeue, None)  # type: ignore[index]
                remove_requeue_checkpoints(self.path.parent)
            raise Interrupted(f"stopped after update {trainer.global_step}; the same command goes on from {self.path}")

    def _save(self, trainer: L.Trainer) -> None:
        now = time.monotonic()
        self.seconds += now - self._started
        self._started = now
        self._last_step = trainer.global_step
        self.finished = trainer.should_stop
        trainer.save_checkpoint(self.path, weights_only=False)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the origin and every rank's random state."""
        checkpoint[ORIGIN] = self.origin
        state = torch.get_rng_state().to(trainer.strategy.root_device)
        checkpoint["random_states"] = trainer.strategy.all_gather(state).reshape(trainer.world_size, -1).cpu()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Goes on with the random numbers where the interrupted run stopped."""
        states = checkpoint["random_states"]
        if len(states) == trainer.world_size:
            torch.set_rng_state(states[trainer.global_rank])

    def state_dict(self) -> dict[str, Any]:
        """The seconds trained so far, and whether the stage has ended early."""
        return {"seconds": self.seconds, "finished": self.finished}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting the seconds."""
        self.seconds, self.finished = state_dict["seconds"], state_dict.get("finished", False)
