"""A run leaves no file handle, thread, process, signal handler or open environment behind, however it ends."""

import os
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import yaml

from dawm.agents import TD3BC
from dawm.cli.main import main

ENDING = '''
import os, signal

from dawm.agents import TD3BC


class Ending(TD3BC):
    """Ends its run in the middle of the updates of one training step, between two refills."""

    def __init__(self, how: str, **kwargs):
        super().__init__(**kwargs)
        self.how = how

    def update(self, batch):
        metrics = super().update(batch)
        if self.update_index == 17:
            if self.how == "error":
                raise ValueError("the update's own error")
            if self.how == "not finite":
                metrics["critic_loss"] = metrics["critic_loss"] * float("nan")
            if self.how.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, self.how))
        return metrics
'''
RAISING = '''
import lightning as L


class Raise(L.Callback):
    """A user's callback that fails."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 15:
            raise ValueError("the callback's own error")
'''


def descriptors() -> list[str]:
    """What each open file descriptor is; pipes and sockets without their numbers, which are always new."""
    targets = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            targets.append(re.sub(r":\[\d+\]", "", os.readlink(f"/proc/self/fd/{entry}")))
        except FileNotFoundError:  # the descriptor that the folder itself was listed with
            continue
    return targets


def children() -> list[str]:
    """Names of this process's own processes, ended ones that nobody waited for among them."""
    names = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = path.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:  # it has just ended
            continue
        if int(rest.split()[1]) == os.getpid():
            names.append(name)
    return names


def native_threads() -> list[str]:
    """Names of all threads, those of libraries among them that Python does not know."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        try:
            names.append(path.read_text().strip())
        except OSError:  # it has just ended
            continue
    return names


def held() -> Counter[str]:
    """All that this process holds, once nothing changes: a thread that has ended stays listed for a moment."""
    now, before = read(), None
    for _ in range(50):
        if now == before:
            break
        time.sleep(0.2)
        now, before = read(), now
    return now


def read() -> Counter[str]:
    """All that this process holds at the moment."""
    return Counter(
        [f"file {target}" for target in descriptors()]
        + [f"thread {thread.name}" for thread in threading.enumerate()]
        + [f"native thread {name}" for name in native_threads()]
        + [f"process {name}" for name in children()]
    )


def assert_nothing_is_left(run, tmp_path: Path) -> None:
    """Compares what is held after one run and after another: what libraries open once does not count.

    Args:
        run: Does one run; called with the options of the command line that make it another one.
        tmp_path: Where the runs go.
    """
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(["--output_dir", str(tmp_path / "first"), "--seed_everything", "1"])
    before = held()
    run(["--output_dir", str(tmp_path / "second"), "--seed_everything", "2"])
    after = held()
    assert not after - before, f"left behind: {dict(after - before)}"
    assert not before - after, f"left behind by the first run alone: {dict(before - after)}"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def change(smoke: Path, **settings) -> None:
    """Sets keys of the experiment's config, such as ``stages.agent.max_steps``."""
    config = yaml.safe_load(smoke.read_text())
    for key, value in settings.items():
        *groups, last = key.split(".")
        group = config
        for name in groups:
            group = group[name]
        group[last] = value
    smoke.write_text(yaml.safe_dump(config))


def test_a_finished_run_leaves_nothing(smoke, tmp_path):
    def run(options):
        assert main(["fit", "--config", str(smoke), *options]) == 0

    assert_nothing_is_left(run, tmp_path)


@pytest.mark.parametrize(
    ("how", "code"), [("error", None), ("not finite", 2), ("SIGINT", 130), ("SIGTERM", 130)]
)  # fmt: skip
def test_a_run_that_ends_in_the_middle_leaves_nothing(smoke, tmp_path, monkeypatch, how, code):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("only the main thread may handle signals")
    (tmp_path / "ending_agent.py").write_text(ENDING)
    monkeypatch.syspath_prepend(str(tmp_path))
    change(smoke, agent={"class_path": "ending_agent.Ending", "init_args": {"hidden": [16, 16], "how": how}})

    def run(options):
        if code is None:
            with pytest.raises(ValueError, match="the update's own error"):
                main(["fit", "--config", str(smoke), *options])
        else:
            assert main(["fit", "--config", str(smoke), *options]) == code

    assert_nothing_is_left(run, tmp_path)


