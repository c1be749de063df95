"""Write imagined transitions as a Minari data set: what ``python -m dawm synthesize`` does.

Rollouts are imagined in chunks, and each chunk is a file in a hidden folder beside the data sets until there are enough
of them. So memory holds one chunk whatever the size of the data set, and interrupted work goes on behind the last whole
chunk. What a chunk holds depends on the settings, the seed and the chunks before it alone.

Symbols: B rollouts of a chunk, H horizon, E episodes kept, N rows kept, O observation size, A action size.
"""

import hashlib
import json
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple, cast

import gymnasium as gym
import minari
import numpy as np
import torch
import yaml
from rich.console import Console
from rich.text import Text

from dawm import __version__
from dawm.cli.report import read_results
from dawm.data.batches import derive_seed
from dawm.data.episodes import Episodes, load_episodes, unscale_actions
from dawm.data.sources.catalog import dataset_folder
from dawm.data.sources.minari import SOURCE
from dawm.data.store.minari_writer import EpisodeColumns, write_episodes
from dawm.data.store.parts import Parts
from dawm.data.store.staging import check_output, datasets_path, progress_bar, staged
from dawm.errors import UserError, first_line
from dawm.inverse_dynamics import InverseDynamics
from dawm.synthesis.guards import Bounds, RealRows
from dawm.synthesis.rollouts import CHUNK, LiftedReturn, Rollouts, TargetReturn, roll_out
from dawm.training.build import load_module
from dawm.training.checkpoints import ORIGIN, read_checkpoint
from dawm.world_model import DiffusionWorldModel

__all__ = ["synthesize_dataset"]

FEWEST = 256  # starts of a chunk: the last ones, which make up for dropped rows, are not worth making smaller


