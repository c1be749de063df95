"""Load time, memory and drawing rate of data sets of HalfCheetah's shape, 1 M to 100 M rows.

    OMP_NUM_THREADS=1 python -m benchmarks.data_scale --rows 1 10 --repeats 5
    OMP_NUM_THREADS=1 python -m benchmarks.data_scale --rows 1 10 100 --repeats 5     # 17 GB of disk, 20 minutes

Rows are random numbers: 17 observations, 6 actions, episodes of 1000 steps. ``random`` ones are generated while the
cache is built, ``minari`` ones read from a true Minari data set (HDF5). Every figure is taken in a process of its own;
repeats go round through the cases. "Cold" means that the file was dropped from the operating system's page cache,
"warm" that it was read before. Everything is written below a temporary folder (``--folder``), which is removed at the
end.
"""

import argparse
import contextlib
import json
import logging
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
import torch

from benchmarks.measure import command_of, report
from dawm.data import episodes
from dawm.data.module import TransitionDataModule
from dawm.data.sources.source import BLOCK, Block, Source
from dawm.data.sources.spaces import unbounded
from dawm.data.store.minari_writer import EpisodeColumns, write_dataset

OBSERVATIONS, ACTIONS, STEPS = 17, 6, 1000
UPDATES, BATCH = 32, 256
SPACES = unbounded(OBSERVATIONS), gym.spaces.Box(-1.0, 1.0, (ACTIONS,), np.float32)
MIB = 2**20


class RandomRows(Source):
    """Random rows in episodes of 1000 steps."""

    env_spec, reference, files = None, None, ()
    observation_space, action_space = SPACES

    def __init__(self, count: int) -> None:
        self.name, self.count, self.settings, self.path = f"random-{count}", count, f"random {count}", Path(".")

    def blocks(self) -> Iterator[Block]:
        generator = np.random.default_rng(0)
        for start in range(0, self.count, BLOCK):
            size = min(BLOCK, self.count - start)
            rows = generator.random((size, self.width), np.float32)
            rows[:, -1] = 0
            yield Block(rows, np.arange(start + 1, start + size + 1) % STEPS == 0)


# What the measuring processes do; each prints one line of JSON


