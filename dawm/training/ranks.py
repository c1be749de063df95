"""Processes of one run: which is the first, who else may use its folder, and that they end together."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed

from dawm.errors import UserError, require

__all__ = ["check_launcher", "end_with_first_rank", "is_lost_connection", "only_run_in"]

INTERVAL = 2.0  # seconds between two looks
FIRST_RANK = "DAWM_FIRST_RANK"  # environment variable with the process that starts the other ranks, which inherit it


def end_with_first_rank(trainer: L.Trainer) -> None:
    """Ends a rank soon after the first one, from whose process Lightning started it, has ended in any way.

    Lightning watches the other direction, torchrun and SLURM both. A rank would otherwise wait in the next collective
    for as long as the backend lets it: half an hour with NCCL.
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
    """Whether an error says no more than that another rank has ended."""
    text = str(error)
    return isinstance(error, torch.distributed.DistError) or ("gloo" in text and "onnection" in text)


def check_launcher(trainer: Mapping[str, Any]) -> None:
    """Raises a UserError where torchrun started more processes than the settings join into one group."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes") or 1
    asked = len(devices) if isinstance(devices, list) else devices
    if "TORCHELASTIC_RUN_ID" in os.environ and str(asked).isdecimal():
        fits = int(asked) * nodes == world_size  # type: ignore[arg-type]
        each = world_size // nodes
        require("trainer.devices", devices, fits, f"the {each} processes that torchrun started on each node",
                f"set --trainer.devices {each} --trainer.strategy ddp")  # fmt: skip


@contextmanager
def only_run_in(
    folder: Path, wait: bool, create: bool = False, say: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Holds a folder, created if asked, for this process and the ranks it starts, so that no other `fit` writes there.

    The lock is the kernel's, on the file ``.lock``, so that it ends with the process, however that ends. The file says
    which host and process hold it; where the file system knows no locks, a holder on this host that has ended is stale.
    """
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank != "0":  # the first rank holds it for all
        yield
        return
    path = folder / ".lock"
    if create:
        folder.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        for turn in count():
            if _locked(file):
                break
            if turn == 0:
                say()  # that it waits
            if not wait:
                holder = {"pid": "unknown", "host": "another host"} | _holder(path)
                raise UserError(
                    f"--output_dir: got {folder}, which process {holder['pid']} on {holder['host']} is training in, "
                    "expected a folder of this run alone; set another --output_dir, or wait for it with --wait true"
                )
            time.sleep(INTERVAL)
        file.truncate(0)  # it is appended to
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _locked(file: Any) -> bool:
    """Takes the lock, if nobody holds it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # no such locks here: the holder's process decides
        holder = _holder(Path(file.name))
        return not holder or (holder.get("host") == socket.gethostname() and not _is_running(holder.get("pid")))
    return True


def _holder(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _is_running(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (OSError, TypeError, ValueError):
        return False
    return True
