"""Measuring side by side: contestants take turns in one process, so that noise of the machine meets all of them alike.

Only ratios within one table mean anything: absolute rates drift with what else the machine does.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dawm.cli.comparison_page import markdown
from dawm.cli.html import processor
from dawm.nn.matmul import prefer_onednn
from dawm.nn.memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "lightning", "numpy", "gymnasium", "torchrl", "d3rlpy", "jax")


@dataclass(frozen=True)
class Rates:
    """Units done per second, of the rounds of one contestant."""

    name: str
    rates: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def interleave(contestants: Mapping[str, Callable[[], int]], rounds: int) -> list[Rates]:
    """Rates of all contestants; each call does some work and answers how many units it was.

    One call each warms up; every other round goes through the contestants backwards. The process keeps freed memory as
    DAWM's commands do, for all of them.
    """
    keep_freed_memory()
    for work in contestants.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(rounds):
        for name in list(contestants)[:: -1 if index % 2 else 1]:
            start = time.perf_counter()
            units = contestants[name]()
            rates[name].append(units / (time.perf_counter() - start))
    return [Rates(name, values) for name, values in rates.items()]


@contextmanager
def one_core() -> Iterator[None]:
    """Holds this process, and threads that it starts, on one core: JAX computes in a thread of its own."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def with_dawm_matmuls(work: Callable[[], int]) -> Callable[[], int]:
    """The same work with matmuls as DAWM's commands compute them; other contestants keep PyTorch's default."""

    def done() -> int:
        matmul = torch.backends.mkldnn.matmul
        before = matmul.fp32_precision
        prefer_onednn()
        try:
            return work()
        finally:
            matmul.fp32_precision = before

    return done


def ratio(results: Sequence[Rates], name: str, reference: str) -> str:
    """How many times as fast the one is as the other, by their medians."""
    medians = {result.name: result.median for result in results}
    return f"{medians[name] / medians[reference]:.2f}"


def rows(results: Sequence[Rates], references: Sequence[str]) -> list[list[str]]:
    """Name, median, min..max and the ratio to each of the reference contestants."""
    medians = {result.name: result.median for result in results}
    return [
        [r.name, f"{r.median:,.1f}", f"{min(r.rates):,.1f} to {max(r.rates):,.1f}"]
        + [f"{r.median / medians[reference]:.2f}" for reference in references]
        for r in results
    ]


def show(console: Console, title: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    table = Table(*header, title=title)
    for row in body:
        table.add_row(*row)
    console.print(table)


def command_of(doc: str, options: argparse.Namespace) -> str:
    """The command that a script's docstring names, with all options that have a value."""
    words = [re.findall(r"python -m benchmarks\.\w+", doc)[0]]
    for name, value in vars(options).items():
        if value is not None and value is not False and value != []:
            values = "" if value is True else " ".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"--{name} {values}".rstrip())
    return " ".join(words)


def report(question: str, command: str, tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]],
           notes: str = "") -> None:  # fmt: skip
    """Prints the tables and writes them to ``results/<question>-<hardware>-<date>.md``."""
    console = Console()
    for table in tables:
        show(console, *table)
    today = datetime.date.today().isoformat()
    path = RESULTS / f"{question}-{hardware_slug()}-{today}.md"
    head = f"# {question}\n\n`{command}`, {today}\n\n{hardware()}\n\n{versions()}\n\n{notes}\n\n"
    path.write_text(re.sub(r"\n{3,}", "\n\n", head + "\n".join(markdown(*table) for table in tables)))
    console.print(f"written to {path}", soft_wrap=True)


def hardware() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    avx = torch.backends.cpu.get_cpu_capability()
    return f"{processor()}, {avx}, {torch.get_num_threads()} thread(s) used{gpu}, Python {platform.python_version()}"


def hardware_slug() -> str:
    if torch.cuda.is_available():
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    maker = next((word for word in ("epyc", "xeon", "ryzen", "core", "apple") if word in processor().lower()), "cpu")
    return f"{maker}-{torch.backends.cpu.get_cpu_capability().lower()}"


def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
