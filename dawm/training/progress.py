"""StageProgress: how far a stage is, as a bar on a terminal and as plain lines in a log file."""

from datetime import timedelta
from time import monotonic
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["StageProgress"]

SECONDS = 30.0  # between two plain lines
LOOK = 0.5  # seconds between two looks at the metrics, which cost a tenth of a millisecond; an evaluation takes longer


class StageProgress(ProgressBar):
    """Stage, updates done and to do, updates per second, time left, the newest metrics; from the first rank alone.

    On a terminal that is a bar; elsewhere (a log file, a cluster job) a plain line at the start, the end, every 30
    seconds and each validation or evaluation, noticed by its progress-bar metrics ``eval/...``. ``unit`` is what
    ``max_steps`` counts.
    """

    def __init__(self, stage: str, console: Console, quiet: bool = False, unit: str = "updates") -> None:
        super().__init__()
        self._stage, self._unit = stage, unit
        self._console = console
        self._enabled = not quiet
        self._start: tuple[float, int] | None = None  # time and updates done; None outside of training
        self._last_line = self._last_look = 0.0
        self._evaluated: dict[str, str] = {}
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def disable(self) -> None:
        """Prints nothing; Lightning calls this on all ranks but the first."""
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the bar or prints the first line."""
        if not self._enabled:
            return
        done = trainer.global_step
        self._start = monotonic(), done
        self._evaluated = _newest(trainer, "eval/")
        if not self._console.is_terminal:
            self._print(f"{done:,} of {trainer.max_steps:,} {self._unit}")
            return
        name, rate, metrics = "[bold]{task.description:<16}", "{task.fields[rate]:>6}", "{task.fields[metrics]}"
        columns = (TextColumn(name), BarColumn(bar_width=16), MofNCompleteColumn(),
                   TextColumn(f"{rate} {self._unit}/s"), TimeRemainingColumn(), TextColumn(metrics))  # fmt: skip
        self._progress = Progress(*columns, console=self._console)
        self._task = self._progress.add_task(self._stage, total=trainer.max_steps, completed=done, rate="-", metrics="")
        self._progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar; prints a line if one is due, or if a callback has just evaluated."""
        if self._start is None:
            return
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.global_step, rate=_figure(self._rate(trainer)))
        now = monotonic()
        if now - self._last_look >= LOOK:
            before, self._evaluated, self._last_look = self._evaluated, _newest(trainer, "eval/"), now
            if self._evaluated != before or (self._progress is None and now - self._last_line >= SECONDS):
                self._show_metrics(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the validation's metrics."""
        if self._start is not None:
            self._show_metrics(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the finished bar on the screen, or prints the last line."""
        if self._start is not None and self._progress is None:
            self._print(f"{self._counts(trainer)}, took {_clock(monotonic() - self._start[0])}{_listed(trainer)}")
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the screen back."""
        self._stop()

    def _show_metrics(self, trainer: L.Trainer) -> None:
        if self._progress is not None:
            shown = (f"{key.split('/')[-1]} {value}" for key, value in _newest(trainer).items())
            self._progress.update(self._task, metrics="  ".join(shown))
            return
        rate = self._rate(trainer)
        left = f", {_clock((trainer.max_steps - trainer.global_step) / rate)} left" if rate > 0 else ""
        self._print(f"{self._counts(trainer)}{left}{_listed(trainer)}")

    def _counts(self, trainer: L.Trainer) -> str:
        done, total, unit = trainer.global_step, trainer.max_steps, self._unit
        return f"{done:,} of {total:,} {unit} ({100 * done / total:.0f} %), {_figure(self._rate(trainer))} {unit}/s"

    def _rate(self, trainer: L.Trainer) -> float:
        """Updates per second since training started or resumed."""
        seconds, done = self._start or (0.0, 0)
        return (trainer.global_step - done) / max(monotonic() - seconds, 1e-9)

    def _print(self, text: str) -> None:
        self._last_line = monotonic()
        self._console.print(f"{self._stage}: {text}", soft_wrap=True, markup=False, highlight=False)

    def _stop(self) -> None:
        self._start = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _newest(trainer: L.Trainer, prefix: str = "") -> dict[str, str]:
    """The progress bar's metrics as text, so that a NaN equals itself."""
    metrics = trainer.progress_bar_metrics
    return {k: f"{v:.4g}" for k, v in metrics.items() if isinstance(v, float) and k.startswith(prefix)}


def _listed(trainer: L.Trainer) -> str:
    return "".join(f", {key} {value}" for key, value in _newest(trainer).items())


def _figure(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
