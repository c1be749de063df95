"""Play the behaviour policies inside the package and record a Minari data set.

Symbols: O observation size, A action size.

* ``embedded/hopper/medium-replay`` plays six snapshots of one SAC run in the order of training, each for the same
  number of steps: from early stumbling to the last snapshot, as a replay buffer holds them.
* ``embedded/hopper/medium`` plays the last snapshot, which returns about a third of the expert.
* ``embedded/hopper/expert`` plays the expert.

The environment is Gymnasium's ``Hopper-v5``, the recorder Minari's ``DataCollector``, and all actions are sampled. The
same seed gives the same data, bit for bit, on the same machine and versions. Observations and rewards are stored in
single precision: these are the numbers that the policies saw, at half the size.
"""

import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer
from minari.data_collector.callbacks import StepDataCallback
from numpy.typing import NDArray
from safetensors.numpy import load

from dawm.data.store.staging import datasets_path

__all__ = ["MIXTURES", "record"]

MIXTURES = {
    "embedded/hopper/medium-replay": dict.fromkeys(
        ("step5000", "step20000", "step35000", "step70000", "step75000", "step77500"), 1 / 6
    ),
    "embedded/hopper/medium": {"step77500": 1.0},
    "embedded/hopper/expert": {"expert": 1.0},
}
"""For each data set the policies in the order of playing, with their shares of the steps."""

# Means over 100 episodes of uniformly random actions and over 30 of the deterministic expert, in Hopper-v5.
_REF_MIN_SCORE = 18.783593655902184
_REF_MAX_SCORE = 3276.3575732459253

_LAYERS = ("w0", "b0", "w1", "b1", "w2", "b2")


def record(
    folder: Path, name: str, dataset_id: str, seed: int, steps: int, report: Callable[[int], None] = lambda played: None
) -> None:
    """Play whole episodes and write them as a Minari data set.

    Args:
        folder: Where to write, in place of Minari's own folder.
        name: Key of `MIXTURES`.
        dataset_id: Minari's id of the result.
        seed: Seed of the episodes' starts and of the actions' noise.
        steps: Least number of steps.
        report: Called after each episode with the steps played so far.
    """
    environment = gym.make("Hopper-v5", disable_env_checker=True)
    with datasets_path(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari's wishes for an e-mail address and a link
        collector = _Collector(
            environment,
            step_data_callback=_SinglePrecision,
            observation_space=gym.spaces.Box(-np.inf, np.inf, environment.observation_space.shape, np.float32),
        )
        try:
            _play(collector, MIXTURES[name], steps, np.random.default_rng([seed, list(MIXTURES).index(name)]), report)
            shares = ", ".join(f"{policy} {share:.0%}" for policy, share in MIXTURES[name].items())
            collector.create_dataset(
                dataset_id,
                eval_env="Hopper-v5",
                algorithm_name="TQC expert" if "expert" in MIXTURES[name] else "SAC",
                author="DAWM",
                description=f"Rollouts of the behaviour policies in dawm, actions sampled, seed {seed}: {shares}.",
                ref_min_score=_REF_MIN_SCORE,
                ref_max_score=_REF_MAX_SCORE,
                num_episodes_average_score=30,
                requirements=["gymnasium>=1.1", "mujoco>=3.1"],
            )
        finally:
            collector.close()


def _play(
    collector: "_Collector",
    mixture: dict[str, float],
    steps: int,
    generator: np.random.Generator,
    report: Callable[[int], None],
) -> None:
    """Play each policy until its share of the steps is reached."""
    weights = load(files("dawm.data.sources").joinpath("policies", "hopper.safetensors").read_bytes())
    played, goal = 0, 0.0
    for policy, share in mixture.items():
        layers = [weights[f"{policy}.{key}"].astype(np.float32) for key in _LAYERS]
        goal += share * steps
        while played < round(goal):
            observation, _ = collector.reset(seed=int(generator.integers(2**31)))
            terminated = truncated = False
            while not (terminated or truncated):
                action = sample_action(layers, observation.astype(np.float32), generator)
                observation, _, terminated, truncated, _ = collector.step(action)
                played += 1
            report(min(played, steps))


def sample_action(
    layers: list[NDArray[np.float32]], observation: NDArray[np.float32], generator: np.random.Generator
) -> NDArray[np.float32]:
    """Action of a tanh-Gaussian policy, shape (A,).

    Args:
        layers: Weights, (inputs, outputs), and biases of three layers; the last one's outputs are the A means and the
            A logarithms of the standard deviations.
        observation: One raw observation, shape (O,).
        generator: Source of the noise.
    """
    w0, b0, w1, b1, w2, b2 = layers
    hidden = np.maximum(observation @ w0 + b0, 0.0)
    hidden = np.maximum(hidden @ w1 + b1, 0.0)
    output = hidden @ w2 + b2
    size = len(output) // 2
    noise = generator.standard_normal(size, dtype=np.float32)
    return np.tanh(output[:size] + np.exp(np.minimum(output[size:], 2.0)) * noise)


class _Buffer(EpisodeBuffer):
    """Minari's buffer of one episode, for flat arrays: its own imports jax, which only nested spaces need."""

    def add_step_data(self, step_data: Any) -> "_Buffer":
        self.observations.append(step_data["observation"])
        self.actions.append(step_data["action"])
        self.rewards.append(step_data["reward"])
        self.terminations.append(step_data["terminated"])
        self.truncations.append(step_data["truncated"])
        return self


class _Collector(minari.DataCollector):
    """Minari's collector with the buffer above."""

    _buffer: EpisodeBuffer | None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        begun = self._buffer
        assert begun is not None
        self._buffer = _Buffer(id=begun.id, seed=seed, observations=[begun.observations], actions=[])
        return observation, info


class _SinglePrecision(StepDataCallback):
    """Store observations and rewards as float32."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step_data = super().__call__(*args, **kwargs)
        step_data["observation"] = step_data["observation"].astype(np.float32)
        if step_data["reward"] is not None:
            step_data["reward"] = np.float32(step_data["reward"])
        return step_data
