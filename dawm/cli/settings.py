"""Settings of ``fit``: parsed, with shared numbers handed out, and as the plain values that a run keeps."""

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any, Literal, NamedTuple

import lightning as L
import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.loggers import Logger

# Imported so that configs can name these classes without their module.
import dawm.callbacks
import dawm.data.weights
import dawm.diffusion.codecs
import dawm.diffusion.denoisers
import dawm.diffusion.preconditioning
import dawm.diffusion.samplers
import dawm.synthesis.targets  # noqa: F401
from dawm.agents import IQL, TD3BC  # noqa: F401
from dawm.cli.messages import Parser, check_groups, check_no_gaps
from dawm.data.module import TransitionDataModule
from dawm.errors import UserError, require
from dawm.files import expanded
from dawm.inverse_dynamics import InverseDynamics
from dawm.training.build import SIZES, import_class, parameters_of
from dawm.training.stage import Stages
from dawm.world_model import DiffusionWorldModel

__all__ = ["MODULES", "FitParser", "Settings", "make_fit_parser", "parse_fit"]

MODULES: dict[str, type[L.LightningModule]] = {
    "world_model": DiffusionWorldModel,
    "inverse_dynamics": InverseDynamics,
    "agent": L.LightningModule,
}
"""The three modules, and what each has to be."""
DEFAULTS = ["--world_model=DiffusionWorldModel", "--inverse_dynamics=InverseDynamics", "--agent=TD3BC"]
STAGES = tuple(MODULES)
SHARED = ("horizon", "discount", "seeds")
"""Numbers that are handed to every constructor with a parameter of that name, like the sizes of the data."""
HIGHEST = 2**63 - 1  # of the numbers that torch can count to, seeds among them
RANGES = {"horizon": (1, HIGHEST), "discount": (0, 1), "seeds": (1, HIGHEST), "seed_everything": (-HIGHEST, HIGHEST),
          "final_episodes": (1, HIGHEST)}  # fmt: skip
GROUPS = ("data", "trainer", "stages", "stages.world_model", "stages.inverse_dynamics", "stages.agent", *MODULES)

# some callbacks of Lightning have members of an enumeration as defaults
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))

ELSEWHERE = {
    **dict.fromkeys(("max_steps", "min_steps", "max_epochs", "min_epochs"), "--stages.<stage>.max_steps"),
    "max_time": "--stages.<stage>.max_steps (a run stopped by a signal resumes)",
    "log_every_n_steps": "--stages.<stage>.log_every_n_steps",
    **dict.fromkeys(("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"),
                    "--stages.<stage>.validate_every_n_steps"),
    "enable_checkpointing": "--stages.<stage>.checkpoint_every_n_steps",
    "callbacks": "--stages.<stage>.callbacks",
    "enable_model_summary": "a ModelSummary among --stages.<stage>.callbacks",
    "logger": "--logger",
    "enable_progress_bar": "--quiet",
    "default_root_dir": "--output_dir",
    "accumulate_grad_batches": "--data.batch_size",
    **dict.fromkeys(("gradient_clip_val", "gradient_clip_algorithm"),
                    "the module, such as --world_model.max_gradient_norm"),
    **dict.fromkeys(("plugins", "model_registry"), "nowhere: checkpoints are written by dawm"),
    "use_distributed_sampler": "nowhere: ranks draw batches of their own",
    "reload_dataloaders_every_n_epochs": "nowhere: batches are drawn from memory",
}  # fmt: skip
"""What the experiment sets itself, and where a user sets it instead."""


class FitParser(Parser):
    """A parser that remembers which settings were given, apart from those that classes have by default."""

    given: Namespace

    def _parse_common(self, cfg: Namespace, **kwargs: Any) -> Namespace:  # type: ignore[override]
        # jsonargparse fills in the defaults of classes here, and offers no way to tell them from what was given
        if not kwargs.get("nested_parse"):
            self.given = cfg.clone()
        return super()._parse_common(cfg, **kwargs)


class Settings(NamedTuple):
    """Settings of an experiment in two forms."""

    parts: Namespace  # data module and stages, built
    plain: dict[str, Any]  # all settings as plain values; `config.yaml` of the run


OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "output_dir": (str, "runs/dawm", "folder of the run"),
    "stages_dir": (str | None, None, "folder of the stages, which runs may share; None is output_dir"),
    "seed_everything": (int, 0, "seed of data split, networks, draws and noise"),
    "horizon": (int, 8, "steps imagined at once, of every class that has one"),
    "discount": (float, 0.99, "of rewards, of every class that has one"),
    "seeds": (int, 1, "agents trained side by side, each with its own weights, draws and score"),
    "cuda_graphs": (bool, False, "run the updates of a training step as one CUDA graph"),
    "matmul_precision": (Literal["fp32", "bf16"], "fp32", "of the MLPs' matmuls in updates on a CPU; bf16 is faster"),
    "final_episodes": (int, 20, "episodes of the last evaluation"),
    "wait": (bool, False, "wait while another fit trains in output_dir"),
    "quiet": (bool, False, "draw no progress"),
    "logger": (Logger | list[Logger], [], "Lightning loggers, besides CSV and TensorBoard, for all stages"),
}
"""Options of their own: type, default, help."""


