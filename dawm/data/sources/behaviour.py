"""Play the behaviour policies inside the package.

Symbols: T steps of an episode, O observation size, A action size.

* ``embedded/hopper/medium-replay`` plays six snapshots of one SAC run in the order of training, each for the same
  number of steps: from early stumbling to the last snapshot, as a replay buffer holds them.
* ``embedded/hopper/medium`` plays the last snapshot, which returns about a third of the expert.
* ``embedded/hopper/expert`` plays the expert.

The environment is Gymnasium's ``Hopper-v5``, and all actions are sampled. The same seed gives the same data, bit for
bit, on the same machine and versions, in single precision: these are the numbers that the policies saw.
"""

from collections.abc import Iterator
from importlib.resources import files

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from dawm.data.store.minari_writer import EpisodeColumns

__all__ = ["MIXTURES", "play", "sample_action"]

_SNAPSHOTS = ("step5000", "step20000", "step35000", "step70000", "step75000", "step77500")
MIXTURES = {
    "embedded/hopper/medium-replay": dict.fromkeys(_SNAPSHOTS, 1 / 6),
    "embedded/hopper/medium": {"step77500": 1.0},
    "embedded/hopper/expert": {"expert": 1.0},
}
"""For each data set the policies in the order of playing, with their fractions of the steps."""

_LAYERS = ("w0", "b0", "w1", "b1", "w2", "b2")


def play(name: str, seed: int, steps: int) -> Iterator[EpisodeColumns]:
    """Play at least so many steps of one of `MIXTURES` in whole episodes, each policy until its fraction is reached."""
    generator = np.random.default_rng([seed, list(MIXTURES).index(name)])
    weights = load(files("dawm.data.sources").joinpath("policies", "hopper.safetensors").read_bytes())
    played, goal = 0, 0.0
    with gym.make("Hopper-v5", disable_env_checker=True) as environment:
        for policy, fraction in MIXTURES[name].items():
            layers = [weights[f"{policy}.{key}"].astype(np.float32) for key in _LAYERS]
            goal += fraction * steps
            while played < round(goal):
                episode = _episode(environment, layers, generator)
                played += len(episode.rewards)
                yield episode


def _episode(environment: gym.Env, layers: list[NDArray], generator: np.random.Generator) -> EpisodeColumns:
    observation, _ = environment.reset(seed=int(generator.integers(2**31)))
    observations, actions, rewards = [observation.astype(np.float32)], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        actions.append(sample_action(layers, observations[-1], generator))
        observation, reward, terminated, truncated, _ = environment.step(actions[-1])
        observations.append(observation.astype(np.float32))
        rewards.append(reward)
    columns = np.stack(observations), np.stack(actions), np.array(rewards, np.float32)
    return EpisodeColumns(np.array([len(rewards)]), *columns, np.array([terminated]))


def sample_action(
    layers: list[NDArray[np.float32]], observation: NDArray[np.float32], generator: np.random.Generator
) -> NDArray[np.float32]:
    """Action of a tanh-Gaussian policy, shape (A,), at one raw observation, shape (O,).

    ``layers`` are weights, (inputs, outputs), and biases of three layers; the last one's outputs are the A means and
    the A logarithms of the standard deviations.
    """
    w0, b0, w1, b1, w2, b2 = layers
    hidden = np.maximum(observation @ w0 + b0, 0.0)
    hidden = np.maximum(hidden @ w1 + b1, 0.0)
    output = hidden @ w2 + b2
    means, log_stds = np.split(output, 2)
    noise = generator.standard_normal(len(means), dtype=np.float32)
    return np.tanh(means + np.exp(np.minimum(log_stds, 2.0)) * noise)
