"""``python -m dawm diagnose``: how true, how new and how usable the transitions are that a run's agent learnt from."""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dawm.cli.fidelity import draw_fidelity, show_fidelity
from dawm.cli.report import checkpoint_hashes, draw_report, read_results
from dawm.cli.synthesize import load_synthesizer
from dawm.data.batches import derive_seed
from dawm.data.module import TransitionDataModule
from dawm.data.progress import progress_bar
from dawm.data.transitions import Segments, Transitions
from dawm.errors import UserError, require
from dawm.evaluation import diagnosis
from dawm.evaluation.diagnosis import Paths, Units
from dawm.evaluation.environments import Environment
from dawm.evaluation.simulator import Simulator
from dawm.files import expanded, write_whole
from dawm.forward_model import ForwardPrediction
from dawm.synthesis.ensemble import EnsembleSynthesizer
from dawm.synthesis.rollouts import Synthesizer
from dawm.training.build import load_module
from dawm.world_model import DiffusionWorldModel

__all__ = ["diagnose_run"]


def diagnose_run(
    console: Console, run: Path, rollouts: int = 2000, seed: int = 0, env_id: str | None = None, **options: Any
) -> None:
    """Measure how true a run's imagined transitions are, step by step, before and after filters.

    Without further options they are what the run's agent learnt from. The figures go into ``fidelity.json``,
    ``fidelity.png`` and ``report.html`` of the run's folder; docs/evidence.md says what each means.

    Args:
        console: Where to print.
        run: Folder of the run (``output_dir`` of ``fit``).
        rollouts: Rollouts to imagine, and at most so many held-out segments to compare them with.
        seed: Seed of starts, noise and samples; the same seed gives the same figures.
        env_id: Gymnasium environment to compare with; None takes the data set's own, if its state can be set.
        **options: How to imagine, as `load_synthesizer` takes it.
    """
    require("rollouts", rollouts, rollouts >= 1, "at least 1")
    run = expanded(run)
    results = read_results(run)
    data, synthesizer, described = load_synthesizer(run, **options)
    simulator, reason = _simulator(data, env_id)
    agent = load_module(Path(results["stages"]["agent"]["checkpoint"]))
    generator = torch.Generator().manual_seed(derive_seed(seed, "diagnose"))

    units = Units(data)
    segments = Segments.cat(data.validation_segment_loader().batches)[:rollouts].to("cpu")
    real = diagnosis.real_paths(segments, bool(data.episodes.end_observed.all()))
    held_out = Transitions.cat(data.validation_transition_loader().batches).to("cpu")
    start, x = synthesizer.draw(data, rollouts, derive_seed(seed, "diagnose", "starts"))

    noise = torch.Generator(synthesizer.world_model.device).manual_seed(derive_seed(seed, "diagnose", "noise"))
    with console.status("imagining"):
        drawn = synthesizer.imagine(start, noise, x)
    made, all_made = synthesizer.judge(drawn).cpu(), synthesizer.unfiltered().judge(drawn).cpu()
    made.require_some("margin")
    imagined = diagnosis.imagined_paths(all_made, made.kept, start[2].cpu())
    rows = {"real": held_out, **imagined.rows()}
    edge, last = diagnosis.edges(made)
    steps = made.steps()  # with the rewards that the agent learnt from, pessimism included
    learnt = {"real": held_out, "after_filters": made.transitions(), "last": steps[last],
              "earlier": steps[made.kept & ~last]}  # fmt: skip

    parts: dict[str, Callable[[], Any]] = {
        "held_out": lambda: _against_recorded(synthesizer, real, units, noise),
        "forward_model": lambda: _against_forward_model(synthesizer.world_model, real, imagined, units),
        "inverse_dynamics": lambda: diagnosis.action_errors(synthesizer.inverse_dynamics.cpu(), held_out),
        "return_response": lambda: (
            diagnosis.return_response(real, data.discount) | diagnosis.return_response(imagined, data.discount)
        ),
        "novelty": lambda: diagnosis.novelty(units, rows, generator),
        "distributions": lambda: diagnosis.distributions(units, rows, generator),
        "edge": lambda: {
            "fraction": edge.sum() / made.kept.sum(),
            "real_fraction": data.episodes.truncated.sum() / len(data.episodes),
        },
        "td_targets": lambda: diagnosis.td_targets(agent, learnt, getattr(agent, "discount", data.discount)),
    }
    if simulator is not None:
        parts["simulator"] = lambda: _against_simulator(simulator, (real, imagined), data, units)
    fidelity = described | {"rollouts": rollouts, "seed": seed, "held_out_segments": len(segments)}
    fidelity["checkpoints"] = checkpoint_hashes(results)
    fidelity["judges_itself"] = synthesizer.labels == "forward" or isinstance(synthesizer, EnsembleSynthesizer)
    fidelity["columns"] = diagnosis.column_names(data.observation_size, data.action_size)
    fidelity["fates"] = {fate: count / made.counts.total() for fate, count in made.counts.items()}
    with progress_bar("diagnosing", len(parts)) as bar:
        for name, part in parts.items():
            bar.update(bar.task_ids[0], description=f"diagnosing: {name.replace('_', ' ')}")
            figures = json.dumps(part(), default=lambda tensor: tensor.tolist())
            fidelity[name] = json.loads(figures, parse_constant=lambda _: None)  # what is not finite is null
            bar.advance(bar.task_ids[0])
    fidelity["simulator"] = fidelity.get("simulator") or {"left_out": reason}
    write_whole(run / "fidelity.json", json.dumps(fidelity, indent=2, default=str) + "\n")
    draw_fidelity(run / "fidelity.png", fidelity)
    draw_report(run, results)
    show_fidelity(console, fidelity)
    console.print(f"all figures: {run}/fidelity.json and report.html", soft_wrap=True, markup=False, highlight=False)


