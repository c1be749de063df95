"""A cell of a comparison: one ``fit``, its files, and the result that it leaves."""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dawm.cli.html import hardware, versions
from dawm.cli.report import read_results
from dawm.data.sources.scores import ReferenceScores
from dawm.files import write_whole
from dawm.training.checkpoints import read_checkpoint

__all__ = ["LAYOUT", "Cell", "read_result", "slug"]

LAYOUT = 2  # of a result; one of another layout is collected again from its run, whose stages are reused


@dataclass(frozen=True)
class Cell:
    """One ``fit`` of a comparison."""

    method: str  # name of its config, or names joined by +
    dataset: str
    number: int  # of the cells of this method and data set; the seed of its data split and networks
    options: tuple[str, ...]  # of ``fit``
    key: str  # of the settings; a result of others is not reused
    folder: Path  # of the comparison
    index: int  # among all cells
    imagines: bool  # whether it trains models to imagine with
    cost: int  # agents' and models' updates, by which the longest cells come first

    @property
    def name(self) -> str:
        """Names the cell's files."""
        return f"{self.method}/{slug(self.dataset)}/{self.number}"

    @property
    def result(self) -> Path:
        """Its JSON file."""
        return self.folder / "results" / f"{self.name}.json"

    @property
    def run(self) -> Path:
        """Its run's folder."""
        return self.folder / "runs" / self.name

    @property
    def log(self) -> Path:
        """What its ``fit`` prints."""
        return self.run / "fit.log"

    @property
    def models(self) -> str:
        """Names the models that it may have in common with other cells."""
        return f"{self.dataset} {self.number}" if self.imagines else self.name

    def command(self) -> list[str]:
        """The ``fit`` that trains it."""
        own = ["--output_dir", str(self.run), "--stages_dir", str(self.folder / "stages" / slug(self.dataset))]
        return [sys.executable, "-m", "dawm", "fit", *self.options, *own, "--wait", "true"]

    def done(self) -> bool:
        """Whether there is a result of these settings."""
        return read_result(self.result, self.key) is not None

    def collect(self, seconds: float) -> None:
        """Writes the result of a finished run, whose last start took so long."""
        self.result.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.result, json.dumps(_result(self, seconds), indent=1) + "\n")


def read_result(path: Path, key: str) -> dict[str, Any] | None:
    """A cell's result, if there is one of these settings."""
    try:
        result = json.loads(path.read_text())
        return result if result["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _result(cell: Cell, seconds: float) -> dict[str, Any]:
    """What is kept of a finished run: scores and returns of every seed, curves, and where the time went."""
    results = read_results(cell.run)
    agent, reference = results["agent"], results["data"].get("reference")
    returns = agent["returns"] if isinstance(agent["returns"][0], list) else [agent["returns"]]
    scored = (lambda value: value) if reference is None else ReferenceScores(**reference).normalize
    states = read_checkpoint(Path(results["stages"]["agent"]["checkpoint"])).get("callbacks", {})
    callbacks = {name.partition("{")[0]: s for name, s in states.items() if isinstance(s, dict) and "last_step" in s}
    history = [entry for state in callbacks.values() for entry in state.get("history", []) if "returns" in entry]
    return {
        "key": cell.key, "method": cell.method, "dataset": cell.dataset, "number": cell.number,
        "agent": agent["class"], "updates": results["stages"]["agent"]["steps"], "data": results["data"],
        "imagines": cell.imagines, "unit": "score" if reference else "return",
        "scores": [scored(sum(each) / len(each)) for each in returns], "returns": returns,
        "curve": [{"step": e["step"], "scores": [scored(value) for value in e["returns"]]} for e in history],
        "seconds": _seconds(results, {name: state["seconds"] for name, state in callbacks.items()}, seconds),
        "command": shlex.join(cell.command()), "versions": dict(versions()), "hardware": hardware(),
        "settings": yaml.safe_load((cell.run / "config.yaml").read_text()),
    }  # fmt: skip


def _seconds(results: Mapping[str, Any], callbacks: Mapping[str, float], whole: float) -> dict[str, float]:
    """Where a cell's time went; of one that was resumed, all of its agent's training and the rest of the last start."""
    trained = {n: stage["seconds"] for n, stage in results["stages"].items() if n == "agent" or not stage["reused"]}
    parts = {"updates": max(0.0, trained.pop("agent") - sum(callbacks.values())), **callbacks, **results["seconds"]}
    parts |= {name.replace("_", " "): value for name, value in trained.items()}
    return {**parts, "start and files": max(0.0, whole - sum(parts.values()))}


def slug(dataset: str) -> str:
    """A data set's name as that of a folder."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in dataset)
