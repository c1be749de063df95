"""Where the cells of a comparison run: processes of this machine, a Ray cluster, or an array job of SLURM.

A launcher takes the cells to train, the number of local workers, the arguments of the whole command and the console. It
returns the cells that failed, and why.
"""

import datetime
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from dawm.cli.cells import Cell
from dawm.errors import UserError
from dawm.files import write_whole

__all__ = ["LAUNCHERS"]

INTERVAL = 0.5  # seconds between two looks at the workers
LINES = 30.0  # seconds between two lines of progress
RETRIES = 3  # of a cell whose process was killed
START = "--- started "  # in a cell's log, before what each start of its `fit` prints
JOBS = "compare.jobs"  # in the folder of a comparison: SLURM's numbers of the jobs submitted


def train(cell: Cell, folder: str) -> str | None:
    """Runs one cell to its end in a current folder, with one thread; the reason if it failed."""
    os.chdir(folder)
    for _ in range(RETRIES + 1):
        start = time.monotonic()
        process = _start(cell)
        try:
            code = process.wait()
        finally:
            _stop([process])
        if not _was_killed(code):
            break
    return _finish(cell, code, time.monotonic() - start)


def run_locally(cells: Sequence[Cell], workers: int, command: Sequence[str], console: Console) -> dict[str, str]:
    """So many cells at once on this machine, one thread each; one that is killed starts again and resumes."""
    waiting, kills = list(cells), Counter[str]()
    running = dict[subprocess.Popen, tuple[Cell, float]]()
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of `finally`
    progress = Progress(cells, console)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                cell = _pick(waiting, {other.models for other, _ in running.values()})
                running[_start(cell)] = cell, time.monotonic()
            time.sleep(INTERVAL)
            for process, (cell, start) in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[process]
                kills[cell.name] += _was_killed(code)
                if _was_killed(code) and kills[cell.name] <= RETRIES:
                    waiting.insert(0, cell)
                    continue
                progress.ended(cell, _finish(cell, code, time.monotonic() - start))
            progress.show([cell for cell, _ in running.values()])
    finally:
        progress.close()
        _stop(running)
        signal.signal(signal.SIGTERM, handler)
    return progress.failed


def _pick(waiting: list[Cell], busy: set[str]) -> Cell:
    """Takes the next cell, if possible one that does not wait for models that another one is training."""
    return waiting.pop(next((number for number, cell in enumerate(waiting) if cell.models not in busy), 0))


def run_on_ray(cells: Sequence[Cell], workers: int, command: Sequence[str], console: Console) -> dict[str, str]:
    """One task for each cell on a Ray cluster (its address from ``RAY_ADDRESS``, else a local one of so many workers).

    A task whose worker dies is started again, and goes on from the cell's last checkpoint. The folder of the comparison
    has to be one that all nodes share.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--launcher: got ray, which is not installed, expected one that is; pip install ray") from None
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_worker_niceness", "0")  # of a local one; Ray's own default is a low priority
        ray.init(num_cpus=None if "RAY_ADDRESS" in os.environ else workers, include_dashboard=False)
    progress = Progress(cells, console)
    error: str | None
    try:
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(train)
        tasks = {task.remote(cell, os.getcwd()): cell for cell in cells}
        while tasks:
            ready, _ = ray.wait(list(tasks), timeout=INTERVAL)
            for reference in ready:
                cell = tasks.pop(reference)
                try:
                    error = ray.get(reference)
                except ray.exceptions.RayError as problem:
                    error = f"its worker died {RETRIES + 1} times ({type(problem).__name__}; log: {cell.log})"
                progress.ended(cell, error)
            progress.show([cell for cell in tasks.values() if cell.log.exists()])
    finally:
        progress.close()
        if started:
            ray.shutdown()
    return progress.failed


def submit_to_slurm(cells: Sequence[Cell], workers: int, command: Sequence[str], console: Console) -> dict[str, str]:
    """Writes an array job with one task for each cell, and submits it where there is ``sbatch``.

    The same command again shows what is finished, and submits what is not, unless it is still in the queue.
    """
    folder, submits = cells[0].folder, bool(shutil.which("sbatch"))
    if submits and (folder / JOBS).exists():
        asked = ["squeue", "--noheader", "--format=%i", f"--jobs={(folder / JOBS).read_text().strip()}"]
        queued = subprocess.run(asked, capture_output=True, text=True).stdout.split()  # empty for a job that is over
        if queued:
            console.print(f"{len(cells)} cells are missing, and in SLURM's queue: {', '.join(queued)}", markup=False)
            return {}
    options = [*command[: command.index("--")], "--launcher", "local", "--cell", "$SLURM_ARRAY_TASK_ID"]
    line = shlex.join([sys.executable, "-m", "dawm", *options, *command[command.index("--") :]])
    numbers = ",".join(str(cell.index) for cell in cells)
    script = folder / "compare.sbatch"
    logs = folder / "slurm-%a.out"
    write_whole(script, f"""#!/bin/bash
