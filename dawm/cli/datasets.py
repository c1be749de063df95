"""Look at data sets, build the embedded ones, import files: what ``python -m dawm datasets`` does.

Symbols: E episodes.
"""

from pathlib import Path
from typing import Any

import minari
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from dawm.data.episodes import read_recordings
from dawm.data.progress import progress_bar
from dawm.data.sources.catalog import EMBEDDED, REMOTE, dataset_folder, local_datasets
from dawm.data.sources.d4rl import D4RLSource
from dawm.data.sources.embedded import STEPS, build
from dawm.data.sources.minari import REPEATED, SOURCE
from dawm.data.sources.scores import ReferenceScores
from dawm.data.sources.source import Recording
from dawm.data.store.minari_writer import in_episodes, write_dataset
from dawm.data.store.staging import check_output
from dawm.errors import UserError, first_line
from dawm.files import expanded

__all__ = ["build_dataset", "import_file", "list_datasets", "show_dataset"]

_BINS = 10
_BAR = 40  # characters of the longest bar


def list_datasets(console: Console, remote: bool = False) -> None:
    """List the data sets on this machine, those that can be built, and those known to be on Minari's server.

    Args:
        console: Where to draw.
        remote: Ask the server for all that it has, with sizes; without, the names known to this version are listed.
    """
    try:
        server = minari.list_remote_datasets() if remote else dict.fromkeys(REMOTE, {})
    except Exception as error:  # the server's client raises errors of many libraries
        raise UserError(
            f"--remote: got no answer ({first_line(error)}), expected Minari's server; leave --remote out"
        ) from error
    local = local_datasets()
    columns = [Column(heading, overflow="fold") for heading in ("data set", "where")]
    columns += [Column(heading, justify="right") for heading in ("episodes", "steps", "size")]
    table = Table(*columns, title=f"data sets in {dataset_folder()}")
    for name, metadata in local.items():
        size = _megabytes(dataset_folder(name))
        if {"total_episodes", "total_steps"} <= metadata.keys():
            where = "built here" if name.startswith("embedded/") else "here"
            table.add_row(Text(name), where, f"{metadata['total_episodes']:,}", f"{metadata['total_steps']:,}", size)
        else:
            table.add_row(Text(name), "here, but not readable", "", "", size)
    table.add_section()
    for name in EMBEDDED:
        if f"{name}-v0" not in local:
            table.add_row(name, "can be built", "", f"about {STEPS:,}", "")
    table.add_section()
    for name, metadata in server.items():
        if name not in local:
            counts = [f"{int(metadata[key]):,}" if key in metadata else "" for key in ("total_episodes", "total_steps")]
            size = f"{float(metadata['dataset_size']):,.1f} MB" if "dataset_size" in metadata else ""
            table.add_row(name, "Minari's server", *counts, size)
    console.print(table)


def show_dataset(console: Console, dataset: str, env_id: str | None = None) -> None:
    """Show what a data set holds: sizes, returns, scores, spaces, values that are not finite.

    Args:
        console: Where to draw.
        dataset: A Minari id, an embedded id, the path of an HDF5 file in D4RL's layout, or several joined with +.
        env_id: Gymnasium environment of the data; None takes the data set's own.
    """
    recordings = read_recordings(dataset, env_id)
    returns = [recording.returns() for recording in recordings]
    for recording, own in zip(recordings, returns):
        console.print(Text(recording.source.name, style="bold"), _facts(recording, own), _histogram(own), sep="\n")
    if len(recordings) > 1:
        console.print(Text(f"together: {sum(len(recording.rewards) for recording in recordings):,} steps"))
        console.print(_histogram(np.concatenate(returns)))


def build_dataset(console: Console, name: str, seed: int = 0, overwrite: bool = False) -> None:
    """Build an embedded data set: real rollouts of the behaviour policies inside the package.

    Args:
        console: Where to draw.
        name: embedded/hopper/medium-replay, embedded/hopper/medium or embedded/hopper/expert.
        seed: Seed of the episodes' starts and of the actions' noise; another one than 0 becomes part of the name.
        overwrite: Build it again if it is there already.
    """
    dataset_id = build(name, seed, overwrite=overwrite)
    console.print(Text(f"{dataset_id} is ready in {dataset_folder(dataset_id)}"))


