"""Memory, open files and threads of a process over a long training of the agent, with much regeneration.

    python -m benchmarks.long_run                    # some 20 minutes

One `fit` of the quickstart's config in a process of its own, with short first stages, 200,000 updates of the agent,
2,000 new rollouts every 1,000 updates, an evaluation every 20,000 and a checkpoint every 10,000. "Allocated" is what
the process has asked for and not given back; "resident" also holds free memory that the allocator keeps.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import yaml

from benchmarks.measure import command_of, report

WINDOWS = 10
KEYS = ("memory", "allocated", "files", "threads", "system threads")
CONFIG = Path(__file__).parent.parent / "lightning_configs" / "quickstart.yaml"


class MallocInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``; ``uordblks`` are the bytes in use, ``hblkhd`` those in maps of their own."""

    _fields_ = (
        ("first", 4 * ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),
        ("middle", 2 * ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),
        ("last", 2 * ctypes.c_size_t),
    )


def allocated() -> int:
    """Bytes that the process has asked for and not given back; the resident memory also holds free ones."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = MallocInfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


class Watch(L.Callback):
    """Writes down what the process holds, every so many updates."""

    def __init__(self, path: str, every_n_steps: int) -> None:
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self.start = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            entry = {
                "updates": trainer.global_step,
                "seconds": time.monotonic() - self.start,
                "memory": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
                "allocated": allocated() / 2**20,
                "files": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
                "system threads": len(os.listdir("/proc/self/task")),
            }
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def config(folder: Path, updates: int, every: int) -> Path:
    settings = yaml.safe_load(CONFIG.read_text())
    settings["output_dir"] = str(folder / "run")
    for name in ("world_model", "inverse_dynamics"):
        settings["stages"][name] |= {"max_steps": 500, "validate_every_n_steps": 500}
    agent, chunk = settings["stages"]["agent"], settings["data"]["updates_per_step"]

    def part(count: int) -> int:
        """The run's updates over ``count``, in whole training steps."""
        return max(1, updates // count // chunk) * chunk

    agent |= {"max_steps": updates, "checkpoint_every_n_steps": part(20)}
    regenerate, evaluate = agent["callbacks"]
    # a world model trained so little misses the data's range
    regenerate["init_args"] |= {"every_n_steps": part(200), "rollouts": 2000, "margin": 100.0}
    evaluate["init_args"] |= {"every_n_steps": part(10), "episodes": 5}
    watch = {"path": str(folder / "watched.jsonl"), "every_n_steps": every}
    agent["callbacks"].append({"class_path": "benchmarks.long_run.Watch", "init_args": watch})
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def extremes(window: list[dict[str, float]], key: str) -> tuple[float, float]:
    values = [entry[key] for entry in window]
    return min(values), max(values)


def main(argv: list[str] | None = None) -> list[tuple[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200_000)
    parser.add_argument("--every", type=int, default=500, help="updates between two readings")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="dawm-long-run-") as text:
        folder = Path(text)
        command = [sys.executable, "-m", "dawm", "fit", "--config", str(config(folder, options.updates, options.every))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        watched = [json.loads(line) for line in (folder / "watched.jsonl").read_text().splitlines()]
    size = len(watched) // WINDOWS
    windows = [watched[start : start + size] for start in range(0, size * WINDOWS, size)]
    body = [
        [f"{window[-1][key]:,.0f}" for key in ("updates", "seconds")]
        + [f"{low:,.0f} to {high:,.0f}" for low, high in (extremes(window, key) for key in KEYS)]
        for window in windows
    ]
    growth = f"{extremes(windows[-1], 'allocated')[1] - extremes(windows[0], 'allocated')[1]:+,.1f} MiB"
    what = f"most memory allocated over {options.updates:,} updates, last tenth against first"
    notes = " ".join(__doc__.split("\n\n")[2].split()) + f"\n\nChange of the {what}: {growth}."
    header = ["updates", "seconds", "resident, MiB", "allocated, MiB", "open files", "Python threads", "system threads"]
    title = "What the process holds, least to most of a tenth of the run"
    report("long-run", command_of(__doc__, options), [(title, header, body)], notes)
    return [(what, growth)]


if __name__ == "__main__":
    main()
