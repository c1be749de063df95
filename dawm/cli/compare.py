"""``python -m dawm compare``: methods x data sets x seeds, and what the differences between them are worth.

A *cell* is one ``fit``: a method (a second config) on a data set, with all seeds side by side, or with one seed where
the agent trains one at a time. Each cell has a folder of its own; the stages of all cells of a data set lie in one, so
that methods share what is the same for them. A finished cell is one JSON file, and the same command again trains only
what is missing.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dawm import __version__
from dawm.cli.comparison import Comparison, show_comparison, write_comparison
from dawm.cli.launchers import LAUNCHERS
from dawm.cli.messages import Parser, as_user_error
from dawm.cli.report import read_results
from dawm.cli.settings import parse_fit
from dawm.errors import require
from dawm.files import expanded, write_whole
from dawm.training.build import import_class, parameters_of
from dawm.training.checkpoints import read_checkpoint

__all__ = ["Cell", "compare", "make_compare_parser"]


@dataclass(frozen=True)
class Cell:
    """One ``fit`` of a comparison."""

    method: str
    dataset: str
    number: int  # of the cells of this method and data set; the seed of its data split and networks
    options: tuple[str, ...]  # of ``fit``
    key: str  # of the settings; a result of others is not reused
    folder: Path  # of the comparison
    index: int  # among all cells

    @property
    def name(self) -> str:
        """Names the cell's files."""
        return f"{self.method}/{_slug(self.dataset)}/{self.number}"

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

    def command(self) -> list[str]:
        """The ``fit`` that trains it."""
        own = ["--output_dir", str(self.run), "--stages_dir", str(self.folder / "stages" / _slug(self.dataset))]
        return [sys.executable, "-m", "dawm", "fit", *self.options, *own, "--wait", "true"]

    def done(self) -> bool:
        """Whether there is a result of these settings."""
        try:
            return json.loads(self.result.read_text())["key"] == self.key
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def collect(self) -> None:
        """Writes the result of a finished run."""
        self.result.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.result, json.dumps(_result(self), indent=1) + "\n")


def make_compare_parser() -> Parser:
    """The parser of ``compare``; what follows ``--`` are options of ``fit`` for every cell."""
    parser = Parser(prog="python -m dawm compare", description="Train methods x data sets x seeds and compare them.")
    for name, about in (
        ("config", "configs of `fit`, given one after the other: what all methods share"),
        ("methods", "config of each method, given after these; the first is the reference"),
        ("datasets", "data sets, as in --data.dataset"),
    ):
        parser.add_argument(f"--{name}", nargs="+", type=str, help=about)
    parser.add_argument("--seeds", type=int, default=10, help="agents of each cell, side by side where they can")
    parser.add_argument("--groups", type=int, default=1, help="cells of a method and data set, each with own models")
    parser.add_argument("--output_dir", type=str, default="runs/compare", help="folder of the comparison")
    parser.add_argument("--launcher", type=str, default="local", help=f"where cells run: {', '.join(LAUNCHERS)}")
    parser.add_argument("--workers", type=int, default=2, help="local processes, of one thread each")
    parser.add_argument("--note", type=str, default="", help="a line for the page, such as what was tuned where")
    parser.add_argument("--show", type=bool, default=False, help="train nothing: draw the page from what is there")
    parser.add_argument("--cell", type=int, default=None, help="train this cell alone, by number (array jobs use it)")
    return parser


