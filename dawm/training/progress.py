"""StageProgress: one line per stage with rate and time left, in updates."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["StageProgress"]


class StageProgress(ProgressBar):
    """A rich progress bar: stage, updates done and to do, updates per second, time left, the last metrics.

    Args:
        stage: What is being trained, as shown.
        console: Where to draw.
    """

    def __init__(self, stage: str, console: Console) -> None:
        super().__init__()
        self._stage = stage
        self._console = console
        self._enabled = True
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._start = (0.0, 0)

    def disable(self) -> None:
        """Draws nothing; Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Draws."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the bar."""
        if not self._enabled:
            return
        self._progress = Progress(
            TextColumn("[bold]{task.description:<16}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>6} updates/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self._console,
        )
        self._task = self._progress.add_task(
            self._stage, total=trainer.max_steps, completed=trainer.global_step, rate="-", metrics=""
        )
        self._start = (time.monotonic(), trainer.global_step)
        self._progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar."""
        if self._progress is not None:
            seconds = time.monotonic() - self._start[0]
            rate = (trainer.global_step - self._start[1]) / max(seconds, 1e-9)
            self._progress.update(self._task, completed=trainer.global_step, rate=f"{rate:.0f}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the last metrics."""
        if self._progress is not None:
            metrics = self.get_metrics(trainer, pl_module)
            shown = (f"{key.split('/')[-1]} {value:.4g}" for key, value in metrics.items() if isinstance(value, float))
            self._progress.update(self._task, metrics="  ".join(shown))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the finished bar on the screen."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the screen back."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
