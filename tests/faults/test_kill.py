"""A run that is killed at any moment, and started again until it finishes, ends as one that never stopped.

Moments are random: somewhere in a process's start, its updates, validations, refills, evaluations, or in the writing
of a checkpoint, which here comes every few updates. The default suite kills once in every stage; ``-m slow`` does 30
kills.
"""

import json
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import yaml

from dawm.cli.main import main

STAGES = ("world_model", "inverse_dynamics", "agent")


def start(config: Path, folder: Path) -> ForkServerProcess:
    output = folder.parent / f"{folder.name}.txt"
    return processes.start(["fit", "--config", str(config), "--output_dir", str(folder)], output, output)


def begun(folder: Path, stage: str) -> bool:
    """Whether a run has come to a stage."""
    if stage == "world_model":
        return folder.exists()
    return any((folder / STAGES[STAGES.index(stage) - 1]).glob("*/complete.json"))


def never_stopped(config: Path, folder: Path) -> dict[str, float]:
    """Runs to the end; seconds of each stage, and of the start before them."""
    beginning = before = time.monotonic()
    seconds = {}
    process = start(config, folder)
    for key, stage in zip(("start", *STAGES), (*STAGES, None)):
        while process.is_alive() and not (stage and begun(folder, stage)):
            time.sleep(0.002)
        seconds[key] = time.monotonic() - before
        before = time.monotonic()
    assert process.exitcode == 0, (folder.parent / f"{folder.name}.txt").read_text()[-3000:]
    assert before - beginning < 100
    return seconds


def killed(config: Path, folder: Path, seconds: dict[str, float], seed: int) -> list[str]:
    """Runs to the end with a kill in every stage; what the kills hit, as far as it can be seen."""
    moments, hits = random.Random(seed), []
    for stage in STAGES:
        early = begun(folder, stage)  # a kill in an earlier stage's end: nothing to wait for but the start
        process = start(config, folder)
        while process.is_alive() and not (early or begun(folder, stage)):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.9 * seconds[stage] + early * seconds["start"]))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            half = any(folder.glob("*/*/.*.partial"))
            hits.append(f"{stage}, writing a checkpoint" if half else stage)
    process = start(config, folder)
    process.join(100)
    assert process.exitcode == 0, (folder.parent / f"{folder.name}.txt").read_text()[-3000:]
    return hits


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Where two nested values differ, bit for bit; seconds may."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return [f"{place}: keys {ours.keys() ^ theirs.keys()}"]
        pairs = ((f"{place}.{key}", ours[key], theirs[key]) for key in ours if key != "seconds")
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            return [f"{place}: {len(ours)} and {len(theirs)} entries"]
        pairs = ((f"{place}[{i}]", *pair) for i, pair in enumerate(zip(ours, theirs)))
    elif isinstance(ours, torch.Tensor):
        same = torch.equal(ours.contiguous().view(-1).view(torch.uint8), theirs.contiguous().view(-1).view(torch.uint8))
        return [] if same else [place]
    else:
        return [] if ours == theirs else [f"{place}: {ours} and {theirs}"]
    return [line for pair in pairs for line in differences(pair[1], pair[2], pair[0])]


def compare(folder: Path, whole: Path) -> None:
    """Weights, optimisers, random states, counters of callbacks and loops, and scores."""
    ours, theirs = results(folder), results(whole)
    assert differences(ours["agent"], theirs["agent"]) == []
    for stage in STAGES:
        checkpoints = [torch.load(run["stages"][stage]["checkpoint"], weights_only=True) for run in (ours, theirs)]
        assert differences(*checkpoints) == [], stage
        assert differences(*(run["stages"][stage]["metrics"] for run in (ours, theirs))) == [], stage


@pytest.fixture
def busy(smoke) -> Path:
    """An experiment that writes checkpoints, validates, imagines and evaluates all the time."""
    config = yaml.safe_load(smoke.read_text())
    stages = config["stages"]
    for name in ("world_model", "inverse_dynamics"):
        stages[name] = {"max_steps": 60, "validate_every_n_steps": 10, "checkpoint_every_n_steps": 5, "patience": 5}
    stages["agent"] |= {"max_steps": 60, "checkpoint_every_n_steps": 5}
    smoke.write_text(yaml.safe_dump(config))
    return smoke


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_at_random_moments_equals_never_stopped(busy, tmp_path, seed, record_property):
    whole = tmp_path / "whole"
    seconds = never_stopped(busy, whole)
    for attempt in range(5):
        folder = tmp_path / f"killed{attempt}"
        hits = killed(busy, folder, seconds, 100 * attempt + seed)
        compare(folder, whole)
        if len(hits) == len(STAGES):  # a machine that has become faster may finish before the last kill
            break
    record_property("hits", hits)
    print("kills hit:", hits)
    assert len(hits) == len(STAGES)


def test_killed_right_after_stopping_early_does_not_train_on(smoke, tmp_path):
    """The stage's last checkpoint is written, but nothing says yet that the stage is complete."""
    config = yaml.safe_load(smoke.read_text())
    config["inverse_dynamics"]["init_args"]["learning_rate"] = 0.0  # no validation is better than the first
    config["stages"]["inverse_dynamics"] |= {"max_steps": 60, "patience": 1}
    smoke.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(smoke)]) == 0
    before = results(tmp_path / "run")
    assert before["stages"]["inverse_dynamics"]["steps"] == 20
    for path in (tmp_path / "run").glob("*/*/complete.json"):
        path.unlink()
    assert main(["fit", "--config", str(smoke)]) == 0
    assert differences(results(tmp_path / "run"), before) == []
