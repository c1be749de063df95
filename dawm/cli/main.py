"""The command line: ``python -m dawm fit --config FILE`` and its sisters.

Built on jsonargparse as LightningCLI is, which serves one model and one Trainer: every constructor argument of the data
module, the three modules, the Trainer and the callbacks is a key of the config and an option of the command line.
"""

import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jsonargparse import Namespace, set_parsing_settings
from rich.console import Console

from dawm import __version__
from dawm.cli import check, datasets
from dawm.cli.compare import compare, make_compare_parser
from dawm.cli.diagnose import diagnose_run
from dawm.cli.evaluate import evaluate_run
from dawm.cli.fit import fit
from dawm.cli.messages import Parser, as_user_error, one_line
from dawm.cli.settings import make_fit_parser
from dawm.cli.synthesize import synthesize_dataset
from dawm.errors import UserError
from dawm.nn.matmul import prefer_onednn
from dawm.nn.memory import keep_freed_memory
from dawm.training.ranks import is_lost_connection
from dawm.training.save_checkpoint import Interrupted

__all__ = ["main", "make_parser"]


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command; exit code 0, 1 for defects in a data set, 2 after a user's mistake, 130 after Ctrl-C."""
    args = sys.argv[1:] if args is None else list(args)
    console, errors = Console(), Console(stderr=True, soft_wrap=True)
    _quieten()
    prefer_onednn()
    keep_freed_memory()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True, docstring_parse_attribute_docstrings=False)
    try:
        if args[:1] == ["fit"] and not {"-h", "--help"} & set(args):
            fit(args[1:], console)
            return 0
        if args[:1] == ["compare"] and not {"-h", "--help"} & set(args):
            return compare(args[1:], console)
        with as_user_error("config"):
            config = make_parser().parse_args(args)
        return _run(config, console)
    except UserError as error:
        line, code = f"error: {one_line(str(error))}", 2
    except Interrupted as stop:
        line, code = f"interrupted: {stop}", 130
    except RuntimeError as error:
        if "find_unused_parameters" in str(error):  # a module that takes several backward passes of its own
            line = "got ddp, expected ddp_find_unused_parameters_true for a module of several backward passes; set it"
            line, code = f"error: --trainer.strategy: {line}", 2
        elif str(error).startswith("Early stopping conditioned on metric"):
            metric = str(error).split("`")[1]
            line = f"got early stopping by {metric}, which nothing logs, expected a metric of the module's validation"
            line, code = f"error: --stages: {line}; log it, or leave patience or the callback out", 2
        elif is_lost_connection(error):
            line, code = "stopped, because another process of this run ended; its own error, if it had one, is above", 1
        else:
            raise
    except OSError as error:
        if error.filename is None:
            raise
        line = f"got {error.filename} ({error.strerror}), expected a file to read or write; mend it, or name another"
        line, code = f"error: {one_line(line)}", 2
    except KeyboardInterrupt:
        line, code = "interrupted", 130
    errors.print(line, style="bold red" if code == 2 else "bold", markup=False, highlight=False)
    return code


class Command(NamedTuple):
    """A command that is one function: its arguments are the options, its docstring the help."""

    function: Callable[..., int | None]  # takes the console first; a number it returns is a count of defects
    positional: str | None = None  # the argument that is given without its name

    def parser(self) -> Parser:
        """The parser of its options."""
        parser = Parser(parser_mode="omegaconf+", description=(self.function.__doc__ or "").splitlines()[0])
        skip: set[str | int] = {"console"}
        if self.positional is not None:
            kind = inspect.signature(self.function).parameters[self.positional].annotation
            parser.add_argument(self.positional, type=kind)
            skip.add(self.positional)
        parser.add_function_arguments(self.function, skip=skip, as_group=False)
        return parser

    def run(self, config: Namespace, console: Console) -> int:
        """Runs it; 1 if it found defects, else 0."""
        return 1 if self.function(console, **self.parser().instantiate(config).as_dict()) else 0


COMMANDS = {
    "evaluate": Command(evaluate_run),
    "diagnose": Command(diagnose_run),
    "synthesize": Command(synthesize_dataset),
}
DATASETS = {
    "list": Command(datasets.list_datasets),
    "show": Command(datasets.show_dataset, "dataset"),
    "build": Command(datasets.build_dataset, "name"),
    "import": Command(datasets.import_file, "file"),
    "check": Command(check.check_dataset, "dataset"),
}


def _run(config: Namespace, console: Console) -> int:
    if config.subcommand == "datasets":
        config = config.datasets
        return DATASETS[config.subcommand].run(config[config.subcommand], console)
    return COMMANDS[config.subcommand].run(config[config.subcommand], console)


def make_parser() -> Parser:
    """The parser of all commands; that of ``fit`` is here for its help."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True, docstring_parse_attribute_docstrings=False)
    description = "Diffusion action world models for offline RL."
    parser = Parser(prog="python -m dawm", description=description, parser_mode="omegaconf+")
    parser.add_argument("--version", action="version", version=f"dawm {__version__}")
    subcommands = parser.add_subcommands(required=True)
    subcommands.add_subcommand("fit", make_fit_parser(), help="train the three stages and score the agent")
    subcommands.add_subcommand("compare", make_compare_parser(), help="train methods on data sets and compare them")
    _add_commands(subcommands, COMMANDS)
    datasets_parser = Parser(parser_mode="omegaconf+", description="Look at, build, import and check data sets.")
    subcommands.add_subcommand("datasets", datasets_parser, help="look at, build, import and check data sets")
    _add_commands(datasets_parser.add_subcommands(required=True), DATASETS)
    return parser


def _add_commands(subcommands: Any, commands: Mapping[str, Command]) -> None:
    for name, command in commands.items():
        parser = command.parser()
        subcommands.add_subcommand(name, parser, help=parser.description)


def _quieten() -> None:
    """Warnings as one line each, without the advice of libraries where the project has decided otherwise."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for pattern in (
        "(?s).*(instantiate_classes|only one JsonargparseDeprecationWarning).*",  # Lightning's
        ".*isinstance.treespec, LeafSpec.*",  # Lightning calls a deprecated part of torch
        ".*recommended to use `self.log.*sync_dist=True.*",  # torchmetrics has put the ranks' metrics together
        ".*precision lowered by casting to float32.*",  # Gymnasium on a Box of its own wrappers
        ".*does not have many workers.*",  # the data are in memory: worker processes would only slow the drawing down
    ):
        warnings.filterwarnings("ignore", pattern)
    warnings.showwarning = lambda message, *args, **kwargs: Console(stderr=True, soft_wrap=True).print(
        f"warning: {message}", style="yellow", markup=False, highlight=False
    )
