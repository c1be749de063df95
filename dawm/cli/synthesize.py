"""Write imagined transitions as a Minari data set: what ``python -m dawm synthesize`` does.

Memory holds one chunk of B rollouts, whatever the size of the data set. An interrupted command leaves nothing.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import gymnasium as gym
import torch
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.text import Text

from dawm import __version__
from dawm.callbacks.regenerate import RegenerateRollouts, check_synthesis
from dawm.cli.report import read_results
from dawm.data.module import TransitionDataModule
from dawm.data.progress import progress_bar
from dawm.data.sources.catalog import dataset_folder
from dawm.data.sources.minari import SOURCE
from dawm.data.sources.spaces import unscale_actions
from dawm.data.store.minari_writer import EpisodeColumns, write_dataset
from dawm.data.store.staging import check_output
from dawm.data.weights import RowWeights
from dawm.errors import UserError, first_line, require
from dawm.files import expanded, hash_of
from dawm.synthesis.guards import DataStatistics, list_fates
from dawm.synthesis.rollouts import CHUNK, Labels, Rollouts, Synthesizer
from dawm.synthesis.starts import FirstAction, policy_of
from dawm.synthesis.targets import TargetReturn
from dawm.training.build import load_module, restore_module
from dawm.training.checkpoints import ORIGIN, read_checkpoint

__all__ = ["load_synthesizer", "synthesize_dataset"]

SETTINGS = (
    "starts", "imagination", "first_action", "first_action_noise", "target_return", "guidance", "labels", "margin",
    "max_disagreement", "max_inconsistency", "max_forward_disagreement", "pessimism", "noising", "value_expansion",
)  # fmt: skip
"""What the metadata say of `RegenerateRollouts`."""
FEWEST = 256  # starts of a chunk: the last ones, which make up for dropped steps, are not worth making smaller


def synthesize_dataset(
    console: Console, run: Path, output: str, transitions: int = 1_000_000, seed: int = 0, overwrite: bool = False,
    **options: Any,
) -> None:  # fmt: skip
    """Write transitions imagined by a run's world model as a Minari data set.

    Without further options they are what the run's agent learnt from. Each episode is a rollout from a random real
    start, up to ``horizon`` steps long: it ends with an imagined termination, or is truncated. Steps labelled by the
    forward models do not lead on to the next imagined observation, so each is an episode of its own.

    Args:
        console: Where to draw.
        run: Folder of the run (``output_dir`` of ``fit``).
        output: Minari id of the new data set, such as imagined/hopper/medium-v0.
        transitions: Transitions to write.
        seed: Seed of starts and noise; the same seed gives the same data.
        overwrite: Replace a data set of that id.
        **options: How to imagine, as `load_synthesizer` takes it.
    """
    require("transitions", transitions, transitions >= 1, "at least 1")
    check_output(output, overwrite)
    data, synthesizer, described = load_synthesizer(expanded(run), **options)
    if described["value_expansion"]:
        raise UserError(
            f"--run: got {run}, whose agent learnt from whole rollouts as one row each (value_expansion), expected one "
            "that learnt from transitions, as a data set holds them; name another run"
        )
    episodes, horizon = data.episodes, synthesizer.world_model.horizon
    others = [part.strip() for part in episodes.name.split("+")]
    require("output", output, output not in others, "another name than that of the data set the run learnt from")
    counts: Counter[str] = Counter()  # complete once all episodes are written
    synthesis = described | {"transitions": transitions, "seed": seed, "counts": counts}
    metadata: dict[str, Any] = {"synthesis": synthesis}
    if (reference := episodes.reference) is not None:
        metadata |= {"ref_min_score": reference.minimum, "ref_max_score": reference.maximum,
                     SOURCE: f"those of {episodes.name} ({reference.source})"}  # fmt: skip
    with progress_bar(f"imagining {output}", transitions) as bar:
        count, steps = write_dataset(
            output, _imagine(synthesizer, data, transitions, seed, counts),
            env_spec=episodes.env_spec, observation_space=episodes.observation_space,
            action_space=episodes.action_space, metadata=metadata, algorithm_name="DAWM world model",
            description=f"Imagined by a diffusion world model trained on {episodes.name}: rollouts of up to {horizon} "
            "steps from random real observations; all actions but the first are inferred from the observations.",
            overwrite=overwrite, report=lambda done: bar.update(bar.task_ids[0], completed=done),
        )  # fmt: skip
    console.print(Text(f"{output}: {count:,} episodes, {steps:,} transitions in {dataset_folder(output)}"))
    console.print(f"imagined steps: {list_fates(counts)}", highlight=False)


def load_synthesizer(
    run: Path, target_return: TargetReturn | None = None, guidance: float | None = None, margin: float | None = None,
    max_disagreement: float | None = None, max_inconsistency: float | None = None,
    max_forward_disagreement: float | None = None, pessimism: float | None = None, labels: Labels | None = None,
    starts: RowWeights | None = None, first_action: FirstAction | None = None, first_action_noise: float | None = None,
    num_steps: int | None = None, device: str = "auto",
) -> tuple[TransitionDataModule, Synthesizer, dict[str, Any]]:  # fmt: skip
    """A finished run's data, what imagines as its agent saw it but for the options given, and all of it described.

    Args:
        run: Folder of the run (``output_dir`` of ``fit``).
        target_return: Which return-to-go the rollouts aim at; None keeps the run's.
        guidance: Weight of classifier-free guidance; None keeps the run's.
        margin: Imagined observations and rewards may lie outside the data's range by this fraction of the range; more
            is dropped. None keeps the run's.
        max_disagreement: Drop steps whose inferred actions disagree by more (standard deviation over the ensemble,
            actions in [-1, 1]); None keeps the run's, 2 drops none.
        max_inconsistency: Drop steps further from the forward models' prediction than this quantile of held-out real
            ones; None keeps the run's.
        max_forward_disagreement: Drop steps on which the forward models disagree more than on this quantile of held-out
            real ones; None keeps the run's.
        pessimism: Standard deviations of the data's rewards, within episodes, that a reward is lowered by per unit by
            which the forward models disagree more than on half of the held-out real ones; None keeps the run's.
        labels: Whose next observation, reward and termination a step gets, ``imagined`` or ``forward``; None keeps the
            run's.
        starts: How often rollouts start from each real row, by weight; None keeps the run's.
        first_action: The ``recorded`` one, or that of the run's trained ``policy``; None keeps the run's.
        first_action_noise: Standard deviation of the noise on the policy's actions; None keeps the run's.
        num_steps: Steps of the sampler; None keeps the run's.
        device: Where to imagine: cpu, cuda, ...; auto takes a GPU if there is one.
    """
    chosen = {name: value for name, value in locals().items() if name in SETTINGS and value is not None}
    require("num_steps", num_steps, num_steps is None or num_steps >= 1, "at least 1")
    place = _device(device)
    stages = read_results(run)["stages"]
    data, callback, unchosen = _read_settings(run / "config.yaml")
    for key, value in chosen.items():
        setattr(callback, key, value)
    check_synthesis(callback)
    if callback.noising is None and callback.starts is None:  # so it is described
        callback.starts = data.real_weights
    models, hashes = _load_models(run, stages, data.episodes.fingerprint, place)
    callback.connect(**models)
    synthesizer = callback.synthesizer(data, DataStatistics.of(data.episodes))
    if callback.first_action == "policy":
        agent = load_module(Path(stages["agent"]["checkpoint"])).to(place)
        synthesizer = replace(synthesizer, starts=replace(synthesizer.starts, policy=policy_of(agent)))
    sampler = synthesizer.world_model.sampler
    sampler.num_steps = num_steps or sampler.num_steps
    described = {
        "dawm": __version__, "run": str(run), "dataset": data.episodes.name, "fingerprint": data.episodes.fingerprint,
        **hashes, "horizon": synthesizer.world_model.horizon, "device": place.type,
        **{key: _described(getattr(callback, key)) for key in SETTINGS}, "sampler": _described(sampler),
        "chosen_by": {key: "option" if key in chosen else unchosen for key in SETTINGS}
        | {"num_steps": "run" if num_steps is None else "option"},
    }  # fmt: skip
    return data, synthesizer, described


def _read_settings(path: Path) -> tuple[TransitionDataModule, RegenerateRollouts, str]:
    """A run's data, the callback that made its synthetic transitions, and who chose its settings: run or default."""
    try:
        settings = yaml.safe_load(path.read_text())
        callback, chosen_by = RegenerateRollouts(), "default"
        for entry in settings["stages"]["agent"]["callbacks"] or ():
            if issubclass(resolve_name(entry["class_path"]), RegenerateRollouts):
                callback, chosen_by = _instantiated(RegenerateRollouts, entry), "run"
        weights = _instantiated(RowWeights, settings["data"]["real_weights"])
        shared = {"real_weights": weights, "seed": settings["seed_everything"]}
        return TransitionDataModule(**settings["data"] | shared), callback, chosen_by
    except UserError:
        raise
    except Exception as error:  # whatever YAML, imports and constructors raise
        found = f"{path}, which cannot be read ({first_line(error)})"
        raise UserError(f"--run: got {found}, expected a finished run's settings; run `fit` again") from error


