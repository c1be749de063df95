"""What the commands do once their arguments are parsed."""

import inspect
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
from gymnasium.envs.registration import EnvSpec
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from dawm.callbacks import RegenerateRollouts
from dawm.cli.messages import check_groups, check_no_gaps, told_of_settings
from dawm.cli.report import collect_results, read_results, show_evaluation, show_results, write_files
from dawm.data.module import TransitionDataModule
from dawm.data.sources.scores import ReferenceScores
from dawm.errors import UserError
from dawm.evaluation.episodes import Environment, Evaluation, Policy, evaluate, make_environment
from dawm.training.build import build_module, import_class, load_module
from dawm.training.checkpoints import ORIGIN, read_checkpoint
from dawm.training.experiment import Build, Experiment
from dawm.training.stage import Stages

__all__ = ["MODULES", "evaluate_run", "fit"]

EVALUATION_SEED = 2_000_000  # of the last evaluation: apart from the seeds of evaluations during training
DATA_SETTINGS = {
    "world_model": ("horizon", "discount", "return_window", "segment_batch_size", "validation_fraction"),
    "inverse_dynamics": ("batch_size", "validation_fraction"),
    "agent": ("env_id", "discount", "return_window", "batch_size", "synthetic_fraction"),
}
"""What of the data module's settings a stage's result depends on, besides the data and the seed."""
MODULES = ("world_model", "inverse_dynamics", "model")
HIGHEST = 2**63 - 1  # of the numbers that torch can count to, seeds among them
GROUPS = ("data", "trainer", "stages", "stages.world_model", "stages.inverse_dynamics", "stages.agent", *MODULES)


def fit(parser: ArgumentParser, config: Namespace, console: Console) -> None:
    """Trains the stages in order, scores the agent, writes and shows the results.

    Args:
        parser: The parser of ``fit``, which instantiates what it parsed.
        config: Parsed settings.
        console: Where to draw.
    """
    _quiet()
    plain = config.clone()
    plain.pop("config", None)
    settings: dict[str, Any] = plain.as_dict()
    _check(settings)
    output_dir = _writable(Path(config.output_dir))
    modules = {key: settings[key] for key in MODULES}
    modules["model"] = _with_seeds(modules["model"], config.seeds, console)
    rest = config.clone()
    for key in (*MODULES, "config"):
        rest.pop(key, None)
    with told_of_settings("data, --stages"):
        parts = parser.instantiate(rest)

    data: TransitionDataModule = parts.data
    data.setup()
    if data.env_spec is None:
        raise UserError("data.env_id: the data set names no environment to score the agent in; set --data.env_id")
    make_environment(data.env_spec).close()  # a missing package shows now, not after hours of training
    horizon = modules["world_model"]["init_args"].get("horizon", data.horizon)
    if horizon != data.horizon:
        raise UserError(
            f"data.horizon is {data.horizon} but world_model.horizon is {horizon}; set both to ${{horizon}}"
        )
    # built once for nothing: a mistake in the agent shows now, not when the world model is trained
    for name in MODULES if data.synthetic_fraction > 0 else MODULES[-1:]:
        _told(name, build_module(modules[name]))(data.observation_size, data.action_size)
    experiment = Experiment(
        data=data,
        stages=parts.stages,
        trainer=settings["trainer"],
        settings={
            name: {
                "data": {key: settings["data"][key] for key in keys},
                "module": modules["model" if name == "agent" else name],
                "callbacks": settings["stages"][name]["callbacks"],
            }
            for name, keys in DATA_SETTINGS.items()
        },
        output_dir=output_dir,
        seed=config.seed_everything,
        console=console,
        cuda_graphs=config.cuda_graphs,
    )
    trained = {}
    if data.synthetic_fraction > 0:
        for name in ("world_model", "inverse_dynamics"):
            trained[name] = experiment.run_stage(name, _told(name, build_module(modules[name])))
        for callback in _regenerate(parts.stages.agent.callbacks):
            callback.connect(trained["world_model"], trained["inverse_dynamics"])
    else:
        for callback in _regenerate(parts.stages.agent.callbacks):
            parts.stages.agent.callbacks.remove(callback)
        console.print("synthetic_fraction is 0: the agent learns from real data alone, nothing is imagined")
    agent = experiment.run_stage("agent", _told("model", build_module(modules["model"])))
    if experiment.rank != 0:
        return
    console.print(f"scoring the agent over {config.final_episodes} episodes of {data.env_spec.id}")
    evaluation = _evaluate(agent, data.env_spec, config.final_episodes, EVALUATION_SEED, data.reference)
    results = collect_results(
        data.episodes, modules["model"]["class_path"], evaluation, experiment.results, config.seed_everything
    )
    write_files(output_dir, results, settings, f"python -m dawm fit --config {output_dir / 'config.yaml'}")
    show_results(console, output_dir, results)


