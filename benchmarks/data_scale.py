"""Load time, memory and drawing rate of data sets of HalfCheetah's shape, 1 M to 100 M rows.

    OMP_NUM_THREADS=1 python -m benchmarks.data_scale --rows 1 10 --repeats 5
    OMP_NUM_THREADS=1 python -m benchmarks.data_scale --rows 1 10 100 --repeats 5     # 17 GB of disk, 20 minutes

Rows are random numbers: 17 observations, 6 actions, episodes of 1000 steps. ``synthetic`` ones are generated while the
cache is built, ``minari`` ones read from a true Minari data set (HDF5, observations in double precision). Every figure
is taken in a process of its own; repeats go round through the cases. "Cold" means that the file was dropped from the
operating system's page cache, "warm" that it was read before. Everything is written below a temporary folder
(``--folder``), which is removed at the end; the results also go to ``--output``.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
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
import lightning as L
import minari
import numpy as np
import torch
from minari.data_collector import EpisodeBuffer

from dawm.agents import TD3BC
from dawm.data import episodes
from dawm.data.module import TransitionDataModule
from dawm.data.sources.source import BLOCK, Block, Source
from dawm.data.sources.spaces import unbounded
from dawm.world_model import DiffusionWorldModel

OBSERVATIONS, ACTIONS, STEPS = 17, 6, 1000
UPDATES, BATCH = 32, 256
SPACES = unbounded(OBSERVATIONS), gym.spaces.Box(-1.0, 1.0, (ACTIONS,), np.float32)
MIB = 2**20


class Synthetic(Source):
    """Random rows in episodes of 1000 steps."""

    env_spec, reference, files = None, None, ()
    observation_space, action_space = SPACES

    def __init__(self, count: int) -> None:
        self.name, self.count, self.settings, self.path = f"synthetic-{count}", count, f"synthetic {count}", Path(".")

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
    name = f"scale/rows{count}-v0" if kind == "minari" else "synthetic"
    return TransitionDataModule(name, batch_size=BATCH, segment_batch_size=BATCH, synthetic_fraction=0.0,
                                updates_per_step=UPDATES, memory_limit=limit)  # fmt: skip


def loaded(kind: str, count: int, held: bool) -> TransitionDataModule:
    data = module(kind, count, held)
    opened = mock.patch.object(episodes, "_open", return_value=Synthetic(count))
    with opened if kind == "synthetic" else contextlib.nullcontext():
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
        # a process maps the pages that it draws from for the first time
        first, rest = times[:20], times[len(times) // 2 :]
        result[f"{name} first"], result[name] = statistics.mean(first), statistics.mean(rest)
    return result | memory()


def train(kind: str, count: int, held: bool) -> dict:
    """Both ways of drawing under a Trainer, normalizers first."""
    data = loaded(kind, count, held)
    settings = dict(accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
                    enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)  # fmt: skip
    result = {}
    world_model = DiffusionWorldModel(OBSERVATIONS, ACTIONS, horizon=data.horizon)
    agent = TD3BC(OBSERVATIONS, ACTIONS)
    for learner in (world_model, agent):
        start = time.perf_counter()
        learner.fit_normalizers(data)
        result[f"{learner.name} normalizers"] = time.perf_counter() - start
        trainer = L.Trainer(max_steps=320, **settings)
        start = time.perf_counter()
        trainer.fit(learner, datamodule=data)
        result[f"{learner.name} updates/s"] = 320 / (time.perf_counter() - start)
    return result | memory()


def write(kind: str, count: int, held: bool) -> dict:
    """A true Minari data set, written episode by episode."""
    generator = np.random.default_rng(0)

    def buffers() -> Iterator[EpisodeBuffer]:
        for number in range(count // STEPS):
            yield EpisodeBuffer(
                id=number,
                observations=generator.random((STEPS + 1, OBSERVATIONS)),
                actions=generator.random((STEPS, ACTIONS), np.float32),
                rewards=generator.random(STEPS),
                terminations=np.zeros(STEPS, bool),
                truncations=np.arange(STEPS) == STEPS - 1,
            )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        space = gym.spaces.Box(-np.inf, np.inf, (OBSERVATIONS,), np.float64)
        data = minari.create_dataset_from_buffers(
            f"scale/rows{count}-v0", [], env=gym.spec("HalfCheetah-v5"), observation_space=space, action_space=SPACES[1]
        )
    start = time.perf_counter()
    data.storage.update_episodes(buffers())
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


class Report:
    """Lines for the screen and for the file."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)