def _simulator(data: TransitionDataModule, env_id: str | None) -> tuple[Simulator | None, str]:
    """The environment as a judge, or why there is none; an environment that the user named has to be one."""
    environment: Environment | None = env_id or data.env_spec
    if environment is None:
        return None, "the data set names no environment; --env_id does"
    try:
        simulator = Simulator(environment, "env_id")
    except UserError as error:
        if env_id is not None:
            raise
        return None, str(error).partition(": ")[2].partition("; ")[0]
    if (shape := simulator.env.observation_space.shape) != (data.observation_size,):
        raise simulator.named.error(f"with observations of shape {shape}", f"({data.observation_size},) as in the data")
    return simulator, ""


def _against_simulator(
    simulator: Simulator, groups: tuple[Paths, ...], data: TransitionDataModule, units: Units
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "environment": simulator.named.name, "velocity_limit": simulator.velocity_limit,
        "positions_left_out": simulator.skipped,
    }  # fmt: skip
    with closing(simulator):
        for paths in groups:
            for key, figures in diagnosis.simulated(simulator, paths, data.episodes.action_space, units).items():
                found.setdefault(key, {}).update(figures)
    return found


def _against_forward_model(model: DiffusionWorldModel, real: Paths, imagined: Paths, units: Units) -> Any:
    """Errors against the world model's forward model; None where it was trained without."""
    forward_model = model.forward_model
    if forward_model is None:
        return None

    def predict(observations: Tensor, actions: Tensor) -> ForwardPrediction:
        told = forward_model.predict(model.codec, observations.to(model.device), actions.to(model.device))
        return ForwardPrediction(*(part.cpu() for part in told))

    return diagnosis.forward_errors(predict, real, units) | diagnosis.forward_errors(predict, imagined, units)


def _against_recorded(synthesizer: Synthesizer, real: Paths, units: Units, noise: torch.Generator) -> dict[str, Any]:
    """Errors of futures imagined from held-out starts, with their own returns-to-go, against the recorded ones."""
    model, steps = synthesizer.world_model, real.steps
    s, a, g = (part.to(model.device) for part in (steps.observations[:, 0], steps.actions[:, 0], real.asked))
    imagined = model.imagine(s, a, g, synthesizer.guidance, noise)
    following, rewards, ends = (
        p.cpu() for p in (imagined.observations[:, 1:], imagined.rewards, imagined.terminations)
    )
    predicted = replace(steps, next_observations=following, rewards=rewards, terminations=ends)
    return diagnosis.errors(units, predicted, steps, real.chosen)
