"""EveryNUpdates: the base of callbacks that do something every N updates."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import lightning as L

from dawm.errors import require

__all__ = ["EveryNUpdates"]


class EveryNUpdates(L.Callback, ABC):
    """Calls `run` whenever the count of updates has crossed a multiple of ``every_n_steps``.

    Lightning's own callbacks count training steps, each of which makes ``updates_per_step`` updates here.

    Example::

        class SaveActor(EveryNUpdates):
            def run(self, trainer, pl_module):
                torch.save(pl_module.actor.state_dict(), f"actor-{trainer.global_step}.pt")

        trainer = L.Trainer(max_steps=10_000, callbacks=[SaveActor(every_n_steps=1000)])
        trainer.fit(agent, datamodule=data)

    A checkpoint holds the attributes that ``kept`` names, with those of the base class. A subclass names its own as in
    ``kept = (*EveryNUpdates.kept, "best")``; a resumed training then begins with what they were.

    Args:
        every_n_steps: Updates between two runs; a multiple of the data's ``updates_per_step``.
    """

    kept: ClassVar[tuple[str, ...]] = ("last_step", "seconds")

    def __init__(self, every_n_steps: int = 5000) -> None:
        self.key = f"stages.agent.callbacks.{type(self).__name__}"  # of the settings, for messages
        require(f"{self.key}.every_n_steps", every_n_steps, every_n_steps >= 1, "at least 1")
        self.every_n_steps = every_n_steps
        self.last_step: int | None = None  # update of the last run, or that training began at
        self.seconds = 0.0  # that all runs have taken

    @abstractmethod
    def run(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What to do; ``trainer.global_step`` is the count of updates."""

    def should_run(self, step: int) -> bool:
        """Whether a multiple was crossed since the last run, with ``step`` updates done."""
        return step // self.every_n_steps > (self.last_step or 0) // self.every_n_steps

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forgets an earlier training; Lightning restores a checkpoint's state after this."""
        if stage == "fit":
            self.last_step, self.seconds = None, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks that runs fall on the ends of training steps."""
        chunk = getattr(trainer.datamodule, "updates_per_step", 1)  # type: ignore[attr-defined]
        holds, expected = self.every_n_steps % chunk == 0, f"a multiple of data.updates_per_step, which is {chunk}"
        require(f"{self.key}.every_n_steps", self.every_n_steps, holds, expected, "change one of the two")
        if self.last_step is None:
            self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Runs where it is due."""
        if self.should_run(trainer.global_step):
            self.last_step = trainer.global_step
            with self.timed():
                self.run(trainer, pl_module)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts what is done inside as this callback's time."""
        start = time.monotonic()
        yield
        self.seconds += time.monotonic() - start

    def state_dict(self) -> dict[str, Any]:
        """What `kept` names; the last run's update, so that a resumed training runs when an uninterrupted one would."""
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        for name in self.kept:
            setattr(self, name, state_dict[name])