def build_and_load(report: Report, folder: Path, kind: str, millions: int, repeats: int) -> None:
    """The rows of both tables of one size and kind."""
    count = millions * 10**6
    held = millions <= 10
    builds: list[dict] = []
    for _ in range(repeats if millions == 1 else 1):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        builds.append(child("load", kind, count, millions == 1))  # 1 M as it is used: held in memory as well
    seconds = [build["seconds"] for build in builds]
    path = rows_file(folder)
    loads: dict[str, list[dict]] = {"cold": [], "warm": []}
    for _ in range(repeats if millions < 100 else 1):
        for state, prepare in (("cold", make_cold), ("warm", make_warm)):
            prepare(path)
            loads[state].append(child("load", kind, count, held and millions == 1))
    last = loads["warm"][-1]
    report(
        f"| {kind} | {millions} M | {summary(seconds)} | {statistics.median(seconds) / millions:.2f} | "
        f"{max(build['peak'] for build in builds):.0f} | {summary([load['seconds'] for load in loads['cold']])} | "
        f"{summary([load['seconds'] for load in loads['warm']])} | {last['own']:.0f} | {last['files']:.0f} | "
        f"{'memory' if millions == 1 else 'mapped'} |"
    )


def drawing(report: Report, folder: Path, millions: int, repeats: int) -> None:
    """In memory against mapped, in turns."""
    count = millions * 10**6
    path = rows_file(folder)
    found: dict[str, list[dict]] = {}
    for _ in range(repeats if millions < 100 else min(repeats, 3)):
        for where in ("memory", "mapped") if millions < 100 else ("mapped",):
            make_warm(path)
            found.setdefault(where, []).append(child("draw", "synthetic", count, where == "memory"))
    for where, results in found.items():
        cells = [f"{where} | {millions} M"]
        for name in ("mixed_loader", "segment_loader"):
            per_row = UPDATES * BATCH * (1 if name == "mixed_loader" else 8)
            cells.append(summary([result[f"{name} first"] for result in results]))
            times = [result[name] for result in results]
            cells += [summary(times), f"{1e6 * statistics.median(times) / per_row:.0f}"]
        report(f"| {' | '.join(cells)} | {results[-1]['own']:.0f} |")


def machine() -> str:
    model = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name"))  # fmt: skip
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.1f} GiB RAM, load average {os.getloadavg()[0]:.1f} at the start"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 10], help="millions of rows")
    parser.add_argument("--minari", type=int, nargs="*", default=[1, 10], help="millions of rows in Minari data sets")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder; default: the system's place")
    parser.add_argument("--output", type=Path, help="file for the results")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.child:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        what, kind, count, held = settings.child
        print(json.dumps(globals()[what](kind, int(count), held == "1")))
        return
    report = Report()
    report("# Data at scale\n")
    report(f"* Machine: {machine()}")
    report(f"* Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, one thread")
    counts = f"--rows {' '.join(map(str, settings.rows))} --minari {' '.join(map(str, settings.minari))}"
    report(f"* Command: `python -m benchmarks.data_scale {counts} --repeats {settings.repeats}`")
    report(
        "* Several figures in a cell: least / median / most over the repeats. MiB are of the whole process, Python and"
    )
    report("  torch included; `own` is memory of its own, `files` is mapped from files and given back when needed.\n")
    folder = Path(tempfile.mkdtemp(prefix="dawm-scale-", dir=settings.folder))
    os.environ |= {"DAWM_CACHE": str(folder / "cache"), "MINARI_DATASETS_PATH": str(folder / "minari")}
    try:
        report("## Building the cache and loading from it\n")
        report(
            "| rows | count | build, s | s per M | peak, MiB | load cold, s | load warm, s | own | files | rows are |"
        )
        report("|---|---|---|---|---|---|---|---|---|---|")
        for millions in settings.minari:
            child("write", "minari", millions * 10**6, False)
            build_and_load(report, folder, "minari", millions, settings.repeats)
            shutil.rmtree(folder / "minari")
        for millions in settings.rows:
            build_and_load(report, folder, "synthetic", millions, settings.repeats)
        report(f"\n## Drawing {UPDATES} batches of {BATCH} from a warm page cache, ms\n")
        report(
            "`first`: mean of the first 20 draws of a process; `then`: of the second half of several seconds. A segment"
        )
        report("has 8 rows.\n")
        report(
            "| rows are | count | transitions, first | then | ns a row | segments, first | then | ns a row | own, MiB |"
        )
        report("|---|---|---|---|---|---|---|---|---|")
        for millions in settings.rows:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            child("load", "synthetic", millions * 10**6, False)
            drawing(report, folder, millions, settings.repeats)
        millions = max(settings.rows)
        report(f"\n## Training from {millions} M mapped rows, 320 updates each\n")
        for key, value in child("train", "synthetic", millions * 10**6, False).items():
            report(f"* {key}: {value:.1f}{' MiB' if key in ('own', 'files', 'peak') else ''}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if settings.output is not None:
            settings.output.parent.mkdir(parents=True, exist_ok=True)
            settings.output.write_text("\n".join(report.lines) + "\n")


if __name__ == "__main__":
    main()