def import_file(
    console: Console, file: Path, output: str, env_id: str | None = None, reference_minimum: float | None = None,
    reference_maximum: float | None = None, overwrite: bool = False,
) -> None:  # fmt: skip
    """Turn an HDF5 file in D4RL's layout into a Minari data set with the same transitions.

    Args:
        console: Where to draw.
        file: The file.
        output: Minari id of the new data set, such as mine/hopper/medium-v0.
        env_id: Gymnasium id of its environment; None: known from one of D4RL's file names, else none.
        reference_minimum: Return that scores 0; None: D4RL's for its file names, else the environment's.
        reference_maximum: Return that scores 100.
        overwrite: Replace a data set of that name.
    """
    path, reference, low, high = expanded(file), None, reference_minimum, reference_maximum
    if low is not None or high is not None:
        if low is None or high is None or not low < high:
            raise UserError(
                f"--reference_minimum: got {low}, and {high} as --reference_maximum, expected a lower and a higher "
                "return; give both"
            )
        reference = ReferenceScores(low, high, source="given when imported")
    check_output(output, overwrite)
    if not path.is_file():
        raise UserError(f"file: got {file}, expected a file, but it does not exist; check the path")
    source = D4RLSource(path, str(file), env_id)
    if not source.count:
        raise UserError(f"file: got {file}, expected a complete step, but it has none; record some")
    metadata: dict[str, Any] = {} if source.has_next_observations else {REPEATED: True}
    if reference := reference or source.reference:
        metadata |= {"ref_min_score": reference.minimum, "ref_max_score": reference.maximum, SOURCE: reference.source}
    with progress_bar(f"Importing {path.name}", source.count) as bar:
        episodes, steps = write_dataset(
            output, in_episodes(source), env_spec=source.env_spec, observation_space=source.observation_space,
            action_space=source.action_space, metadata=metadata, author=None, overwrite=overwrite,
            description=f"Imported from {path.name}, an HDF5 file in D4RL's layout.",
            report=lambda done: bar.update(bar.task_ids[0], completed=done),
        )  # fmt: skip
    console.print(Text(f"{output}: {episodes:,} episodes, {steps:,} steps in {dataset_folder(output)}"))
    for defect in source.defects:
        console.print(Text(defect))
    if reference is None:
        console.print("it has no reference scores: set --reference_minimum and --reference_maximum", highlight=False)


def _facts(recording: Recording, returns: NDArray[np.float64]) -> Table:
    """What there is to say about one recording in numbers; returns of shape (E,)."""
    returns, lengths = returns[np.isfinite(returns)], np.diff(recording.ends, prepend=0)
    columns = ("observations", "actions", "rewards", "next_observations")
    bad = {key: int((~np.isfinite(getattr(recording, key))).sum()) for key in columns}
    facts = {
        "episodes": f"{len(lengths):,}",
        "steps": f"{len(recording.rewards):,}",
        "returns": _range(returns),
        "score": _score(returns, recording.source.reference),
        "episode lengths": _range(lengths),
    }
    if len(lengths):
        rate = recording.terminations[recording.ends - 1].mean()
        facts["terminated"] = f"{rate:.1%} of the episodes; the others are truncated"
    facts |= {
        "environment": "not known" if recording.source.env_spec is None else recording.source.env_spec.id,
        "observations": " ".join(str(recording.source.observation_space).split()),
        "actions": " ".join(str(recording.source.action_space).split()),
        "NaN or infinite": ", ".join(f"{count:,} in {key}" for key, count in bad.items() if count) or "none",
    }
    facts["on disk"] = f"{_megabytes(recording.source.path)}, {recording.source.path}"
    table = Table(show_header=False, box=None)
    for heading, fact in facts.items():
        table.add_row(heading, Text(fact))
    return table


def _range(values: NDArray) -> str:
    if not len(values):
        return "none"
    return f"mean {values.mean():,.1f}, from {values.min():,.1f} to {values.max():,.1f}"


def _score(returns: NDArray, reference: ReferenceScores | None) -> str:
    """The data's mean return on the scale of 0 to 100, and the scale."""
    if reference is None:
        return "not known: no table has reference scores for it"
    scale = f"0 is {reference.minimum:,.1f}, 100 is {reference.maximum:,.1f}, from: {reference.source}"
    return f"{reference.normalize(float(returns.mean())):.1f} ({scale})" if len(returns) else f"none ({scale})"


def _histogram(returns: NDArray[np.float64]) -> Table:
    """Numbers of episodes by undiscounted return (E,), as bars; those that are not finite are left out."""
    table = Table(title="episodes by return", title_justify="left", show_header=False, box=None)
    finite = returns[np.isfinite(returns)]
    if not len(finite):
        return table
    varied = finite.max() > finite.min()
    counts, edges = np.histogram(finite, bins=_BINS if varied else 1)
    for count, low, high in zip(counts, edges, edges[1:]):
        span = f"{low:,.1f} to {high:,.1f}" if varied else f"{finite[0]:,.1f}"
        table.add_row(Text(span, justify="right"), "█" * -(-_BAR * count // counts.max()), Text(f"{count:,}"))
    return table


def _megabytes(path: Path) -> str:
    """Size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"
