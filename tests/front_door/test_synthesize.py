"""`synthesize` writes imagined transitions as a Minari data set that anything can read."""

import hashlib
import json
from pathlib import Path

import minari
import numpy as np
import pytest
from rich.console import Console

from dawm.cli import synthesize as export
from dawm.cli.main import main
from dawm.cli.synthesize import synthesize_dataset
from dawm.data.episodes import load_episodes
from dawm.data.sources.catalog import dataset_folder, local_datasets
from dawm.errors import UserError
from dawm.synthesis import guards

WIDE = {"margin": 10.0}  # a world model of 20 updates imagines much that is out of range


def synthesize(run, output, transitions=1000, **options):
    synthesize_dataset(Console(quiet=True), run, output, transitions, **WIDE | options)
    return minari.load_dataset(output)


def content(output: str) -> bytes:
    return (dataset_folder(output) / "data" / "main_data.hdf5").read_bytes()


def test_command_line_writes_a_minari_data_set(hopper, finished_run, capsys):
    output = "imagined/hopper/test-v0"
    command = ["synthesize", "--run", str(finished_run), "--output", output, "--transitions", "1000", "--margin", "10"]
    assert main([*command, "--target_return", "LiftedReturn", "--target_return.lift", "0.5"]) == 0
    assert "1,000 transitions" in capsys.readouterr().out
    dataset, real = minari.load_dataset(output), minari.load_dataset(hopper)
    assert dataset.total_steps == 1000
    assert dataset.action_space == real.action_space
    assert dataset.observation_space == real.observation_space
    assert dataset.env_spec.id == real.env_spec.id == "Hopper-v5"
    assert output in minari.list_local_datasets()

    rows = load_episodes(hopper).transitions
    starts = {tuple(row) for row in np.concatenate([rows.observations, rows.actions], axis=1).round(4).tolist()}
    terminated = 0
    for episode in dataset.iterate_episodes():
        assert 1 <= len(episode) <= 3
        assert len(episode.observations) == len(episode) + 1
        start = np.concatenate([episode.observations[0], episode.actions[0]])
        assert tuple(start.round(4).tolist()) in starts, "a rollout starts with a real observation and action"
        assert all(dataset.action_space.contains(action) for action in episode.actions)
        assert not episode.terminations[:-1].any()
        assert not episode.truncations[:-1].any()
        assert episode.terminations[-1] != episode.truncations[-1]
        terminated += episode.terminations[-1]
    episodes = load_episodes(output)
    assert len(episodes) == 1000
    assert len(episodes.ends) == dataset.total_episodes
    assert episodes.transitions.terminations.sum() == terminated
    assert episodes.reference.agrees_with(load_episodes(hopper).reference)

    metadata = local_datasets()[output]
    told = metadata["synthesis"]
    stages = json.loads((finished_run / "results.json").read_text())["stages"]
    for stage in ("world_model", "inverse_dynamics"):
        assert told[stage] == hashlib.sha256(Path(stages[stage]["checkpoint"]).read_bytes()).hexdigest()
    assert told["counts"]["kept"] == 1000
    assert told["target_return"] == {"class_path": "dawm.synthesis.rollouts.LiftedReturn", "lift": 0.5}
    assert told["sampler"]["num_steps"] == 6
    assert (
        told.items() >= {"run": str(finished_run), "dataset": hopper, "seed": 0, "guidance": 1.0, "horizon": 3}.items()
    )
    assert metadata["algorithm_name"] == "DAWM world model"
    assert metadata["author"] == ["DAWM"]
    assert hopper in metadata["description"]

    assert main(command) == 2
    assert f"{output} is there already" in capsys.readouterr().err
    before = content(output)
    assert main([*command, "--seed", "1", "--overwrite", "true"]) == 0
    assert local_datasets()[output]["synthesis"]["seed"] == 1
    assert content(output) != before


