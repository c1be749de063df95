"""``python -m dawm fit``: the three stages in order, the score, the files and the table."""

import shlex
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
from rich.console import Console

from dawm.cli.evaluate import EVALUATION_SEED
from dawm.cli.messages import as_user_error, disk_errors
from dawm.cli.report import collect_results, log_summary, show_results, write_files
from dawm.cli.settings import Settings, parse_fit
from dawm.data import progress
from dawm.data.module import TransitionDataModule
from dawm.data.sources.environments import describe_environment
from dawm.errors import UserError
from dawm.evaluation.checks import check_environment
from dawm.evaluation.episodes import Policy, evaluate
from dawm.files import expanded, writable
from dawm.training.build import build_logger, import_class, parameters_of
from dawm.training.checkpoints import plain
from dawm.training.experiment import Experiment
from dawm.training.ranks import check_launcher, only_run_in
from dawm.training.stage import Stage

__all__ = ["fit"]


def fit(args: Sequence[str], console: Console) -> None:
    """Trains the stages in order, scores the agent, writes and shows the results."""
    with as_user_error("config"):
        settings = parse_fit(args)
    check_launcher(settings.plain["trainer"])
    output_dir = writable(Path(settings.plain["output_dir"]))
    with disk_errors(output_dir), only_run_in(output_dir, settings.plain["wait"]):
        _run(settings, output_dir, shlex.join(["python", "-m", "dawm", "fit", *args]), console)


def _run(settings: Settings, output_dir: Path, command: str, console: Console) -> None:
    data: TransitionDataModule = settings.parts.data
    progress.quiet = settings.plain["quiet"]
    data.setup()
    stages = settings.parts.stages.needed(data)
    environment = _checked_environment(data, stages)
    with as_user_error("logger"):
        loggers = [build_logger(description) for description in settings.plain["logger"]]
    shared = settings.plain["stages_dir"]
    folder = output_dir if shared is None else writable(expanded(shared), "stages_dir")
    experiment = Experiment(data, settings.plain, folder, environment, loggers, console, shared is not None)
    _say_what_is_left_out(settings.plain, console)
    _check_modules(experiment, stages)
    for logger in loggers:
        logger.log_hyperparams(settings.plain)
    trained: dict[str, L.LightningModule] = {}
    for stage in stages:
        with as_user_error(stage.name, only=ImportError):  # of a package that a callback or logger wants
            trained[stage.name] = experiment.run(stage, trained)
    if experiment.rank != 0:
        return
    episodes = settings.plain["final_episodes"]
    assert data.env_spec is not None
    console.print(f"scoring the agent over {episodes} episodes of {data.env_spec.id}", markup=False)
    start = time.monotonic()
    agent = trained["agent"]
    evaluation = evaluate(cast(Policy, agent.act), data.env_spec, episodes, EVALUATION_SEED, reference=data.reference,
                          seeds=getattr(agent, "seeds", 1), action_space=data.episodes.action_space,
                          max_episode_steps=data.max_episode_steps)  # fmt: skip
    class_path = settings.plain["agent"]["class_path"]
    results = collect_results(data.episodes, class_path, evaluation, experiment.results, experiment.seed)
    results["seconds"] = {"waiting": experiment.waited, "final evaluation": time.monotonic() - start}
    results["command"] = command
    write_files(output_dir, results, settings.plain)
    log_summary(loggers, results)
    show_results(console, output_dir, results)


def _check_modules(experiment: Experiment, stages: Iterable[Stage]) -> None:
    """Builds every module once: a mistake in the agent shows now, not when the world model is trained."""
    built: dict[str, L.LightningModule] = {}
    for stage in stages:
        with as_user_error(stage.name):
            stage.connect(built)
            built[stage.name] = module = experiment.build(stage)
            if (ask := getattr(module, "train_loader", None)) is not None:  # as does one in what it asks of the data
                ask(experiment.data, 1, 0)
        for callback in stage.callbacks:
            plain(callback.state_dict(), ("callbacks", type(callback).__name__))
    if not hasattr(built["agent"], "act"):
        name = type(built["agent"]).__name__
        raise UserError(f"--agent: got {name}, which has no act, expected an agent to score; write its `act`")


def _checked_environment(data: TransitionDataModule, stages: Iterable[Stage]) -> object:
    """What checkpoints say of the evaluation environment, once it and those of callbacks were built and tried."""
    if data.env_spec is None:
        raise UserError(
            f"--data.env_id: got None, expected an environment to score the agent in ({data.dataset!r} names none); "
            "set --data.env_id"
        )
    observations, actions = data.episodes.observation_space, data.episodes.action_space
    named = {
        f"stages.agent.callbacks.{type(callback).__name__}.env_id": env_id
        for callback in (callback for stage in stages for callback in stage.callbacks)
        if (env_id := getattr(callback, "env_id", None)) is not None
    }
    for key, environment in {"data.env_id": data.env_spec, **named}.items():
        check_environment(environment, observation_space=observations, action_space=actions,
                          longest_episode=int(data.episodes.lengths.max()), env_id_key=key,
                          max_episode_steps=data.max_episode_steps)  # fmt: skip
    return describe_environment(data.env_spec, data.env_id)


def _say_what_is_left_out(settings: dict[str, Any], console: Console) -> None:
    """Prints which settings have no effect in this run."""
    if settings["data"]["synthetic_fraction"] == 0:
        console.print("synthetic_fraction is 0: the agent learns from real data alone, nothing is imagined")
    class_path, seeds = settings["agent"]["class_path"], settings["seeds"]
    if seeds > 1 and "seeds" not in parameters_of(import_class(class_path)):
        console.print(f"{class_path} has no parameter `seeds`: it trains one seed, not {seeds}", style="yellow")
