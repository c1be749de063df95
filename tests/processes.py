"""`python -m dawm` in processes of its own that start at once, each forked from one that has imported the packages.

An import takes seconds, most of them PyTorch's and Lightning's; these tests kill, signal and restart many runs.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["dawm.cli.main"])


def _become(arguments: Sequence[str], environment: Mapping[str, str], stdout: Path, stderr: Path, limit: int | None):
    """Runs the command in this process, as a shell would start it."""
    os.setsid()  # a group of its own, as from a shell
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    for path, number in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.argv = ["dawm", *arguments]
    runpy.run_module("dawm", run_name="__main__")


def start(
    arguments: Sequence[str],
    stdout: Path,
    stderr: Path,
    environment: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> ForkServerProcess:
    """A process with this command, whose files may have ``limit`` bytes; what it prints is appended to files."""
    environment = dict(os.environ) | dict(environment or {})
    process = CONTEXT.Process(target=_become, args=(arguments, environment, stdout, stderr, limit), daemon=True)
    process.start()
    return process


def run(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, limit: int | None = None
) -> subprocess.CompletedProcess:
    """Runs a command to its end, within two minutes; what it prints goes through files in ``folder``."""
    outputs = [folder / name for name in ("stdout", "stderr")]
    for path in outputs:
        path.write_text("")
    process = start(arguments, *outputs, environment, limit)
    process.join(120)
    assert process.exitcode is not None, "it did not end"
    return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in outputs))
