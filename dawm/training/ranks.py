"""Processes of one run that end together: none is left waiting for one that is gone."""

import os
import threading
import time

import lightning as L
import torch.distributed

__all__ = ["end_with_first_rank", "is_lost_connection"]

INTERVAL = 2.0  # seconds between two looks
FIRST_RANK = "DAWM_FIRST_RANK"
"""Environment variable with the process that the other ranks are started by; they inherit it."""


def end_with_first_rank(trainer: L.Trainer) -> None:
    """Ends a rank soon after the first one, from whose process Lightning started it, has ended in any way.

    Lightning itself watches the other direction, and torchrun and SLURM both. Without this, a rank would wait in the
    next collective for as long as the backend lets it: half an hour with NCCL.

    Args:
        trainer: The trainer whose ranks these are, before its first fit.
    """
    if trainer.world_size == 1:
        return
    first = int(os.environ.setdefault(FIRST_RANK, str(os.getpid())))
    if os.getppid() != first or any(thread.name == FIRST_RANK for thread in threading.enumerate()):
        return

    def watch() -> None:
        while os.getppid() == first:
            time.sleep(INTERVAL)
        os._exit(1)  # the main thread may be where no exception reaches it

    threading.Thread(target=watch, name=FIRST_RANK, daemon=True).start()


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error says no more than that another rank has ended.

    Args:
        error: What was raised.
    """
    text = str(error)
    return isinstance(error, torch.distributed.DistError) or ("gloo" in text and "onnection" in text)
