"""`synthesize` writes imagined transitions as a Minari data set that anything can read."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import minari
import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from dawm.callbacks import RegenerateRollouts
from dawm.cli import synthesize as export
from dawm.cli.main import main
from dawm.cli.synthesize import synthesize_dataset
from dawm.data.episodes import load_episodes
from dawm.data.module import TransitionDataModule
from dawm.data.sources.catalog import dataset_folder, local_datasets
from dawm.data.weights import TopShare
from dawm.errors import UserError
from dawm.synthesis.guards import Bounds
from dawm.synthesis.rollouts import Synthesizer
from dawm.synthesis.targets import QuantileReturn
from dawm.training.build import load_module

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
    reported = metadata["synthesis"]
    stages = json.loads((finished_run / "results.json").read_text())["stages"]
    for stage in ("world_model", "inverse_dynamics"):
        assert reported[stage] == hashlib.sha256(Path(stages[stage]["checkpoint"]).read_bytes()).hexdigest()
    assert reported["counts"]["kept"] == 1000
    assert reported["target_return"] == {"class_path": "dawm.synthesis.targets.LiftedReturn", "lift": 0.5}
    assert reported["sampler"]["num_steps"] == 6
    assert (
        reported.items()
        >= {"run": str(finished_run), "dataset": hopper, "seed": 0, "guidance": 1.0, "horizon": 3}.items()
    )
    assert metadata["algorithm_name"] == "DAWM world model"
    assert metadata["author"] == ["DAWM"]
    assert hopper in metadata["description"]

    assert main(command) == 2
    assert output in (error := capsys.readouterr().err)
    assert "--overwrite true" in error
    before = content(output)
    assert main([*command, "--seed", "1", "--overwrite", "true"]) == 0
    assert local_datasets()[output]["synthesis"]["seed"] == 1
    assert content(output) != before


def test_an_interrupted_command_leaves_nothing_and_starts_again(hopper, finished_run, monkeypatch):
    """Memory holds one chunk, no chunk repeats another, and no data set is there until all are written."""
    monkeypatch.setattr(export, "CHUNK", 100)
    monkeypatch.setattr(export, "FEWEST", 20)
    synthesize(finished_run, "imagined/whole-v0")
    asked, rollouts, folder = [], Synthesizer.rollouts, dataset_folder("imagined/parted-v0")

    def interrupted(self, data, count, *args, **kwargs):
        assert not folder.exists()
        asked.append(count)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return rollouts(self, data, count, *args, **kwargs)

    monkeypatch.setattr(Synthesizer, "rollouts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthesize(finished_run, "imagined/parted-v0")
    assert not list(dataset_folder().rglob("*parted*"))
    assert not list(dataset_folder().glob(".dawm-*")), "nothing is left over"
    dataset = synthesize(finished_run, "imagined/parted-v0")
    second = [tuple(episode.observations[1]) for episode in dataset.iterate_episodes()]
    assert len(set(second)) == len(second)
    assert len(asked) >= 7
    assert max(asked) == 100
    assert content("imagined/parted-v0") == content("imagined/whole-v0")


AIMING = {"class_path": "dawm.synthesis.targets.QuantileReturn", "init_args": {"quantile": 0.95}}
LEARNT_FROM = {"target_return": AIMING, "guidance": 1.5, "margin": 10.0, "max_disagreement": 0.3, "seed": 0}
RELABELLED = {
    **{"first_action": "policy", "first_action_noise": 0.2, "labels": "forward"},
    **{"max_inconsistency": 1.0, "max_forward_disagreement": 1.0},
    "starts": {"class_path": "dawm.data.weights.TopShare", "init_args": {"share": 0.5}},
}
ACTED = {
    **{"imagination": "ensemble", "first_action": "policy", "starts": RELABELLED["starts"]},
    **{"guidance": 1.0, "max_disagreement": None},
}


@pytest.fixture(params=[{}])
def aiming_run(finished_run, tmp_path, request):
    """The finished run, with a callback in its config as `fit` writes it."""
    run = tmp_path / "aiming"
    shutil.copytree(finished_run, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    callback = {
        "class_path": "dawm.callbacks.RegenerateRollouts",
        "init_args": {"every_n_steps": 5, **LEARNT_FROM, **request.param},
    }
    config["stages"]["agent"]["callbacks"] = [callback]
    config["seed_everything"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


@pytest.mark.parametrize("aiming_run", [{}, RELABELLED, ACTED], indirect=True, ids=["plain", "relabelled", "acted"])
def test_by_default_it_makes_what_the_runs_agent_learnt_from(hopper, aiming_run, request):
    """The same settings and the same transitions as a refill by the trained agent, bit for bit."""
    more = request.node.callspec.params["aiming_run"]
    output, count = f"imagined/same-{request.node.callspec.id}-v0", 334  # three steps each
    synthesize_dataset(Console(quiet=True), aiming_run, output, transitions=1000)
    written, reported = load_episodes(output).transitions, local_datasets()[output]["synthesis"]
    assert reported["target_return"] == {"class_path": AIMING["class_path"], **AIMING["init_args"]}
    plain = {"guidance": 1.5, "margin": 10.0, "max_disagreement": 0.3} | {
        k: v for k, v in more.items() if k != "starts"
    }
    assert {key: reported[key] for key in plain} == plain
    assert reported["starts"] == (more and {"class_path": "dawm.data.weights.TopShare", "share": 0.5} or None)
    assert reported["sampler"]["num_steps"] == 6
    assert set(reported["chosen_by"].values()) == {"run"}
    assert {"uncertain", "out_of_range"} < reported["counts"].keys()

    stages = json.loads((aiming_run / "results.json").read_text())["stages"]
    models = [load_module(Path(stages[name]["checkpoint"])) for name in ("world_model", "inverse_dynamics")]
    objects = {"target_return": QuantileReturn(0.95), "starts": TopShare(0.5) if more else None}
    callback = RegenerateRollouts(5, count, **LEARNT_FROM | more | objects)
    callback.connect(*models)
    data = TransitionDataModule(hopper, horizon=3, updates_per_step=5, seed=3)
    agent = load_module(Path(stages["agent"]["checkpoint"]))
    trainer = SimpleNamespace(datamodule=data, global_step=0, global_rank=0, world_size=1, max_steps=10, loggers=[],
                              lightning_module=agent,
                              strategy=SimpleNamespace(root_device="cpu", all_gather=lambda x: x))  # fmt: skip
    callback.on_train_start(trainer, None)
    refilled = data.synthetic[:1000]
    assert len(refilled) > 100, "some steps may be dropped"
    torch.testing.assert_close(written[: len(refilled)].pack(), refilled.pack(), rtol=0, atol=1e-6)
    assert torch.equal(written.rewards[: len(refilled)], refilled.rewards)


@pytest.mark.parametrize(("noising", "starts"), [(None, "TopShare"), (0.5, "None")])
def test_starts_follow_the_weights_of_the_runs_real_rows(hopper, aiming_run, noising, starts):
    """But for recorded segments that are noised, which have starts of their own."""
    config = yaml.safe_load((aiming_run / "config.yaml").read_text())
    config["data"]["real_weights"] = RELABELLED["starts"]
    config["stages"]["agent"]["callbacks"][0]["init_args"]["noising"] = noising
    (aiming_run / "config.yaml").write_text(yaml.safe_dump(config))
    output = f"imagined/weighted-{starts.lower()}-v0"
    synthesize_dataset(Console(quiet=True), aiming_run, output, transitions=20)
    reported = local_datasets()[output]["synthesis"]
    assert str(reported["starts"] and reported["starts"]["class_path"]).split(".")[-1] == starts
    assert reported["chosen_by"]["starts"] == "run"


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (
            {"noising": 0.5},
            ["--first_action", "policy"],
            "--first_action: got 'policy', expected recorded, as recorded",
        ),
        ({"value_expansion": True}, [], "whose agent learnt from whole rollouts as one row each"),
    ],
)
def test_what_a_run_cannot_do_is_refused(hopper, aiming_run, made, options, message, capsys):
    config = yaml.safe_load((aiming_run / "config.yaml").read_text())
    config["stages"]["agent"]["callbacks"][0]["init_args"] |= made
    (aiming_run / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["synthesize", "--run", str(aiming_run), "--output", "imagined/refused-v0", "--transitions", "20"]
    assert main([*command, *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_options_override_the_runs_settings_and_the_metadata_say_so(hopper, aiming_run, monkeypatch):
    """The folder may be given with ~ and variables."""
    monkeypatch.setenv("HOME", str(aiming_run.parent))
    monkeypatch.setenv("RUN", aiming_run.name)
    command = ["synthesize", "--run", "~/$RUN", "--output", "imagined/over-v0", "--transitions", "20"]
    options = [
        "--labels",
        "forward",
        "--first_action",
        "policy",
        "--guidance",
        "1",
        "--max_disagreement",
        "2",
        "--num_steps",
        "2",
        "--target_return",
        "ConstantReturn",
    ]
    assert main([*command, *options, "--target_return.value", "9"]) == 0
    reported = local_datasets()["imagined/over-v0"]["synthesis"]
    assert reported["target_return"] == {"class_path": "dawm.synthesis.targets.ConstantReturn", "value": 9}
    assert (reported["guidance"], reported["max_disagreement"], reported["margin"]) == (1, 2, 10)
    assert reported["sampler"]["num_steps"] == 2
    chosen = {key for key, by in reported["chosen_by"].items() if by == "option"}
    assert chosen == {"target_return", "guidance", "max_disagreement", "num_steps", "labels", "first_action"}
    assert (reported["labels"], reported["first_action"]) == ("forward", "policy")
    assert {reported["chosen_by"][key] for key in ("margin", "starts", "max_inconsistency")} == {"run"}


def test_a_run_without_the_callback_gives_what_the_callback_makes_by_default(hopper, finished_run):
    dataset = synthesize(finished_run, "imagined/plain-v0", 20)
    reported = local_datasets()[dataset.spec.dataset_id]["synthesis"]
    assert (reported["guidance"], reported["max_disagreement"]) == (1, None)
    assert reported["target_return"] == {"class_path": "dawm.synthesis.targets.LiftedReturn", "lift": 0}
    others = {by for key, by in reported["chosen_by"].items() if key not in ("margin", "num_steps")}
    assert others == {"default"}
    assert (reported["chosen_by"]["margin"], reported["chosen_by"]["num_steps"]) == ("option", "run")


def test_seed_and_sampler_decide_what_is_imagined(hopper, finished_run):
    contents = []
    for number, options in enumerate(({}, {}, {"seed": 1}, {"num_steps": 3})):
        synthesize(finished_run, f"imagined/seed-v{number}", 300, **options)
        contents.append(content(f"imagined/seed-v{number}"))
    assert contents[0] == contents[1]
    assert len(set(contents)) == 3


def test_mistakes_are_reported_in_a_line(hopper, finished_run, tmp_path):
    real_only = tmp_path / "real-only"
    real_only.mkdir()
    results = json.loads((finished_run / "results.json").read_text())
    results["stages"] = {"agent": results["stages"]["agent"]}
    (real_only / "results.json").write_text(json.dumps(results))
    (real_only / "config.yaml").write_text((finished_run / "config.yaml").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "results.json").write_text((finished_run / "results.json").read_text())
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    config["stages"]["agent"]["callbacks"] = [{"class_path": "no_such_module.Callback", "init_args": {}}]
    (broken / "config.yaml").write_text(yaml.safe_dump(config))
    for options, reported in (
        ({"run": tmp_path}, "results.json"),
        ({"run": real_only}, "learnt from real data alone"),
        ({"output": "no version"}, "a Minari id"),
        ({"output": hopper}, "one of the embedded"),
        ({"transitions": 0}, "--transitions: got 0, expected at least 1"),
        ({"num_steps": 0}, "--num_steps: got 0"),
        ({"margin": -1.0}, "--margin: got -1.0"),
        ({"device": "abacus"}, "--device: got 'abacus'"),
        ({"run": broken}, "--run: got .*config.yaml, which cannot be read .*no_such_module"),
    ):
        arguments = {"run": finished_run, "output": "imagined/mistake-v0"} | options
        with pytest.raises(UserError, match=reported) as error:
            synthesize(**arguments)
        assert "\n" not in str(error.value)


def test_nothing_worth_keeping_is_an_error_and_not_an_endless_loop(hopper, finished_run, monkeypatch):
    monkeypatch.setattr(Bounds, "contain", lambda self, observations, rewards: torch.zeros_like(rewards).bool())
    with pytest.raises(UserError, match=r"--margin: got all 768 imagined steps dropped \(.*out_of_range"):
        synthesize(finished_run, "imagined/nothing-v0", 300)
    assert not list(dataset_folder().glob(".dawm-*"))