def make_fit_parser() -> FitParser:
    """The parser of ``fit``: every setting of an experiment."""
    parser = FitParser(prog="python -m dawm fit", parser_mode="omegaconf+", elsewhere=ELSEWHERE)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of an experiment; may be given repeatedly")
    for name, (kind, default, about) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=about)
    parser.add_class_arguments(TransitionDataModule, "data")
    parser.link_arguments("seed_everything", "data.seed")
    for name in MODULES:
        parser.add_subclass_arguments(L.LightningModule, name, skip=set(SIZES))
    parser.add_class_arguments(Stages, "stages")
    parser.add_class_arguments(L.Trainer, "trainer", skip=set(ELSEWHERE), instantiate=False)
    parser.set_defaults({f"data.{name}": None for name in SHARED if name in parameters_of(TransitionDataModule)})
    return parser


def parse_fit(args: Sequence[str]) -> Settings:
    """Parses the arguments of ``fit`` and builds what can be built without the data."""
    parser = make_fit_parser()
    # as arguments and not as defaults: of a default class the arguments' defaults would pass for given ones
    config = parser.parse_args([*DEFAULTS, *_forgetting_replaced_lists(args)])
    config.pop("config", None)
    check_groups(config.as_dict(), GROUPS)
    for name, (lowest, highest) in RANGES.items():
        holds = config[name] is not None and lowest <= config[name] <= highest
        require(name, config[name], holds, f"a number from {lowest} to {highest}")
    _share(config, parser.given)
    check_no_gaps({name: config[name].as_dict() for name in MODULES})
    check_no_gaps(config.data.as_dict(), TransitionDataModule, "data")
    check_no_gaps(config.stages.as_dict(), Stages, "stages")
    require("output_dir", config.output_dir, bool(config.output_dir), "a folder")
    config.output_dir = str(expanded(config.output_dir))
    for name, kind in MODULES.items():
        found = import_class(config[name].class_path)
        if not issubclass(found, kind):
            raise UserError(f"--{name}: got {found.__name__}, expected a {kind.__name__}; name another class")
    of_data = config.data.horizon
    horizon = config.world_model.init_args.get("horizon", of_data)
    require("world_model.horizon", horizon, horizon == of_data, f"{of_data}, the data's", "set both by --horizon")
    plain = yaml.safe_load(parser.dump(config, skip_validation=True, skip_unset=False))
    if isinstance(plain["logger"], dict):
        plain["logger"] = [plain["logger"]]
    for name in (*MODULES, "logger"):
        config.pop(name)
    return Settings(parser.instantiate(config), plain)


def _forgetting_replaced_lists(args: Sequence[str]) -> Iterator[str]:
    """The arguments, with each list of callbacks or loggers emptied before it is given again.

    jsonargparse lets the n-th element of a new list inherit what the old one's n-th was given, whatever their classes.
    """
    for index, argument in enumerate(args):
        name, _, value = argument.partition("=")
        if name == "--config":
            path = expanded(value or (args[index + 1] if index + 1 < len(args) else ""))
            try:
                content = yaml.safe_load(path.read_text())
                stages = [stage for stage, own in content.get("stages", {}).items() if "callbacks" in own]
                yield from ["--logger=[]"] if "logger" in content else []
            except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
                stages = []  # the parser says what is wrong with it
            yield from (f"--stages.{stage}.callbacks=[]" for stage in stages if stage in STAGES)
        elif name == "--logger" or (name.startswith("--stages.") and name.endswith(".callbacks")):
            yield f"{name}=[]"
        yield argument


def _share(config: Namespace, given: Namespace) -> None:
    """Hands shared numbers to every constructor that has a parameter of that name and was not given another value."""
    for name in SHARED:
        if f"data.{name}" in config and config.data[name] is None:
            config.data[name] = config[name]
    described = [(config[name], given.get(name)) for name in MODULES]  # what they hold they build themselves
    for group in ("data", "stages"):
        described += _described(config[group], given.get(group))
    for description, explicit in described:
        arguments = (explicit.get("init_args") if explicit is not None else None) or Namespace()
        taken = parameters_of(import_class(description.class_path, object))
        for name in SHARED:
            if name in taken and name not in arguments:
                description.init_args = description.get("init_args") or Namespace()
                description.init_args[name] = config[name]


def _described(settings: Any, given: Any) -> Iterator[tuple[Namespace, Namespace | None]]:
    """Every class described within some settings, with what of its description was given."""
    if isinstance(settings, list):
        for index, part in enumerate(settings):
            yield from _described(part, given[index] if isinstance(given, list) and index < len(given) else None)
    elif isinstance(settings, Namespace):
        own = given if isinstance(given, Namespace) else Namespace()
        if "class_path" in settings:
            yield settings, own
        for name, part in list(vars(settings).items()):
            yield from _described(part, own.get(name))
