"""What is wrong with the evaluation environment is one line of `fit` before the first stage, not after hours."""

import json
import sys

import gymnasium as gym
import numpy as np
import pytest
import yaml
from minari import create_dataset_from_buffers
from minari.data_collector import EpisodeBuffer
from own_environments import Drift, register

from dawm.cli.main import main

pytestmark = [
    pytest.mark.usefixtures("fresh_registry"),
    pytest.mark.filterwarnings("ignore:.*(set to None|env_spec is None):UserWarning"),
]


@pytest.fixture
def drifts(tmp_path) -> str:
    """Id of a data set of the environment `Drift`, with actions of two numbers in [-1, 1] and episodes of 20 steps."""
    generator = np.random.default_rng(0)
    episodes = [
        EpisodeBuffer(
            observations=generator.normal(size=(21, 2)),
            actions=generator.uniform(-1, 1, (20, 2)).astype(np.float32),
            rewards=generator.normal(size=20),
            terminations=np.zeros(20, bool),
            truncations=np.arange(20) == 19,
        )
        for _ in range(8)
    ]
    create_dataset_from_buffers("own/drift-v0", episodes, observation_space=Drift().observation_space,
                                action_space=Drift().action_space, algorithm_name="none")  # fmt: skip
    return "own/drift-v0"


@pytest.fixture
def fit(drifts, tmp_path, capsys):
    """Runs the agent's stage alone, with further options, and gives the exit status and what was printed as errors."""
    config = {
        "output_dir": str(tmp_path / "run"),
        "final_episodes": 2,
        "data": {"dataset": drifts, "env_id": "Drift-v0", "batch_size": 16, "updates_per_step": 5,
                 "synthetic_fraction": 0},
        "agent": {"class_path": "TD3BC", "init_args": {"hidden": [16, 16]}},
        "trainer": {"accelerator": "cpu", "devices": 1},
        "stages": {"agent": {"max_steps": 10}},
    }  # fmt: skip
    path = tmp_path / "drift.yaml"
    path.write_text(yaml.safe_dump(config))

    def run(*options: str) -> tuple[int, str]:
        status = main(["fit", "--config", str(path), *options])
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"limit": None}, ["--data.max_episode_steps: got None, expected a time limit", "'Drift-v0'"]),
        ({"spaces": {"action_space": gym.spaces.Box(5, 9, (2,))}}, ["--data.env_id", "5 to 9", "-1 to 1"]),
        ({"reward": lambda value: np.array([value, value])}, ["--data.env_id: got 'Drift-v0'", "expected a number"]),
        ({"terminated": lambda value: None}, ["--data.env_id: got 'Drift-v0'", "terminated None", "a boolean"]),
        ({"observation": lambda value: 1 / 0}, ["--data.env_id: got 'Drift-v0'", "step fails (ZeroDivisionError"]),
    ],
)
def test_one_line_before_the_first_stage(fit, tmp_path, settings, parts):
    register(**settings)
    status, errors = fit()
    assert status == 2
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1
    assert all(part in errors for part in parts), errors
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_recorded_actions_are_what_is_played(fit, tmp_path):
    """The environment takes actions twice as large as those of the data, and tells the largest it is given."""
    played = []

    class Wide(Drift):
        def __init__(self):
            super().__init__(spaces={"action_space": gym.spaces.Box(-2, 2, (2,), np.float32)})

        def step(self, action):
            played.append(np.abs(action).max())
            return super().step(action)

    register(entry_point=Wide)
    status, _ = fit("--agent.alpha", "1000")  # an actor that seeks large values only
    assert status == 0
    assert 0.5 < max(played) <= 1


@pytest.mark.parametrize(
    "registered",
    [
        "entry_point=Drift",
        "entry_point=lambda **options: Drift(**options)",
        "entry_point='own_environments:Drift', kwargs={'goal': numpy.zeros(2)}",
    ],
)
def test_a_run_in_an_environment_of_any_registration(fit, tmp_path, monkeypatch, capsys, registered):
    source = (
        "import gymnasium, numpy\nfrom own_environments import Drift\n"
        f"gymnasium.register('Own-v0', {registered}, max_episode_steps=20)"
    )
    (tmp_path / "drifting.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "drifting", raising=False)
    assert fit("--data.env_id", "drifting:Own-v0")[0] == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    # as in another process, which has not imported the module
    monkeypatch.delitem(sys.modules, "drifting")
    del gym.registry["Own-v0"]
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--episodes", "2"]) == 0
    assert f"return {results['agent']['return']['mean']:.1f}" in capsys.readouterr().out


def test_the_environment_of_a_callback_is_checked_too(fit, tmp_path):
    register()
    callback = "[{class_path: EvaluateInEnvironment, init_args: {every_n_steps: 10, env_id: Hopper-v5}}]"
    status, errors = fit(f"--stages.agent.callbacks={callback}")
    assert status == 2
    assert "EvaluateInEnvironment.env_id: got 'Hopper-v5' with observations of 11 numbers" in errors
