"""``python -m dawm compare``: methods x data sets x seeds, and what the differences between them are worth.

A *cell* is one ``fit``: a method (a second config) on a data set, with all seeds side by side, or with one seed where
the agent trains one at a time. Each cell has a folder of its own; the stages of all cells of a data set lie in one, so
that methods share what is the same for them. A finished cell is one JSON file, and the same command again trains only
what is missing.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from jsonargparse import Namespace
from rich.console import Console

from dawm import __version__
from dawm.cli.cells import LAYOUT, Cell, read_result, slug
from dawm.cli.comparison import Comparison
from dawm.cli.comparison_page import show_comparison, write_comparison
from dawm.cli.launchers import LAUNCHERS
from dawm.cli.messages import Parser, as_user_error
from dawm.cli.settings import parse_fit
from dawm.errors import UserError, require
from dawm.files import expanded, writable, write_whole
from dawm.training.build import import_class, parameters_of, sources_of
from dawm.training.ranks import only_run_in

__all__ = ["compare", "make_compare_parser"]

GRID = "compare.json"  # in the folder of a comparison: what belongs to it, in order
OWN = ("--seeds", "--data.dataset", "--output_dir", "--stages_dir", "--wait")  # of a cell, set by the comparison


def make_compare_parser() -> Parser:
    """The parser of ``compare``; options that it does not know are options of ``fit`` for every cell."""
    parser = Parser(prog="python -m dawm compare", description="Train methods x data sets x seeds and compare them.")
    for name, about in (
        ("config", "configs of `fit`, given one after the other: what all methods share"),
        ("methods", "config of each method, or several joined by +, given after these; the first is the reference"),
        ("datasets", "data sets, as in --data.dataset"),
    ):
        parser.add_argument(f"--{name}", nargs="+", type=str, action="extend", help=about)
    parser.add_argument("--seeds", type=int, default=10, help="agents of each cell, side by side where they can")
    parser.add_argument("--groups", type=int, default=1, help="cells of a method and data set, each with own models")
    parser.add_argument("--output_dir", type=str, default="runs/compare", help="folder of the comparison")
    parser.add_argument("--launcher", type=str, default="local", help=f"where cells run: {', '.join(LAUNCHERS)}")
    parser.add_argument("--workers", type=int, default=2, help="local processes, of one thread each")
    parser.add_argument("--note", type=str, default="", help="a line for the page, such as what was tuned where")
    about = "train nothing: draw the page from what is in output_dir"
    parser.add_argument("--show", type=bool, nargs="?", const=True, default=False, help=about)
    parser.add_argument("--cell", type=int, default=None, help="train this cell alone, by number (array jobs use it)")
    return parser


def compare(args: Sequence[str], console: Console) -> int:
    """Trains what is missing, and shows and writes the comparison; 1 if a cell failed, else 0."""
    own, further = _split(args)
    with as_user_error("compare"):
        options = make_compare_parser().parse_args(own)
    folder = expanded(options.output_dir).resolve()
    failed = {} if options.show else _train(options, own, further, folder, console)
    if options.cell is None:
        comparison = _read(folder, options.note)
        if comparison.results:
            write_comparison(folder, comparison)
            show_comparison(console, folder, comparison)
        else:
            console.print("no cell is finished")
    for name, error in failed.items():
        console.print(f"failed: {name}: {error}", style="bold red", markup=False, soft_wrap=True)
    return 1 if failed else 0


def _train(
    options: Namespace, own: Sequence[str], further: Sequence[str], folder: Path, console: Console
) -> Mapping[str, str]:
    """Trains the cells that have no result of these settings; those that failed, and why."""
    for name in ("config", "methods", "datasets"):
        require(name, options[name], bool(options[name]), "at least one", "give it")
    for name in ("seeds", "groups", "workers"):
        require(name, options[name], options[name] >= 1, "at least 1")
    require("launcher", options.launcher, options.launcher in LAUNCHERS, f"one of {', '.join(LAUNCHERS)}")
    for name in (option.partition("=")[0] for option in further):
        expected = "it as compare's own option, before --, or a setting of one cell"
        require(name.removeprefix("--"), "it among the options of fit", name not in OWN, expected, "move or remove it")
    cells, command = _cells(options, further, folder), ["compare", *own, "--", *further]
    launcher = LAUNCHERS[options.launcher]
    writable(folder)
    if options.cell is not None:
        require("cell", options.cell, 0 <= options.cell < len(cells), f"a number from 0 to {len(cells) - 1}")
        cell = cells[options.cell]
        return {} if cell.done() else launcher([cell], options.workers, command, console)
    with only_run_in(folder, wait=False):
        grid = {
            "methods": [_name(path) for path in options.methods], "datasets": options.datasets, "note": options.note,
            "command": shlex.join(["python", "-m", "dawm", "compare", *own, *further]),
            "keys": {cell.name: cell.key for cell in cells},
        }  # fmt: skip
        write_whole(folder / GRID, json.dumps(grid, indent=1) + "\n")
        missing = sorted((cell for cell in cells if not cell.done()), key=lambda cell: -cell.cost)
        return launcher(missing, options.workers, command, console) if missing else {}


def _read(folder: Path, note: str) -> Comparison:
    """The comparison that a folder holds, as far as it has come."""
    try:
        grid = json.loads((folder / GRID).read_text())
    except OSError:
        raise UserError(f"--output_dir: got {folder}, expected the folder of a comparison; name one") from None
    found = [read_result(folder / "results" / f"{name}.json", key) for name, key in grid["keys"].items()]
    return Comparison(
        [result for result in found if result is not None], grid["methods"], grid["datasets"], note or grid["note"],
        grid["command"], len(found),
    )  # fmt: skip


def _cells(options: Namespace, further: Sequence[str], folder: Path) -> list[Cell]:
    """All cells, once the settings of each method were parsed."""
    names = [_name(path) for path in options.methods]
    require("methods", names, len(set(names)) == len(names), "files of different names", "rename one")
    slugs = {slug(dataset) for dataset in options.datasets}
    require("datasets", options.datasets, len(slugs) == len(options.datasets), "different names", "rename one")
    cells: list[Cell] = []
    for path, method in zip(options.methods, names):
        configs = *options.config, *path.split("+")
        shared = [part for config in configs for part in ("--config", str(expanded(config)))]
        try:
            with as_user_error("methods"):
                plain = parse_fit([*shared, *further]).plain
        except UserError as error:
            raise UserError(f"{error} (of the method {path})") from None
        side_by_side = "seeds" in parameters_of(import_class(plain["agent"]["class_path"]))
        count, seeds = (options.groups, options.seeds) if side_by_side else (options.groups * options.seeds, 1)
        imagines = plain["data"]["synthetic_fraction"] > 0
        updates = {name: stage["max_steps"] for name, stage in plain["stages"].items()}
        cost = updates.pop("agent") * seeds + imagines * sum(updates.values())
        known = {**plain, "output_dir": "", "sources": sources_of(plain)}
        key = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
        for dataset in options.datasets:
            for number in range(count):
                seed = plain["seed_everything"] + number
                own = ("--data.dataset", dataset, "--seeds", str(seeds), "--seed_everything", str(seed))
                parts = f"{key} {dataset} {seeds} {number} {__version__} {LAYOUT}"
                identity = hashlib.sha256(parts.encode()).hexdigest()[:16]
                arguments = (*shared, *further, *own)
                cells.append(Cell(method, dataset, number, arguments, identity, folder, len(cells), imagines, cost))
    return cells


def _split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of ``compare``, and those of ``fit``: what it does not know, and all that follows ``--``."""
    known = {option for action in make_compare_parser()._actions for option in action.option_strings}
    own, further = list[str](), list[str]()
    target, behind = own, False
    for argument in args:
        if argument == "--":
            target, behind = further, True
            continue
        if argument.startswith("--") and not behind:
            target = own if argument.partition("=")[0] in known else further
        target.append(argument)
    return own, further


def _name(paths: str) -> str:
    return "+".join(Path(path).stem for path in paths.split("+"))
