"""Environments as users write them: those that can be played are, and every other ends in one line that names it."""

import subprocess
import sys
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import data_of
from gymnasium.envs.registration import EnvSpec
from own_environments import DATA, line_of, register, still

from dawm.agents import TD3BC
from dawm.data.sources.environments import describe_environment, environment_from
from dawm.data.sources.spaces import environment_spec
from dawm.data.transitions import Transitions
from dawm.evaluation.checks import check_environment
from dawm.evaluation.environments import make_environment
from dawm.evaluation.episodes import run_episodes

pytestmark = pytest.mark.usefixtures("fresh_registry")


# Episodes


def test_returns_are_those_of_gymnasium_s_own_loop():
    """Of a simulation with contacts, in which the last bit counts; some episodes terminate and others do not."""
    pytest.importorskip("mujoco")
    agent = TD3BC(11, 3)
    agent.fit_normalizers(data_of(Transitions(torch.randn(99, 11), *[torch.zeros(99)] * 4)))
    spec, seeds = replace(gym.spec("Hopper-v5"), max_episode_steps=105), range(12)
    env, returns, endings = gym.make(spec), [], set()
    for seed in seeds:
        (observation, _), total, over = env.reset(seed=seed), 0.0, False
        while not over:
            action = 0.1 * agent.act(torch.as_tensor(observation, dtype=torch.float32).expand(16, -1))[0]
            observation, reward, terminated, truncated, _ = env.step(action.numpy())
            total, over = total + reward, terminated or truncated
        returns.append(total)
        endings.add(terminated)
    env.close()
    assert len(set(returns)) == len(seeds)
    assert endings == {True, False}
    for num_envs in (1, 5, 12):
        assert run_episodes(lambda o: 0.1 * agent.act(o), spec, seeds, num_envs).tolist() == returns


def test_rewards_and_flags_of_one_entry_are_taken_as_one():
    expected = run_episodes(still, register(ends=7), range(3))
    for kind in (lambda v: np.array([v]), np.array, np.float32, torch.tensor):
        spec = register(ends=7, reward=kind)
        assert run_episodes(still, spec, range(3)) == pytest.approx(expected)
        check_environment(spec, **DATA)
    for kind in (np.bool_, np.array, lambda v: np.array([v])):
        spec = register(ends=7, terminated=kind, truncated=kind)
        assert run_episodes(still, spec, range(3)).tolist() == expected.tolist()
        check_environment(spec, **DATA)


def raises(error):
    def answer(value):
        raise error

    return answer