@pytest.mark.parametrize("stage", ["world_model", "agent"])
def test_a_run_that_a_callback_ends_leaves_nothing(smoke, tmp_path, monkeypatch, stage):
    (tmp_path / "raising_callback.py").write_text(RAISING)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = yaml.safe_load(smoke.read_text())
    config["stages"][stage].setdefault("callbacks", []).append({"class_path": "raising_callback.Raise"})
    smoke.write_text(yaml.safe_dump(config))

    def run(options):
        with pytest.raises(ValueError, match="the callback's own error"):
            main(["fit", "--config", str(smoke), *options])

    assert_nothing_is_left(run, tmp_path)


class Counted(gym.Env):
    """An environment of Hopper's sizes that knows how many of it are open; one method fails at its n-th call."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (11,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
    open: ClassVar = 0
    most: ClassVar = 0  # open at the same time
    calls: ClassVar[dict[str, int]] = {}  # calls that still go well

    def __init__(self):
        Counted.open += 1
        Counted.most = max(Counted.most, Counted.open)

    def reset(self, *, seed=None, options=None):
        fail_in_the_end("reset")
        return np.zeros(11), {}

    def step(self, action):
        fail_in_the_end("step")
        return np.zeros(11), 1.0, False, False, {}

    def close(self):
        Counted.open -= 1


def fail_in_the_end(method: str) -> None:
    Counted.calls[method] = Counted.calls.get(method, 1000) - 1
    if Counted.calls[method] < 0:
        raise ValueError(f"{method} fails")


@pytest.fixture
def counted(monkeypatch):
    """Id of the environment that counts."""
    for name, value in {"open": 0, "most": 0, "calls": {}}.items():
        monkeypatch.setattr(Counted, name, value)
    gym.register("Counted-v0", entry_point=f"{__name__}:Counted", max_episode_steps=20)
    yield "Counted-v0"
    del gym.registry["Counted-v0"]


def evaluating(smoke: Path, scoring: bool, monkeypatch) -> None:
    """Makes the experiment a short one of the agent alone; its policy may fail, too.

    Args:
        smoke: The config.
        scoring: Evaluate after training only, or else during training, too.
        monkeypatch: Pytest's.
    """
    evaluate = {"class_path": "EvaluateInEnvironment", "init_args": {"every_n_steps": 5, "episodes": 2}}
    change(smoke, **{"data.synthetic_fraction": 0, "stages.agent.max_steps": 10,
                     "stages.agent.callbacks": [] if scoring else [evaluate]})  # fmt: skip
    act = TD3BC.act

    def failing(*args, **kwargs):
        fail_in_the_end("act")
        return act(*args, **kwargs)

    monkeypatch.setattr(TD3BC, "act", failing)


@pytest.mark.parametrize("scoring", [False, True], ids=["callback", "last scoring"])
@pytest.mark.parametrize(("method", "calls"), [("act", 7), ("step", 17), ("reset", 2)])
def test_environments_are_closed_when_an_evaluation_fails(smoke, monkeypatch, capsys, counted, scoring, method, calls):
    """In the middle of an episode, or at the second of two resets, after the check's ten steps and one reset."""
    evaluating(smoke, scoring, monkeypatch)
    Counted.calls[method] = calls
    command = ["fit", "--config", str(smoke), "--data.env_id", counted]
    if method == "act":
        with pytest.raises(ValueError, match="act fails"):
            main(command)
    else:
        assert main(command) == 2
        assert f"'Counted-v0' whose {method} fails (ValueError: {method} fails)" in capsys.readouterr().err
    assert Counted.most == 2, "one for each episode"
    assert Counted.open == 0


@pytest.mark.parametrize("scoring", [False, True], ids=["callback", "last scoring"])
def test_an_evaluation_that_fails_leaves_nothing(smoke, tmp_path, monkeypatch, counted, scoring):
    """In the data set's own environment."""
    evaluating(smoke, scoring, monkeypatch)

    def run(options):
        Counted.calls["act"] = 7
        with pytest.raises(ValueError, match="act fails"):
            main(["fit", "--config", str(smoke), *options])

    assert_nothing_is_left(run, tmp_path)
