"""Where the cells of a comparison run: processes of this machine, a Ray cluster, or an array job of SLURM.

A launcher takes the cells to train, the number of local workers, the arguments of the whole command and the console. It
returns the cells that failed, and why.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from dawm.errors import UserError
from dawm.files import write_whole

__all__ = ["LAUNCHERS"]

INTERVAL = 0.5  # seconds between two looks at the workers
LINES = 30.0  # seconds between two lines of progress
RETRIES = 3  # of a cell whose worker died


class Work(Protocol):
    """A cell, as far as a launcher needs it."""

    name: str
    folder: Path
    run: Path
    log: Path

    def command(self) -> list[str]: ...  # noqa: D102
    def done(self) -> bool: ...  # noqa: D102
    def collect(self) -> None: ...  # noqa: D102


def train(cell: Work) -> str | None:
    """Runs one cell to its end, with one thread; the reason if it failed."""
    process = _start(cell)
    try:
        return _finish(cell, process.wait())
    finally:
        _stop([process])


def run_locally(cells: Sequence[Any], workers: int, command: Sequence[str], console: Console) -> dict[str, str]:
    """So many cells at once on this machine, one thread each."""
    waiting, running, failed = list(cells), dict[subprocess.Popen, Any](), dict[str, str]()
    progress = Progress(len(cells), console)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of `finally`
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                cell = waiting.pop(0)
                running[_start(cell)] = cell
            time.sleep(INTERVAL)
            for process, cell in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[process]
                    error = _finish(cell, code)
                    failed |= {} if error is None else {cell.name: error}
                    progress.ended(cell.name, error)
            progress.show([cell for cell in running.values()])
    finally:
        _stop(running)
    return failed


def run_on_ray(cells: Sequence[Any], workers: int, command: Sequence[str], console: Console) -> dict[str, str]:
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
        ray.init(num_cpus=None if "RAY_ADDRESS" in os.environ else workers, include_dashboard=False)
    progress, failed = Progress(len(cells), console), dict[str, str]()
    error: str | None
    try:
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(train)
        tasks = {task.remote(cell): cell for cell in cells}
        while tasks:
            ready, _ = ray.wait(list(tasks), timeout=LINES)
            for reference in ready:
                cell = tasks.pop(reference)
                try:
                    error = ray.get(reference)
                except ray.exceptions.RayError as problem:
                    error = f"its worker died {RETRIES + 1} times ({type(problem).__name__}; log: {cell.log})"
                failed |= {} if error is None else {cell.name: error}
                progress.ended(cell.name, error)
            progress.show([cell for cell in tasks.values() if cell.log.exists()])
    finally:
        if started:
            ray.shutdown()
    return failed


def submit_to_slurm(cells: Sequence[Any], workers: int, command: Sequence[str], console: Console) -> dict[str, str]:
    """Writes an array job with one task for each cell, and submits it where there is ``sbatch``.

    The same command again shows what is finished, and submits what is not.
    """
    folder = cells[0].folder
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
#SBATCH --output={logs}
cd {shlex.quote(os.getcwd())}
export OMP_NUM_THREADS=1
exec {line.replace("'$SLURM_ARRAY_TASK_ID'", '"$SLURM_ARRAY_TASK_ID"')}
""")  # fmt: skip
    if shutil.which("sbatch"):
        done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True)
        console.print((done.stdout or done.stderr).strip(), markup=False)
        return {} if done.returncode == 0 else {"sbatch": done.stderr.strip()}
    console.print(f"submit it with: sbatch {script}", soft_wrap=True, markup=False)
    return {}


LAUNCHERS: dict[str, Callable[[Sequence[Any], int, Sequence[str], Console], dict[str, str]]] = {
    "local": run_locally,
    "ray": run_on_ray,
    "slurm": submit_to_slurm,
}


class Progress:
    """Lines on how far a comparison is: as each cell ends, and every half minute."""

    def __init__(self, cells: int, console: Console) -> None:
        self.total, self.ended_count, self.console = cells, 0, console
        self.start = self.last = time.monotonic()

    def ended(self, name: str, error: str | None) -> None:
        """A cell has ended."""
        self.ended_count += 1
        self._print(f"{name} {'done' if error is None else 'failed: ' + error}; {self._counts()}")

    def show(self, running: Sequence[Any]) -> None:
        """A line for what runs, if one is due."""
        if time.monotonic() - self.last >= LINES:
            self._print(f"{self._counts()}; " + "; ".join(f"{cell.name}: {_last_line(cell.log)}" for cell in running))

    def _counts(self) -> str:
        passed = time.monotonic() - self.start
        left = passed / self.ended_count * (self.total - self.ended_count) if self.ended_count else None
        rest = "" if left is None else f", about {left / 60:.0f} min left"
        return f"{self.ended_count} of {self.total} cells after {passed / 60:.0f} min{rest}"

    def _print(self, text: str) -> None:
        self.last = time.monotonic()
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)


def _start(cell: Work) -> subprocess.Popen:
    cell.run.mkdir(parents=True, exist_ok=True)
    with cell.log.open("ab") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        return subprocess.Popen(
            cell.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _finish(cell: Work, code: int) -> str | None:
    if code == 0:
        cell.collect()
        return None
    lines = [line.strip() for line in cell.log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")] or lines[-1:] or ["it printed nothing"]
    return f"{said[-1].removeprefix('error: ')} (log: {cell.log})"


def _stop(processes: Any) -> None:
    """Ends what still runs, with a signal at which `fit` writes a checkpoint."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 500))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return "starting"
    shown = (line.strip() for line in reversed(lines) if " of " in line or "waits for" in line)
    return next(shown, "starting")