def synthesize_dataset(
    console: Console,
    run: Path,
    output: str,
    transitions: int = 1_000_000,
    target_return: TargetReturn | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    margin: float = 0.1,
    max_disagreement: float | None = None,
    num_steps: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Write transitions imagined by a run's world model as a Minari data set.

    Each episode is a rollout from a random real start, up to ``horizon`` steps long: it ends with an imagined
    termination, or is truncated. An interrupted command goes on where it was when it is given again.

    Args:
        console: Where to draw.
        run: Folder of the run (``output_dir`` of ``fit``).
        output: Minari id of the new data set, such as imagined/hopper/medium-v0.
        transitions: Transitions to write.
        target_return: Which return-to-go the rollouts aim at; None aims at each start's own.
        guidance: Weight of classifier-free guidance; 1 is the plain conditional model and the cheapest.
        seed: Seed of starts and noise; the same seed gives the same data.
        margin: Imagined observations and rewards may lie outside the data's range by this share of the range; more is
            dropped.
        max_disagreement: Drop rows whose inferred actions disagree by more (standard deviation over the ensemble,
            actions in [-1, 1]); None keeps all.
        num_steps: Steps of the sampler; None keeps those of the run.
        device: Where to imagine: cpu, cuda, ...; auto takes a GPU if there is one.
        overwrite: Replace a data set of that id, and give up what was begun for it with other settings.
    """
    for key, value, least in (("transitions", transitions, 1), ("num_steps", num_steps, 1), ("margin", margin, 0)):
        if value is not None and value < least:
            raise UserError(f"{key} is {value}, but must be at least {least}; set --{key}")
    check_output(output, overwrite)
    trained = _load(run, _device(device))
    episodes, world_model = trained.episodes, trained.world_model
    if output in (part.strip() for part in episodes.name.split("+")):
        raise UserError(f"output: {output} is the data set that the run learnt from; choose another name")
    if num_steps is not None:
        world_model.sampler.num_steps = num_steps
    target_return = LiftedReturn() if target_return is None else target_return
    settings = {
        "dawm": __version__,
        "dataset": episodes.name,
        "fingerprint": episodes.fingerprint,
        **trained.hashes,
        "horizon": world_model.horizon,
        "transitions": transitions,
        "target_return": _described(target_return),
        "guidance": guidance,
        "sampler": _described(world_model.sampler),
        "margin": margin,
        "max_disagreement": max_disagreement,
        "seed": seed,
        "device": world_model.device.type,
    }
    parts = Parts(output, settings, overwrite)
    bounds = RealRows.of(episodes).bounds(episodes, margin).to(world_model.device)
    try:
        with progress_bar(f"imagining for {output}", transitions, visible=True) as bar:
            bar.update(bar.task_ids[0], completed=parts.counts["kept"])
            while (missing := transitions - parts.counts["kept"]) > 0:
                rollouts = _imagine(trained, derive_seed(seed, len(parts), "synthesize"), missing, target_return,
                                    guidance, bounds, max_disagreement)  # fmt: skip
                parts.append(_columns(rollouts, episodes.action_space, missing), rollouts.counts)
                bar.update(bar.task_ids[0], completed=parts.counts["kept"])
        with (
            progress_bar(f"writing {output}", transitions, visible=True) as bar,
            staged(output, overwrite) as folder,
        ):
            if folder is None:
                check_output(output, overwrite)  # another process was faster
                return
            metadata = {"synthesis": {**settings, "run": str(run), "counts": dict(parts.counts)}}
            storage = _new_storage(folder, output, episodes, metadata, world_model.horizon)
            path = storage.data_path / "main_data.hdf5"
            count, steps = write_episodes(path, parts, lambda done: bar.update(bar.task_ids[0], completed=done))
            storage.update_metadata({"total_episodes": count, "total_steps": steps})
            storage.update_metadata({"dataset_size": float(storage.get_size())})
    except KeyboardInterrupt:
        console.print(
            f"interrupted; the same command goes on from {parts.counts['kept']:,} of {transitions:,} transitions "
            f"(to give them up, delete {parts.folder})"
        )
        raise
    except OSError as error:
        raise UserError(
            f"output: {output} cannot be written in {dataset_folder()} ({error}); "
            "free the disk or set MINARI_DATASETS_PATH, then give the same command again to go on"
        ) from error
    parts.remove()
    console.print(Text(f"{output}: {count:,} episodes, {steps:,} transitions in {dataset_folder(output)}"))
    fates = ", ".join(f"{fate} {number:,}" for fate, number in parts.counts.items() if number)
    console.print(f"imagined rows: {fates}", highlight=False)


class _Trained(NamedTuple):
    """What a run learnt, and from what."""

    world_model: DiffusionWorldModel
    inverse_dynamics: InverseDynamics
    hashes: dict[str, str]
    episodes: Episodes
    returns_to_go: torch.Tensor


def _load(run: Path, device: torch.device) -> _Trained:
    stages = read_results(run)["stages"]
    modules, hashes = {}, {}
    try:
        data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"run: {run / 'config.yaml'} cannot be read ({error}); run `fit` again") from None
    episodes = load_episodes(data["dataset"], data["env_id"], data["cache_dir"], data["memory_limit"])
    for name in ("world_model", "inverse_dynamics"):
        if name not in stages:
            raise UserError(
                f"run: {run} trained no {name}: it learnt from real data alone; name a run with "
                "data.synthetic_fraction above 0"
            )
        path = Path(stages[name]["checkpoint"])
        if not path.exists():  # the run was moved, or begun in another working directory
            path = run.joinpath(*path.parts[-3:])
        if read_checkpoint(path).get(ORIGIN, {}).get("fingerprint") != episodes.fingerprint:
            raise UserError(
                f"run: {path} was not trained on {episodes.name} as it is now; restore the data set, or run `fit` again"
            )
        modules[name] = load_module(path).to(device)
        hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    returns = episodes.returns_to_go(data["discount"], data["return_window"])
    world_model = cast(DiffusionWorldModel, modules["world_model"])
    return _Trained(world_model, cast(InverseDynamics, modules["inverse_dynamics"]), hashes, episodes, returns)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # not known, or not on this machine
        line = first_line(error)
        raise UserError(f"device: {name!r} cannot be used ({line}); set --device cpu or auto") from None


def _described(part: object) -> dict[str, Any]:
    """Class and settings of a target return or a sampler, as plain values."""
    values = json.loads(json.dumps(vars(part), default=str))
    return {"class_path": f"{type(part).__module__}.{type(part).__qualname__}", **values}


def _imagine(
    trained: _Trained,
    seed: int,
    missing: int,
    target_return: TargetReturn,
    guidance: float,
    bounds: Bounds,
    max_disagreement: float | None,
) -> Rollouts:
    """Rollouts for one chunk, on the CPU; fewer if few transitions are missing."""
    world_model, real = trained.world_model, trained.episodes.transitions
    count = min(CHUNK, max(FEWEST, math.ceil(missing / world_model.horizon)))
    starts = torch.randint(len(real), (count,), generator=torch.Generator().manual_seed(seed))
    targets = target_return(trained.returns_to_go[starts], trained.returns_to_go)
    rollouts = roll_out(
        world_model,
        trained.inverse_dynamics,
        real.observations[starts].to(world_model.device),
        real.actions[starts].to(world_model.device),
        targets.to(world_model.device),
        guidance=guidance,
        generator=torch.Generator(world_model.device).manual_seed(seed),
        bounds=bounds,
        max_disagreement=max_disagreement,
    )
    if not rollouts.counts["kept"]:
        fates = ", ".join(f"{fate} {number}" for fate, number in rollouts.counts.items() if number)
        raise UserError(
            f"all imagined rows were dropped ({fates}); raise --margin or --max_disagreement, or train the world model "
            "longer with --stages.world_model.max_steps"
        )
    return rollouts.cpu()


def _columns(rollouts: Rollouts, action_space: gym.spaces.Box, missing: int) -> EpisodeColumns:
    """The kept steps as episodes in the environment's units; no more steps than are missing.

    Args:
        rollouts: Fields of shape (B, ...).
        action_space: The environment's Box of actions.
        missing: Steps to take at most; what is beyond is counted as ``surplus``.
    """
    lengths = rollouts.lengths
    before = lengths.cumsum(0) - lengths
    lengths = torch.minimum(lengths, (missing - before).clamp(min=0))
    surplus = int(rollouts.lengths.sum() - lengths.sum())
    rollouts.counts["kept"] -= surplus
    rollouts.counts["surplus"] = surplus
    rollouts = rollouts._replace(lengths=lengths)

    steps = rollouts.transitions()
    nonempty = lengths > 0
    place = torch.arange(rollouts.observations.shape[1])
    recorded = nonempty.unsqueeze(1) & (place <= lengths.unsqueeze(1))
    last = rollouts.terminations.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    # single precision may step over the bounds by rounding
    actions = unscale_actions(steps.actions, action_space).numpy().clip(action_space.low, action_space.high)
    return EpisodeColumns(
        lengths=lengths[nonempty].numpy(),
        observations=rollouts.observations[recorded].numpy(),
        actions=actions.astype(action_space.dtype, copy=False),
        rewards=steps.rewards.numpy(),
        terminated=last[nonempty].numpy() > 0.5,
    )


def _new_storage(folder: Path, output: str, episodes: Episodes, metadata: dict[str, Any], horizon: int) -> Any:
    """An empty Minari data set that says what it is; its storage.

    Args:
        folder: Stands for Minari's own folder.
        output: Minari's id.
        episodes: The real data.
        metadata: What else to say.
        horizon: H.
    """
    box = episodes.observation_space
    with datasets_path(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari's wishes for an e-mail address and a link
        dataset = minari.create_dataset_from_buffers(
            output,
            [],
            env=episodes.env_spec,
            observation_space=gym.spaces.Box(box.low.astype(np.float32), box.high.astype(np.float32), dtype=np.float32),
            action_space=episodes.action_space,
            algorithm_name="DAWM world model",
            author="DAWM",
            description=(
                f"Imagined by a diffusion world model trained on {episodes.name}: rollouts of up to {horizon} steps "
                "from random real observations and actions; all later actions are inferred from the observations."
            ),
        )
    if episodes.reference is not None:
        metadata |= {"ref_min_score": episodes.reference.minimum, "ref_max_score": episodes.reference.maximum}
        metadata |= {SOURCE: f"those of {episodes.name} ({episodes.reference.source})"}
    dataset.storage.update_metadata(metadata)
    return dataset.storage
