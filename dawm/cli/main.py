"""The command line: ``python -m dawm fit --config FILE`` and its sisters.

Built on jsonargparse as LightningCLI is: every constructor argument of the data module, the three modules, the Trainer
and the callbacks is a key of the config and an option of the command line. `LightningCLI` itself is not used because it
serves one model and one Trainer.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import lightning as L
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings
from rich.console import Console

# Imported so that configs can name these classes without their module.
import dawm.agents
import dawm.callbacks
import dawm.diffusion.denoisers
import dawm.diffusion.preconditioning
import dawm.diffusion.samplers
import dawm.synthesis.rollouts  # noqa: F401
from dawm.cli import check
from dawm.cli import datasets as manage
from dawm.cli import fit as commands
from dawm.cli.messages import explain, one_line, told_of_disk, told_of_settings
from dawm.cli.synthesize import synthesize_dataset
from dawm.data.module import TransitionDataModule
from dawm.errors import UserError
from dawm.inverse_dynamics import InverseDynamics
from dawm.nn.matmul import use_fast_products
from dawm.training.build import SIZES
from dawm.training.checkpoints import Interrupted
from dawm.training.ranks import is_lost_connection
from dawm.training.stage import Stages
from dawm.world_model import DiffusionWorldModel

__all__ = ["main", "make_fit_parser", "make_parser"]

# What the experiment sets itself, per stage.
STAGE_SETTINGS = {
    "callbacks", "logger", "max_steps", "min_steps", "max_epochs", "min_epochs", "max_time", "plugins",
    "default_root_dir", "log_every_n_steps", "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps",
    "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "use_distributed_sampler",
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "model_registry",
    "reload_dataloaders_every_n_epochs",
}  # fmt: skip


class Parser(ArgumentParser):
    """An argument parser whose errors are a user's mistakes: one line, no usage text."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises instead of printing."""
        raise UserError(explain(message))


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        args: Command line; None takes the process's own.

    Returns:
        Exit code: 0; 1 if defects were found in a data set; 2 after a user's mistake; 130 after Ctrl-C.
    """
    console = Console()
    use_fast_products()
    try:
        parser = make_parser()
        with told_of_settings("config"):
            config = parser.parse_args(args)
        return _run(config, console)
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"error: {one_line(str(error))}", style="bold red", markup=False, highlight=False
        )
        return 2
    except Interrupted as stop:
        Console(stderr=True, soft_wrap=True).print(f"interrupted: {stop}", style="bold", markup=False, highlight=False)
        return 130
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        Console(stderr=True).print(
            "stopped, because another process of this run ended; its own error, if it had one, stands above"
        )
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted", style="bold")
        return 130


class Command(NamedTuple):
    """A command that is one function: its arguments are the options, its docstring the help.

    Args:
        function: Takes the console first; a number it returns is a count of defects.
        positional: The argument that is given without its name.
    """

    function: Callable[..., int | None]
    positional: str | None = None

    @property
    def summary(self) -> str:
        """One line of help."""
        return (self.function.__doc__ or "").splitlines()[0]

    def parser(self) -> Parser:
        """The parser of its options."""
        parser = Parser(parser_mode="omegaconf+", description=self.summary)
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
    "evaluate": Command(commands.evaluate_run),
    "synthesize": Command(synthesize_dataset),
}
DATASETS = {
    "list": Command(manage.list_datasets),
    "show": Command(manage.show_dataset, "dataset"),
    "build": Command(manage.build_dataset, "name"),
    "import": Command(manage.import_file, "file"),
    "check": Command(check.check_dataset, "dataset"),
}


def _run(config: Namespace, console: Console) -> int:
    if config.subcommand == "fit":
        with told_of_disk(config.fit.output_dir):
            commands.fit(make_fit_parser(), config.fit, console)
        return 0
    if config.subcommand == "datasets":
        chosen = config.datasets.subcommand
        return DATASETS[chosen].run(config.datasets[chosen], console)
    return COMMANDS[config.subcommand].run(config[config.subcommand], console)


def make_parser() -> Parser:
    """The parser of all commands."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True, docstring_parse_attribute_docstrings=False)
    parser = Parser(
        prog="python -m dawm", description="Diffusion action world models for offline RL.", parser_mode="omegaconf+"
    )
    parser.add_argument("--version", action="version", version=f"dawm {dawm.__version__}")
    subcommands = parser.add_subcommands(required=True)
    subcommands.add_subcommand("fit", make_fit_parser(), help="train the three stages and score the agent")
    for name, command in COMMANDS.items():
        subcommands.add_subcommand(name, command.parser(), help=command.summary)
    datasets = Parser(parser_mode="omegaconf+", description="Look at, build, import and check data sets.")
    subcommands.add_subcommand("datasets", datasets, help="look at, build, import and check data sets")
    nested = datasets.add_subcommands(required=True)
    for name, command in DATASETS.items():
        nested.add_subcommand(name, command.parser(), help=command.summary)
    return parser


def make_fit_parser() -> Parser:
    """The parser of ``fit``: every setting of an experiment."""
    parser = Parser(parser_mode="omegaconf+")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of an experiment")
    parser.add_argument("--output_dir", type=str, default="runs/dawm", help="folder of the run")
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of data split, networks, draws and noise")
    parser.add_argument("--horizon", type=int, default=8, help="steps imagined; configs refer to it as ${horizon}")
    parser.add_argument("--discount", type=float, default=0.99, help="configs refer to it as ${discount}")
    parser.add_argument(
        "--seeds", type=int, default=1, help="agents trained side by side, each with its own weights, draws and score"
    )
    parser.add_argument(
        "--cuda_graphs", type=bool, default=False, help="run the updates of a training step as one CUDA graph"
    )
    parser.add_argument("--final_episodes", type=int, default=20, help="episodes of the last evaluation")
    parser.add_class_arguments(TransitionDataModule, "data")
    parser.link_arguments("seed_everything", "data.seed")
    parser.add_subclass_arguments(DiffusionWorldModel, "world_model", skip=set(SIZES), required=True)
    parser.add_subclass_arguments(InverseDynamics, "inverse_dynamics", skip=set(SIZES), required=True)
    parser.add_subclass_arguments(L.LightningModule, "model", skip=set(SIZES), required=True)
    parser.add_class_arguments(Stages, "stages")
    parser.add_class_arguments(L.Trainer, "trainer", skip=STAGE_SETTINGS, instantiate=False)
    parser.set_defaults(
        {
            "world_model": {"class_path": "dawm.world_model.DiffusionWorldModel"},
            "inverse_dynamics": {"class_path": "dawm.inverse_dynamics.InverseDynamics"},
            "model": {"class_path": "dawm.agents.TD3BC"},
        }
    )
    return parser