def compare(args: Sequence[str], console: Console) -> int:
    """Trains what is missing, and shows and writes the comparison; 1 if a cell failed, else 0."""
    args, further = _split(list(args))
    with as_user_error("compare"):
        options = make_compare_parser().parse_args(args)
    for name in ("config", "methods", "datasets"):
        require(name, options[name], bool(options[name]), "at least one", "give it")
    for name in ("seeds", "groups", "workers"):
        require(name, options[name], options[name] >= 1, "at least 1")
    require("launcher", options.launcher, options.launcher in LAUNCHERS, f"one of {', '.join(LAUNCHERS)}")
    folder = expanded(options.output_dir).resolve()
    cells = _cells(options, further, folder)
    if options.cell is not None:
        require("cell", options.cell, 0 <= options.cell < len(cells), f"a number from 0 to {len(cells) - 1}")
        cells = cells[options.cell : options.cell + 1]
    missing = [] if options.show else [cell for cell in cells if not cell.done()]
    failed: dict[str, str] = {}
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["compare", *args, "--", *further]
        failed = LAUNCHERS[options.launcher](missing, options.workers, command, console)
    if options.cell is None:
        results = [json.loads(cell.result.read_text()) for cell in cells if cell.done()]
        if results:
            comparison = Comparison(results, [_name(path) for path in options.methods], options.datasets, options.note)
            write_comparison(folder, comparison)
            show_comparison(console, folder, comparison)
    for name, error in failed.items():
        console.print(f"failed: {name}: {error}", style="bold red", markup=False, soft_wrap=True)
    return 1 if failed else 0


def _cells(options: Any, further: Sequence[str], folder: Path) -> list[Cell]:
    """All cells, once the settings of each method were parsed."""
    names = [_name(path) for path in options.methods]
    require("methods", names, len(set(names)) == len(names), "files of different names", "rename one")
    cells: list[Cell] = []
    for path, method in zip(options.methods, names):
        shared = [part for config in (*options.config, path) for part in ("--config", str(expanded(config)))]
        with as_user_error(f"methods: {path}"):
            plain = parse_fit([*shared, *further]).plain
        side_by_side = "seeds" in parameters_of(import_class(plain["agent"]["class_path"]))
        count, seeds = (options.groups, options.seeds) if side_by_side else (options.groups * options.seeds, 1)
        key = hashlib.sha256(json.dumps({**plain, "output_dir": ""}, sort_keys=True, default=str).encode()).hexdigest()
        for dataset in options.datasets:
            for number in range(count):
                own = ("--data.dataset", dataset, "--seeds", str(seeds), "--seed_everything", str(number))
                identity = f"{key} {dataset} {seeds} {number} {__version__}"
                cells.append(
                    Cell(method, dataset, number, (*shared, *further, *own), _hash(identity), folder, len(cells))
                )
    return cells


def _result(cell: Cell) -> dict[str, Any]:
    """What is kept of a finished run: scores and returns of every seed, curves, and where the time went."""
    results = read_results(cell.run)
    agent, reference = results["agent"], results["data"].get("reference")
    returns = agent["returns"] if isinstance(agent["returns"][0], list) else [agent["returns"]]

    def scored(value: float) -> float:
        if reference is None:
            return value
        return 100 * (value - reference["minimum"]) / (reference["maximum"] - reference["minimum"])

    seconds = {name: stage["seconds"] for name, stage in results["stages"].items() if not stage["reused"]}
    callbacks = read_checkpoint(Path(results["stages"]["agent"]["checkpoint"])).get("callbacks", {})
    histories: list[Mapping[str, Any]] = []
    for name, state in callbacks.items():
        if isinstance(state, dict) and "seconds" in state:
            seconds[f"agent: {name.partition('{')[0]}"] = state["seconds"]
            histories += state.get("history", [])
    curve = [
        {"step": e["step"], "scores": [scored(value) for value in e["returns"]]} for e in histories if "returns" in e
    ]
    return {
        "key": cell.key, "method": cell.method, "dataset": cell.dataset, "number": cell.number, "dawm": __version__,
        "agent": agent["class"], "updates": results["stages"]["agent"]["steps"], "data": results["data"],
        "unit": "score" if reference else "return",
        "scores": [scored(sum(each) / len(each)) for each in returns], "returns": returns, "curve": curve,
        "seconds": seconds, "options": list(cell.options),
    }  # fmt: skip


def _split(args: list[str]) -> tuple[list[str], list[str]]:
    """Options of ``compare``, and behind ``--`` those of ``fit``."""
    if "--" not in args:
        return args, []
    at = args.index("--")
    return args[:at], args[at + 1 :]


def _name(path: str) -> str:
    return Path(path).stem


def _slug(dataset: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in dataset)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
