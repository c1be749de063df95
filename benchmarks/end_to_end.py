"""Where the time of a whole run goes, and what a million imagined transitions take with its models.

    python -m benchmarks.end_to_end                  # some 5 minutes with PyTorch's own number of threads

One `fit` of the config in a process of its own, from nothing: data set and cache are built in a temporary folder. The
progress bar is drawn as on a terminal. "networks" is `update`, all forward and backward passes with the optimisers;
"drawing" is the making of batches; "validation" is on held-out data; "evaluation" and "regeneration" are the agent's
callbacks; "the rest" is what remains of a stage: Lightning, logs, progress bar, checkpoints, normalizers. All is
measured once. Then `synthesize` writes imagined transitions of that run as a Minari data set, in another process.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.measure import report

CONFIG = Path(__file__).parent.parent / "lightning_configs" / "quickstart.yaml"
STAGES = ("world_model", "inverse_dynamics", "agent")
ASIDE = ("validation", "evaluation", "regeneration")  # no part of training


class Clock:
    """Seconds spent in the functions that it wraps, by stage and part, and the training time of the stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.stage = "before"

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[f"{self.stage}/{part}"] += time.perf_counter() - start

    def wrap(self, owner: Any, name: str, part: str) -> Any:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.measure(part):
                return function(*args, **kwargs)

        return mock.patch.object(owner, name, timed)

    def wrap_stage(self, function: Callable) -> Callable:
        def timed(experiment: Any, stage: Any, *args: Any) -> Any:
            self.stage = stage.name
            try:
                with self.measure("stage"):
                    return function(experiment, stage, *args)
            finally:
                self.stage = "after"

        return timed

    def wrap_batches(self, function: Callable) -> Callable:
        def timed(loader: Any) -> Iterator[Any]:
            batches = function(loader)
            while True:
                with self.measure("drawing"):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

        return timed


def timed_fit(arguments: list[str]) -> dict[str, float]:
    """Seconds by stage and part of one ``fit``; for a process of its own, as it replaces the package's functions."""
    from dawm import callbacks
    from dawm.agents import IQL, TD3BC
    from dawm.cli import fit
    from dawm.cli.main import main as dawm_main
    from dawm.data.batches import BatchLoader
    from dawm.data.module import TransitionDataModule
    from dawm.inverse_dynamics import InverseDynamics
    from dawm.training.experiment import Experiment
    from dawm.world_model import DiffusionWorldModel

    clock = Clock()
    with contextlib.ExitStack() as stack:
        for owner, name, part in (
            (TransitionDataModule, "setup", "data"),
            (callbacks.EvaluateInEnvironment, "evaluate", "evaluation"),
            (callbacks.RegenerateRollouts, "refill", "regeneration"),
            (fit, "evaluate", "last evaluation"),
            *((kind, "update", "networks") for kind in (DiffusionWorldModel, InverseDynamics, TD3BC, IQL)),
            *((kind, "validation_step", "validation") for kind in (DiffusionWorldModel, InverseDynamics)),
        ):
            stack.enter_context(clock.wrap(owner, name, part))
        stack.enter_context(mock.patch.object(Experiment, "run", clock.wrap_stage(Experiment.run)))
        stack.enter_context(mock.patch.object(BatchLoader, "__iter__", clock.wrap_batches(BatchLoader.__iter__)))
        with clock.measure("fit"):
            code = dawm_main(arguments)
    if code:
        raise SystemExit(code)
    clock.seconds["fit"] = clock.seconds.pop("before/fit", 0.0) + clock.seconds.pop("after/fit", 0.0)
    return dict(clock.seconds)


def share(seconds: float, whole: float) -> list[str]:
    return [f"{seconds:.2f}", f"{100 * seconds / whole:.1f} %"]