def _instantiated(base: type, described: Mapping[str, Any] | None) -> Any:
    """The object that a config's ``class_path`` and ``init_args`` describe; None of None."""
    if described is None:
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "part")
    return parser.instantiate(parser.parse_object({"part": described})).part


def _load_models(
    run: Path, stages: Mapping[str, Any], fingerprint: str, device: torch.device
) -> tuple[dict[str, Any], dict[str, str]]:
    """World model and inverse dynamics, and the hashes of their checkpoints."""
    models, hashes = {}, {}
    for name in ("world_model", "inverse_dynamics"):
        if name not in stages:
            raise UserError(
                f"--run: got {run}, which learnt from real data alone, expected one with a {name}; name a run with "
                "data.synthetic_fraction above 0"
            )
        path = Path(stages[name]["checkpoint"])
        checkpoint = read_checkpoint(path)
        origin = checkpoint.get(ORIGIN, {})
        if origin.get("fingerprint") != fingerprint:
            raise UserError(
                f"--run: got {path}, which was trained on {origin.get('dataset', 'unknown data')} as it was, expected "
                "the data set as it is now; restore it, or run `fit` again"
            )
        models[name] = restore_module(path, checkpoint).to(device)
        hashes[name] = hash_of(path)
    return models, hashes


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # not known, or not on this machine
        reason = first_line(error)
        raise UserError(f"--device: got {name!r} ({reason}), expected one of this machine; set cpu") from None