def evaluate_run(
    console: Console, run: Path, episodes: int = 20, seed: int = EVALUATION_SEED, env_id: str | None = None
) -> None:
    """Score a run's trained agent in its environment.

    Args:
        console: Where to print.
        run: Folder of the run (``output_dir`` of ``fit``).
        episodes: Episodes to play.
        seed: Seed of the first episode.
        env_id: Gymnasium environment to play in; None takes the data set's own.
    """
    path = Path(read_results(run)["stages"]["agent"]["checkpoint"])
    agent, origin = load_module(path), read_checkpoint(path)[ORIGIN]
    if env_id is None and origin["env_spec"] is None:
        raise UserError("env_id: the data set of this run names no environment; set --env_id")
    environment = env_id or EnvSpec.from_json(origin["env_spec"])
    reference = None if origin["reference"] is None else ReferenceScores(**origin["reference"])
    result = _evaluate(agent, environment, episodes, seed, reference)
    show_evaluation(console, result, reference)


def _evaluate(
    agent: L.LightningModule, environment: Environment, episodes: int, seed: int, reference: ReferenceScores | None
) -> Evaluation:
    normalize = None if reference is None else reference.normalize
    seeds = getattr(agent, "seeds", 1)
    return evaluate(cast(Policy, agent.act), environment, episodes, seed, normalize=normalize, seeds=seeds)


def _check(settings: dict[str, Any]) -> None:
    """Raises a UserError for what would only fail later, some of it after hours of training."""
    check_groups(settings, GROUPS)
    check_no_gaps({key: settings[key] for key in MODULES})
    check_no_gaps(settings["data"], TransitionDataModule, "data")
    check_no_gaps(settings["stages"], Stages, "stages")
    if not settings["output_dir"]:
        raise UserError("output_dir is empty, but must be a folder; set --output_dir")
    for key in ("seed_everything", "horizon", "seeds", "final_episodes"):
        value, lowest = settings[key], -HIGHEST if key == "seed_everything" else 1
        if value is None or not lowest <= value <= HIGHEST:
            raise UserError(f"{key} is {value}, but must be a whole number of at least {lowest}; set --{key}"[:300])


def _told(setting: str, build: Build) -> Build:
    """The same, telling in one line of settings that it cannot use."""

    def build_or_tell(observation_size: int, action_size: int) -> L.LightningModule:
        with told_of_settings(setting):
            return build(observation_size, action_size)

    return build_or_tell


def _with_seeds(model: dict[str, Any], seeds: int, console: Console) -> dict[str, Any]:
    """The agent's description with the number of seeds, where its class can train several."""
    if seeds == 1:
        return model
    if "seeds" not in inspect.signature(import_class(model["class_path"])).parameters:
        console.print(f"{model['class_path']} takes no `seeds`: it trains one seed, not {seeds}", style="yellow")
        return model
    return {**model, "init_args": {**(model.get("init_args") or {}), "seeds": seeds}}


def _regenerate(callbacks: Sequence[L.Callback]) -> list[RegenerateRollouts]:
    return [callback for callback in callbacks if isinstance(callback, RegenerateRollouts)]


def _quiet() -> None:
    """Keeps Lightning's advice off the screen where the project has decided otherwise."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # of another library's making: Lightning calls a deprecated part of torch
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    # validation metrics are the same on all ranks: torchmetrics has put them together
    warnings.filterwarnings("ignore", ".*recommended to use `self.log.*sync_dist=True.*")
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