def run_body(seconds: dict[str, float]) -> list[list[str]]:
    """The run by stage; evaluations during the agent's training are part of its stage."""
    whole = seconds["fit"]
    parts = {"data (with building it)": seconds.get("before/data", 0.0)}
    parts |= {name.replace("_", " "): seconds.get(f"{name}/stage", 0.0) for name in STAGES}
    parts["last evaluation"] = seconds.get("after/last evaluation", 0.0)
    parts["the rest"] = whole - sum(parts.values())
    evaluated = seconds.get("agent/evaluation", 0.0) + parts["last evaluation"]
    body = [[name, *share(value, whole)] for name, value in parts.items()]
    return [*body, ["fit", *share(whole, whole)], ["all evaluations, of these", *share(evaluated, whole)]]


def stage_body(seconds: dict[str, float]) -> list[list[str]]:
    """Seconds of every part of every stage, and the fraction of training that is neither networks nor drawing."""
    body = []
    for name in STAGES:
        whole = seconds.get(f"{name}/stage")
        if whole is None:
            continue
        found = {part: seconds.get(f"{name}/{part}", 0.0) for part in ("networks", "drawing", *ASIDE)}
        rest = whole - sum(found.values())
        training = whole - sum(found[part] for part in ASIDE)
        cells = [f"{value:.2f}" for value in (whole, *found.values(), rest)]
        body.append([name.replace("_", " "), *cells, f"{100 * rest / training:.1f} %"])
    return body


def child(environment: dict[str, str], *command: str) -> tuple[float, float]:
    """Seconds and peak MiB of a command."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *command], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main(argv: list[str] | None = None) -> list[tuple[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--transitions", type=int, default=1_000_000, help="to synthesize; 0 leaves it out")
    parser.add_argument("--options", nargs="*", default=[], help="more settings of the fit, as key=value")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    settings = [part for option in options.options for part in ("--" + option).split("=", 1)]
    if options.child is not None:
        arguments = ["fit", "--config", str(options.config), "--output_dir", str(options.child / "run"), *settings]
        (options.child / "seconds.json").write_text(json.dumps(timed_fit(arguments)))
        return []
    with tempfile.TemporaryDirectory(prefix="dawm-end-to-end-") as text:
        folder = Path(text)
        environment = os.environ | {
            "MINARI_DATASETS_PATH": str(folder / "minari"),
            "DAWM_CACHE": str(folder / "cache"),
            "FORCE_COLOR": "1",  # rich then draws as on a terminal
        }
        more = ["--options", *options.options] if options.options else []
        fit = ["benchmarks.end_to_end", "--config", str(options.config), *more, "--child", text]
        wall, peak = child(environment, *fit)
        seconds = json.loads((folder / "seconds.json").read_text())
        body = run_body(seconds)
        body.append(["whole process, with imports", *share(wall, seconds["fit"])])
        tables = [
            (f"fit with {options.config.name}, peak of {peak:,.0f} MiB", ["part", "seconds", "share"], body),
            (
                "Stages, seconds",
                ["stage", "all", "networks", "drawing", *ASIDE, "the rest", "rest of training"],
                stage_body(seconds),
            ),
        ]
        if options.transitions:
            run, output = str(folder / "run"), "imagined/benchmark/end-to-end-v0"
            count = str(options.transitions)
            synthesize = ["dawm", "synthesize", "--run", run, "--output", output, "--transitions", count]
            wall, peak = child(environment, *synthesize)
            header = ["transitions", "seconds", "transitions/s", "peak MiB"]
            row = [f"{options.transitions:,}", f"{wall:.1f}", f"{options.transitions / wall:,.0f}", f"{peak:,.0f}"]
            tables.append(("synthesize, to a Minari data set, imports included", header, [row]))
    command = f"python -m benchmarks.end_to_end --config lightning_configs/{options.config.name}"
    command += f" --transitions {options.transitions}" + "".join(f" {part}" for part in more)
    report("end-to-end", command, tables, " ".join(__doc__.split("\n\n")[2].split()))
    agent = next((row for row in tables[1][2] if row[0] == "agent"), None)
    headlines = [
        ("evaluations, fraction of a fit", next(row[2] for row in body if row[0].startswith("all evaluations")))
    ]
    return headlines if agent is None else [*headlines, ("agent's training outside networks and drawing", agent[-1])]


if __name__ == "__main__":
    main()
