"""Data of one's own, and synthetic transitions beside them for any library.

    python examples/augment_my_data.py

`episodes` stands for yours; here a few of a random policy. The transitions end up in augmented.npz.
"""

import gymnasium as gym
import lightning as L
import minari
import numpy as np
import torch
from minari.data_collector import EpisodeBuffer

from dawm.data.module import TransitionDataModule
from dawm.inverse_dynamics import InverseDynamics
from dawm.synthesis.guards import DataStatistics
from dawm.synthesis.rollouts import Synthesizer
from dawm.synthesis.starts import Starts
from dawm.synthesis.targets import LiftedReturn
from dawm.world_model import DiffusionWorldModel


def play(env: gym.Env, seed: int) -> tuple[np.ndarray, ...]:
    """One episode of T steps: observations (T + 1, O), actions (T, A), rewards, terminations and truncations (T,)."""
    observations, steps, over = [env.reset(seed=seed)[0]], [], False
    while not over:
        action = env.action_space.sample()
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        steps.append((action, reward, terminated, truncated))
        over = terminated or truncated
    return np.array(observations), *map(np.array, zip(*steps))


env = gym.make("Hopper-v5")
episodes = [play(env, seed) for seed in range(200)]
env.close()

# Your episodes become a Minari data set: observations[t + 1] and rewards[t] follow actions[t].
buffers = [
    EpisodeBuffer(observations=o, actions=a, rewards=r, terminations=d, truncations=t) for o, a, r, d, t in episodes
]
minari.create_dataset_from_buffers(
    "mine/hopper/first-v0", buffers, env="Hopper-v5", ref_min_score=0, ref_max_score=3000
)

# Two models learn from it.
data = TransitionDataModule("mine/hopper/first-v0")
sizes = data.observation_size, data.action_size
world_model, inverse_dynamics = DiffusionWorldModel(*sizes), InverseDynamics(*sizes)
L.Trainer(max_steps=2000).fit(world_model, datamodule=data)
L.Trainer(max_steps=1500).fit(inverse_dynamics, datamodule=data)

# They imagine 10,000 futures from random recorded starts, aimed a little above the recorded returns.
synthesizer = Synthesizer(
    world_model.eval(),
    inverse_dynamics.eval(),
    Starts.of(data, LiftedReturn(0.5)),
    bounds=DataStatistics.of(data.episodes).bounds(margin=0.1),
)
rollouts = synthesizer.rollouts(data, 10_000, seed=0)
synthetic = rollouts.transitions()
print("imagined steps by fate:", dict(rollouts.counts))

# Real and synthetic transitions in one file; actions are in [-1, 1].
columns = {
    name: torch.cat([getattr(data.episodes.transitions, name), getattr(synthetic, name).cpu()]).numpy()
    for name in ("observations", "actions", "rewards", "next_observations", "terminations")
}
np.savez("augmented.npz", **columns)