class Interrupting:
    """Rolls out a number of chunks, then the user presses Ctrl-C."""

    def __init__(self, monkeypatch, chunks):
        self.chunks, self.asked, self.roll_out = chunks, [], export.roll_out
        monkeypatch.setattr(export, "roll_out", self)

    def __call__(self, world_model, inverse_dynamics, observations, *args, **kwargs):
        if len(self.asked) == self.chunks:
            raise KeyboardInterrupt
        self.asked.append(len(observations))
        return self.roll_out(world_model, inverse_dynamics, observations, *args, **kwargs)


def test_interrupted_and_continued_equals_uninterrupted(hopper, finished_run, monkeypatch):
    """Also when it is killed while it writes; meanwhile there is no such data set, and other settings are refused."""
    monkeypatch.setattr(export, "CHUNK", 100)
    monkeypatch.setattr(export, "FEWEST", 20)
    whole, parted = "imagined/whole-v0", "imagined/parted-v0"
    with monkeypatch.context() as patch:
        never = Interrupting(patch, None)
        synthesize(finished_run, whole)
    second = [tuple(episode.observations[1]) for episode in minari.load_dataset(whole).iterate_episodes()]
    assert len(set(second)) == len(second), "no chunk repeats another"
    assert max(never.asked) == never.asked[0] == 100, "memory holds one chunk"
    assert len(never.asked) >= 4

    with monkeypatch.context() as patch:
        Interrupting(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            synthesize(finished_run, parted)
    assert parted not in minari.list_local_datasets()
    with pytest.raises(UserError, match=r"begun with guidance 1\.0, not 1\.5"):
        synthesize(finished_run, parted, guidance=1.5)

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        resumed = Interrupting(patch, None)
        patch.setattr(export, "write_episodes", die)
        with pytest.raises(KeyboardInterrupt):
            synthesize(finished_run, parted)
    assert resumed.asked == never.asked[2:]
    assert parted not in minari.list_local_datasets()
    with monkeypatch.context() as patch:
        written = Interrupting(patch, 0)
        synthesize(finished_run, parted)
    assert written.asked == []
    assert content(parted) == content(whole)
    counts = [local_datasets()[output]["synthesis"]["counts"] for output in (whole, parted)]
    assert counts[0] == counts[1]
    assert not list(dataset_folder().glob(".dawm-*")), "nothing is left over"


def test_seed_and_sampler_decide_what_is_imagined(hopper, finished_run):
    contents = []
    for number, options in enumerate(({}, {}, {"seed": 1}, {"num_steps": 3})):
        synthesize(finished_run, f"imagined/seed-v{number}", 300, **options)
        contents.append(content(f"imagined/seed-v{number}"))
    assert contents[0] == contents[1]
    assert len(set(contents)) == 3


def test_mistakes_are_told_in_a_line(hopper, finished_run, tmp_path):
    real_only = tmp_path / "real-only"
    real_only.mkdir()
    results = json.loads((finished_run / "results.json").read_text())
    results["stages"] = {"agent": results["stages"]["agent"]}
    (real_only / "results.json").write_text(json.dumps(results))
    (real_only / "config.yaml").write_text((finished_run / "config.yaml").read_text())
    for options, told in (
        ({"run": tmp_path}, "results.json"),
        ({"run": real_only}, "learnt from real data alone"),
        ({"output": "no version"}, "not a Minari id"),
        ({"output": hopper}, "would look like one of the embedded"),
        ({"transitions": 0}, "transitions is 0"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"device": "abacus"}, "device: 'abacus'"),
    ):
        arguments = {"run": finished_run, "output": "imagined/mistake-v0"} | options
        with pytest.raises(UserError, match=told) as error:
            synthesize(**arguments)
        assert "\n" not in str(error.value)


def test_nothing_worth_keeping_is_an_error_and_not_an_endless_loop(hopper, finished_run, monkeypatch):
    monkeypatch.setattr(guards, "observation_bounds", lambda low, high, margin: (high + 1e6, high + 2e6))
    with pytest.raises(UserError, match=r"all imagined rows were dropped \(.*out_of_range"):
        synthesize(finished_run, "imagined/nothing-v0", 300)
    assert not list(dataset_folder().glob(".dawm-*"))