@pytest.mark.parametrize(
    ("answers", "parts"),
    [
        ({"reward": lambda v: np.array([v, v])}, ["whose step answers with reward array(", "expected a number"]),
        ({"reward": str}, ["reward '", "expected a number"]),
        ({"reward": lambda v: None}, ["reward None", "expected a number"]),
        ({"terminated": int}, ["terminated 0", "expected a boolean"]),
        ({"truncated": lambda v: np.zeros(2, bool)}, ["truncated array(", "expected a boolean"]),
        ({"truncated": lambda v: None}, ["truncated None", "expected a boolean"]),
        ({"observation": lambda v: v[None]}, ["observation of shape (1, 2)", "expected its observation space's (2,)"]),
        ({"observation": lambda v: v[:1]}, ["observation of shape (1,)"]),
        ({"first": lambda v: {"a": v}}, ["observation of shape ()"]),
        ({"first": raises(KeyError("goal"))}, ["whose reset fails (KeyError: 'goal')"]),
        ({"observation": raises(ValueError("bad\nnumbers"))}, ["whose step fails (ValueError: bad)"]),
    ],
)
def test_wrong_answers_are_named_at_the_check_and_when_played(answers, parts):
    spec = register(**answers)
    for line in (line_of(check_environment, spec, **DATA), line_of(run_episodes, still, spec, range(2))):
        assert line.startswith("--data.env_id: got 'Drift-v0'")
        assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("answers", "part"),
    [
        ({"reward": lambda v: np.nan}, "a reward of nan, expected finite numbers"),
        ({"observation": lambda v: v / 0}, "observations of "),
        ({"close": raises(OSError("no display"))}, "whose close fails (OSError: no display)"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_what_only_the_check_refuses(answers, part):
    assert part in line_of(check_environment, register(**answers), **DATA)


def test_what_cannot_be_made():
    for entry_point, reason in ((raises(RuntimeError("no licence")), "no licence"), (object, "gymnasium.Env")):
        line = line_of(check_environment, register(entry_point=lambda f=entry_point: f(1) if f is not object else f()),
                       **DATA)  # fmt: skip
        assert line.startswith("--data.env_id: got 'Drift-v0' (")
        assert reason in line
        assert "expected an environment that can be made" in line
    discrete = register(spaces={"action_space": gym.spaces.Discrete(3)})
    assert "with the actions Discrete(3), expected a flat Box of real" in line_of(make_environment, discrete)
    whole = register(spaces={"action_space": gym.spaces.Box(0, 9, (2,), np.int64)})
    assert "expected a flat Box of real numbers" in line_of(make_environment, whole)
    assert line_of(make_environment, "Drift-v9", env_id_key="env_id").startswith("--env_id: got 'Drift-v9'")


def test_a_time_limit_is_set_where_the_command_takes_one():
    keys = {"env_id": "max_episode_steps", "data.env_id": "data.max_episode_steps",
            "stages.agent.callbacks.EvaluateInEnvironment.env_id": "data.max_episode_steps"}  # fmt: skip
    for key, limit in keys.items():
        assert line_of(make_environment, "Drift-v0", 0, key).startswith(f"--{limit}: got 0, expected a whole number")


NAN_THRICE = """
import mujoco

from dawm.evaluation.environments import make_environment

for joint in range(3):
    env = make_environment("Hopper-v5").unwrapped
    env.reset(seed=0)
    env.data.qvel[joint] = float("nan")
    mujoco.mj_step(env.model, env.data)
"""


def test_mujoco_says_each_warning_once_and_leaves_no_file(tmp_path):
    pytest.importorskip("mujoco")
    done = subprocess.run([sys.executable, "-c", NAN_THRICE], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.count("huge value") == done.stderr.count("UserWarning: MuJoCo: ") == 1
    assert not list(tmp_path.iterdir())


# Descriptions


def module_of(tmp_path, monkeypatch, name, source):
    """Writes a user's own module, which this process has not imported yet."""
    monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize(
    "registered",
    [
        "entry_point=Drift",
        "entry_point=lambda **options: Drift(**options)",
        "entry_point='own_environments:Drift', kwargs={'goal': numpy.zeros(2)}",
        "entry_point='own_environments:Drift', kwargs={'goal': (1, 2)}",
        "entry_point='own_environments:Drift'",
    ],
)
def test_any_registration_is_played_described_and_made_again(tmp_path, monkeypatch, registered):
    source = (
        "import gymnasium, numpy\nfrom own_environments import Drift\n"
        f"gymnasium.register('Drift-v0', {registered}, max_episode_steps=20)"
    )
    module = module_of(tmp_path, monkeypatch, "own_envs", source)
    spec = environment_spec(f"{module}:Drift-v0")
    check_environment(spec, **DATA)
    expected = run_episodes(still, spec, range(2)).tolist()
    for description in (describe_environment(spec, f"{module}:Drift-v0"), describe_environment(spec)):
        assert isinstance(description, str)
        assert run_episodes(still, environment_from(description), range(2)).tolist() == expected
    # in a process that has not imported the module
    description = describe_environment(spec, f"{module}:Drift-v0")
    del gym.registry["Drift-v0"], sys.modules[module]
    again = make_environment(environment_from(description)).unwrapped
    assert type(again).__name__ == "Drift"
    goal = getattr(again, "goal", None)
    assert goal is None or type(goal) in (tuple, np.ndarray)


def test_descriptions_of_nothing_and_of_another_environment():
    assert describe_environment(None) is None
    assert environment_from(None, "Other-v0") == "Other-v0"
    assert line_of(environment_from, None).startswith("--env_id: got None, expected an environment")
    spec = gym.wrappers.TimeAwareObservation(gym.make(replace(gym.spec("Pendulum-v1"), kwargs={"g": 1.0}))).spec
    assert isinstance(environment_from(describe_environment(spec)), EnvSpec)
    assert environment_from(describe_environment(spec)) == spec


def test_specifications_of_names(tmp_path, monkeypatch):
    line = line_of(environment_spec, "Hoper-v5")
    assert line.startswith("--data.env_id: got 'Hoper-v5', expected an environment that Gymnasium knows; did you mean")
    assert "absent_package" in line_of(environment_spec, "absent_package:Drift-v0")
    module = module_of(tmp_path, monkeypatch, "broken_envs", "1 / 0")
    assert "to import (division by zero); install or mend it" in line_of(environment_spec, f"{module}:A-v0")