def _described(part: Any) -> Any:
    """A plain value as it is; of a target return, weights or a sampler class and settings, as plain values."""
    if part is None or isinstance(part, (str, float, int)):
        return part
    values = json.loads(json.dumps(vars(part), default=str))
    return {"class_path": f"{type(part).__module__}.{type(part).__qualname__}", **values}


def _imagine(
    synthesizer: Synthesizer, data: TransitionDataModule, transitions: int, seed: int, counts: Counter[str]
) -> Iterator[EpisodeColumns]:
    """Chunks of episodes until there are enough steps: chunk k is what the agent's rank k would begin with.

    ``counts`` takes up the steps by fate; ``surplus`` are those beyond what is asked for.
    """
    chunk = 0
    while (missing := transitions - counts["kept"]) > 0:
        number = min(CHUNK, max(FEWEST, math.ceil(missing / synthesizer.world_model.horizon)))
        rollouts = synthesizer.rollouts(data, number, seed, rank=chunk).cpu()
        rollouts.require_some("margin")
        if synthesizer.labels == "forward":
            rollouts = rollouts.single_steps()
        columns = _columns(rollouts, data.episodes.action_space, missing)
        surplus = rollouts.counts["kept"] - len(columns.rewards)
        counts.update(rollouts.counts)
        counts.update(kept=-surplus, surplus=surplus)  # adds
        chunk += 1
        yield columns


def _columns(rollouts: Rollouts, action_space: gym.spaces.Box, most: int) -> EpisodeColumns:
    """The first ``most`` kept steps as episodes in the data's units, from rollouts of shape (B, ...) on the CPU."""
    before = rollouts.lengths.cumsum(0) - rollouts.lengths
    lengths = torch.minimum(rollouts.lengths, (most - before).clamp(min=0))
    steps = rollouts._replace(lengths=lengths).transitions()
    nonempty = lengths > 0
    recorded = nonempty.unsqueeze(1) & (torch.arange(rollouts.observations.shape[1]) <= lengths.unsqueeze(1))
    last = rollouts.terminations.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    # single precision may step over the bounds by rounding
    actions = unscale_actions(steps.actions, action_space).numpy().clip(action_space.low, action_space.high)
    return EpisodeColumns(
        lengths=lengths[nonempty].numpy(), observations=rollouts.observations[recorded].numpy(),
        actions=actions.astype(action_space.dtype, copy=False), rewards=steps.rewards.numpy(),
        terminated=last[nonempty].numpy() > 0.5,
    )  # fmt: skip
