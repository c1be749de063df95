"""The command line: ``python -m dawm fit --config FILE`` and its sisters.

Built on jsonargparse as LightningCLI is: every constructor argument of the data module, the three modules, the Trainer
and the callbacks is a key of the config and an option of the command line. `LightningCLI` itself is not used because it
serves one model and one Trainer.
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import lightning as L
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings
from rich.console import Console

# Imported so that configs can name these classes without their module.
import dawm.agents
import dawm.callbacks
import dawm.diffusion
import dawm.networks
import dawm.samplers
import dawm.synthesis  # noqa: F401
from dawm.callbacks import RegenerateRollouts
from dawm.data.module import TransitionDataModule
from dawm.errors import UserError
from dawm.evaluation import Policy, evaluate
from dawm.experiment import Experiment, Stages
from dawm.inverse_dynamics import InverseDynamics
from dawm.mistakes import explain, one_line
from dawm.modules import SIZES, build_module
from dawm.report import collect_results, show_results, write_files
from dawm.world_model import DiffusionWorldModel

__all__ = ["main", "make_fit_parser", "make_parser"]

EVALUATION_SEED = 2_000_000  # of the last evaluation: apart from the seeds of evaluations during training
MODULES = ("world_model", "inverse_dynamics", "model")
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
        Exit code: 0, or 2 after a user's mistake.
    """
    console = Console()
    try:
        config = make_parser().parse_args(args)
        command = config.subcommand
        _COMMANDS[command](config[command], console)
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"error: {one_line(str(error))}", style="bold red", markup=False, highlight=False
        )
        return 2
    return 0


def make_parser() -> Parser:
    """The parser of all commands."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True, docstring_parse_attribute_docstrings=False)
    parser = Parser(
        prog="python -m dawm", description="Diffusion action world models for offline RL.", parser_mode="omegaconf+"
    )
    parser.add_argument("--version", action="version", version=f"dawm {dawm.__version__}")
    commands = parser.add_subcommands(required=True)
    commands.add_subcommand(
        "fit", make_fit_parser(), help="train the three stages and score the agent"
    )
    return parser


def make_fit_parser() -> Parser:
    """The parser of ``fit``: every setting of an experiment."""
    parser = Parser(parser_mode="omegaconf+")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of an experiment")
    parser.add_argument("--output_dir", type=str, default="runs/dawm", help="folder of the run")
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of data split, networks, draws and noise")
    parser.add_argument("--horizon", type=int, default=8, help="steps imagined; configs refer to it as ${horizon}")
    parser.add_argument("--discount", type=float, default=0.99, help="configs refer to it as ${discount}")
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


def fit(config: Namespace, console: Console) -> None:
    """Trains the stages in order, scores the agent, writes and shows the results.

    Args:
        config: Parsed settings.
        console: Where to draw.
    """
    _quiet()
    plain = config.clone()
    plain.pop("config", None)
    settings: dict[str, Any] = plain.as_dict()
    output_dir = _writable(Path(config.output_dir))
    modules = {key: settings[key] for key in MODULES}
    rest = config.clone()
    for key in (*MODULES, "config"):
        rest.pop(key, None)
    parts = make_fit_parser().instantiate(rest)

    data: TransitionDataModule = parts.data
    data.setup()
    horizon = modules["world_model"]["init_args"].get("horizon", data.horizon)
    if horizon != data.horizon:
        raise UserError(
            f"data.horizon is {data.horizon} but world_model.horizon is {horizon}; set both to ${{horizon}}"
        )
    experiment = Experiment(
        data=data,
        stages=parts.stages,
        trainer=settings["trainer"],
        settings={
            name: {
                "data": settings["data"],
                "module": modules["model" if name == "agent" else name],
                "callbacks": settings["stages"][name]["callbacks"],
            }
            for name in ("world_model", "inverse_dynamics", "agent")
        },
        output_dir=output_dir,
        seed=config.seed_everything,
        console=console,
    )
    trained = {}
    if data.synthetic_fraction > 0:
        for name in ("world_model", "inverse_dynamics"):
            trained[name] = experiment.run_stage(name, build_module(modules[name]))
        for callback in _regenerate(parts.stages.agent.callbacks):
            callback.connect(trained["world_model"], trained["inverse_dynamics"])
    else:
        for callback in _regenerate(parts.stages.agent.callbacks):
            parts.stages.agent.callbacks.remove(callback)
        console.print("synthetic_fraction is 0: the agent learns from real data alone, nothing is imagined")
    agent = experiment.run_stage("agent", build_module(modules["model"]))
    if experiment.rank != 0:
        return
    if data.env_spec is None:
        raise UserError("data.env_id: the data set names no environment to score the agent in; set --data.env_id")
    console.print(f"scoring the agent over {config.final_episodes} episodes of {data.env_spec.id}")
    normalize = None if data.reference is None else data.reference.normalize
    evaluation = evaluate(
        cast(Policy, agent.act), data.env_spec, config.final_episodes, EVALUATION_SEED, normalize=normalize
    )
    results = collect_results(
        data.episodes, modules["model"]["class_path"], evaluation, experiment.results, config.seed_everything
    )
    write_files(output_dir, results, settings)
    show_results(console, output_dir, results)


_COMMANDS = {"fit": fit}


def _regenerate(callbacks: Sequence[L.Callback]) -> list[RegenerateRollouts]:
    return [callback for callback in callbacks if isinstance(callback, RegenerateRollouts)]


def _quiet() -> None:
    """Keeps Lightning's advice off the screen where the project has decided otherwise."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # of another library's making: Lightning calls a deprecated part of torch
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    # the data stand in memory: worker processes would only slow the drawing down
    warnings.filterwarnings("ignore", ".*does not have many workers.*")


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {folder} ({error.strerror}); set --output_dir") from None
    return folder