#SBATCH --job-name=dawm-compare
#SBATCH --array={numbers}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --requeue
#SBATCH --output="{logs}"
cd {shlex.quote(os.getcwd())}
export OMP_NUM_THREADS=1
exec {line.replace("'$SLURM_ARRAY_TASK_ID'", '"$SLURM_ARRAY_TASK_ID"')}
""")  # fmt: skip
    if not submits:
        console.print(f"submit it with: sbatch {script}", soft_wrap=True, markup=False)
        return {}
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if done.returncode:
        return {"sbatch": done.stderr.strip()}
    write_whole(folder / JOBS, done.stdout.partition(";")[0].strip())  # a cluster's name may follow
    console.print(f"submitted {len(cells)} cells as job {done.stdout.strip()}", markup=False)
    return {}


LAUNCHERS: dict[str, Callable[[Sequence[Cell], int, Sequence[str], Console], dict[str, str]]] = {
    "local": run_locally,
    "ray": run_on_ray,
    "slurm": submit_to_slurm,
}


class Progress:
    """How far a comparison is: a line as each cell ends, a live one on a terminal, elsewhere one each half minute."""

    def __init__(self, cells: Sequence[Cell], console: Console) -> None:
        self.count, self.cost, self.console = len(cells), sum(cell.cost for cell in cells), console
        self.ended_count = self.ended_cost = 0
        self.failed: dict[str, str] = {}  # cells, and why
        self.start = self.last = time.monotonic()
        self.live = console.status("starting") if console.is_terminal else None
        if self.live is not None:
            self.live.start()

    def ended(self, cell: Cell, error: str | None) -> None:
        """A cell has ended."""
        self.ended_count, self.ended_cost = self.ended_count + 1, self.ended_cost + cell.cost
        self.failed |= {} if error is None else {cell.name: error}
        self._print(f"{cell.name} {'done' if error is None else 'failed: ' + error}; {self._counts()}")

    def show(self, running: Sequence[Cell]) -> None:
        """What runs."""
        if self.live is None and time.monotonic() - self.last < LINES:
            return
        text = "; ".join(
            [f"{self._counts()}, {len(running)} running"] + [f"{c.name}: {_last_line(c.log)}" for c in running]
        )
        if self.live is None:
            self._print(text)
        else:
            self.live.update(escape(text))

    def close(self) -> None:
        """Gives the screen back."""
        if self.live is not None:
            self.live.stop()

    def _counts(self) -> str:
        """Cells, their rate, and the time left, by the updates that cells have to make."""
        passed, rest = time.monotonic() - self.start, ""
        if self.ended_cost:
            left = passed / self.ended_cost * (self.cost - self.ended_cost)
            rest = f", {3600 * self.ended_count / passed:.3g} an hour, about {_clock(left)} left"
        return f"{self.ended_count} of {self.count} cells after {_clock(passed)}{rest}"

    def _print(self, text: str) -> None:
        self.last = time.monotonic()
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _start(cell: Cell) -> subprocess.Popen:
    cell.run.mkdir(parents=True, exist_ok=True)
    with cell.log.open("ab") as log:
        log.write(f"{START}{datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n".encode())
        log.flush()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        return subprocess.Popen(
            cell.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _was_killed(code: int) -> bool:
    """Whether a process ended by a signal; 130 is that of a `fit` that saved first."""
    return code < 0 or code == 130


def _finish(cell: Cell, code: int, seconds: float) -> str | None:
    """Collects the result of a process that has ended; the reason if there is none."""
    if code == 0:
        cell.collect(seconds)
        return None
    printed = cell.log.read_text(errors="replace").rpartition(START)[2]
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")] or lines[-1:] or ["it printed nothing"]
    reason = f"killed by signal {-code}" if code < 0 else said[-1].removeprefix("error: ")
    return f"{reason} (log: {cell.log})"


def _stop(processes: Collection[subprocess.Popen]) -> None:
    """Ends what still runs, with a signal at which `fit` writes a checkpoint."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))  # past what else was said since
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return "starting"
    shown = (line.strip() for line in reversed(lines) if " of " in line or "waits for" in line)
    return next(shown, "starting")