def memory() -> dict[str, float]:
    """Memory of this process in MiB: of its own, and mapped from files (which the system takes back when it must)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, files = (int(status[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile"))
    return {"own": own, "files": files, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def module(kind: str, count: int, held: bool) -> TransitionDataModule:
    limit = 1e9 if held else 0.0
    name = f"scale/rows{count}-v0" if kind == "minari" else "random"
    return TransitionDataModule(name, batch_size=BATCH, segment_batch_size=BATCH, synthetic_fraction=0.0,
                                updates_per_step=UPDATES, memory_limit=limit)  # fmt: skip


def loaded(kind: str, count: int, held: bool) -> TransitionDataModule:
    data = module(kind, count, held)
    opened = mock.patch.object(episodes, "_open", return_value=RandomRows(count))
    with opened if kind == "random" else contextlib.nullcontext():
        data.setup()
    return data


def load(kind: str, count: int, held: bool) -> dict:
    before = memory()
    start = time.perf_counter()
    data = loaded(kind, count, held)
    seconds = time.perf_counter() - start
    after = memory()
    assert len(data.episodes) == count
    return {"seconds": seconds, "imports": before["own"] + before["files"], **after}


def draw(kind: str, count: int, held: bool) -> dict:
    data = loaded(kind, count, held)
    result = {}
    for name in ("mixed_loader", "segment_loader"):
        first, times, batches = [], [], iter(getattr(data, name)(10**9))
        begin = time.perf_counter()
        while time.perf_counter() - begin < (10 if count > 10**7 else 6):
            start = time.perf_counter()
            next(batches)
            times.append(1e3 * (time.perf_counter() - start))
        first, rest = (
            times[:20],
            times[len(times) // 2 :],
        )  # a process maps the pages that it draws from for the first time
        result[f"{name} first"], result[name] = statistics.mean(first), statistics.mean(rest)
    return result | memory()


def write(kind: str, count: int, held: bool) -> dict:
    """A true Minari data set, a few episodes at a time."""
    generator = np.random.default_rng(0)

    def episodes() -> Iterator[EpisodeColumns]:
        for _ in range(count // STEPS):
            yield EpisodeColumns(
                np.array([STEPS]),
                generator.random((STEPS + 1, OBSERVATIONS), np.float32),
                generator.random((STEPS, ACTIONS), np.float32),
                generator.random(STEPS, np.float32),
                np.array([False]),
            )

    start = time.perf_counter()
    write_dataset(f"scale/rows{count}-v0", episodes(), env_spec=gym.spec("HalfCheetah-v5"), metadata={},
                  observation_space=SPACES[0], action_space=SPACES[1], description="random numbers")  # fmt: skip
    return {"seconds": time.perf_counter() - start}


# The main process


def child(what: str, kind: str, count: int, held: bool) -> dict:
    command = [sys.executable, "-m", "benchmarks.data_scale", "--child", what, kind, str(count), str(int(held))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def rows_file(folder: Path) -> Path:
    (path,) = folder.glob("cache/*/data/rows.f32")
    return path


def make_cold(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_warm(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def summary(values: list[float], digits: int = 2) -> str:
    shown = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return " / ".join(shown) if len(values) > 1 else f"{values[0]:.{digits}f}"


def build_and_load(folder: Path, kind: str, millions: int, repeats: int) -> list[str]:
    """One kind and size in the first table."""
    count = millions * 10**6
    builds: list[dict] = []
    for _ in range(repeats if millions == 1 else 1):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        builds.append(child("load", kind, count, False))
    path = rows_file(folder)
    loads: dict[str, list[dict]] = {"cold": [], "warm": []}
    for _ in range(repeats if millions < 100 else 1):
        for state, prepare in (("cold", make_cold), ("warm", make_warm)):
            prepare(path)
            loads[state].append(child("load", kind, count, False))
    seconds, last = [build["seconds"] for build in builds], loads["warm"][-1]
    loaded = [summary([load["seconds"] for load in found]) for found in loads.values()]
    peak = max(build["peak"] for build in builds)
    return [kind, f"{millions} M", summary(seconds), f"{statistics.median(seconds) / millions:.2f}", f"{peak:.0f}",
            *loaded, f"{last['own']:.0f}", f"{last['files']:.0f}"]  # fmt: skip


def drawing(folder: Path, millions: int, repeats: int) -> Iterator[list[str]]:
    """In memory against mapped, in turns."""
    count = millions * 10**6
    path = rows_file(folder)
    found: dict[str, list[dict]] = {}
    for _ in range(repeats if millions < 100 else min(repeats, 3)):
        for where in ("memory", "mapped") if millions < 100 else ("mapped",):
            make_warm(path)
            found.setdefault(where, []).append(child("draw", "random", count, where == "memory"))
    for where, results in found.items():
        cells = [where, f"{millions} M"]
        for name in ("mixed_loader", "segment_loader"):
            per_row = UPDATES * BATCH * (1 if name == "mixed_loader" else 8)
            times = [result[name] for result in results]
            cells += [summary([result[f"{name} first"] for result in results]), summary(times)]
            cells.append(f"{1e6 * statistics.median(times) / per_row:.0f}")
        yield [*cells, f"{results[-1]['own']:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 10], help="millions of rows")
    parser.add_argument("--minari", type=int, nargs="*", default=[1, 10], help="millions of rows in Minari data sets")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder; default: the system's place")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.child:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        what, kind, count, held = settings.child
        print(json.dumps(globals()[what](kind, int(count), held == "1")))
        return
    built, drawn = [], []
    folder = Path(tempfile.mkdtemp(prefix="dawm-scale-", dir=settings.folder))
    os.environ |= {"DAWM_CACHE": str(folder / "cache"), "MINARI_DATASETS_PATH": str(folder / "minari")}
    try:
        for millions in settings.minari:
            child("write", "minari", millions * 10**6, False)
            built.append(build_and_load(folder, "minari", millions, settings.repeats))
            shutil.rmtree(folder / "minari")
        for millions in settings.rows:
            built.append(build_and_load(folder, "random", millions, settings.repeats))
            drawn += drawing(folder, millions, settings.repeats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    costs = ["build, s", "s per M", "peak, MiB", "load cold, s", "load warm, s", "own, MiB", "files, MiB"]
    times = ["transitions, first", "then", "ns a row", "segments, first", "then", "ns a row", "own, MiB"]
    report(
        "data-scale",
        command_of(__doc__, settings),
        [
            ("Building the cache and loading from it", ["rows", "count", *costs], built),
            (f"Drawing {UPDATES} batches of {BATCH}, page cache warm, ms", ["rows are", "count", *times], drawn),
        ],
        "Several figures in a cell: least / median / most over the repeats. MiB are of the whole process, Python and "
        "torch included; `own` is memory of its own, `files` is mapped from files and given back when needed. `first`: "
        "mean of the first 20 draws of a process; `then`: of the second half of several seconds. A segment has 8 rows.",
    )


if __name__ == "__main__":
    main()
