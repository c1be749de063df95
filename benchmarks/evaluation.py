"""Environment steps per second while a policy of two hidden layers of 256 is evaluated.

    python -m benchmarks.evaluation                  # some 5 minutes

All contestants play the same episodes, by their seeds, to their ends. The steps counted are those of the episodes: what
a vector environment steps on behind an episode's end, while others still run, takes time and counts nothing. Resets
take part. The environments of DAWM are made within the measured time, those of the others beforehand.

Contestants: one environment in a loop, as single-file research code evaluates; Gymnasium's vector environments, in the
process and in processes of their own; `run_episodes` with environments of any kind; `mujoco.rollout` with one step of
the policy a call, robots that have fallen left out; `run_episodes` as it is, with MuJoCo's `mj_step` on every robot's
own data. The last column is the largest difference of a return from the loop's: 0 is equality to the last bit, and all
but `mujoco.rollout` must reach it. Hopper's policy is the expert inside the package, some of whose episodes end early;
the others' are fresh. One thread, except where a name says otherwise and in AsyncVectorEnv.
"""

import argparse
from collections.abc import Callable
from importlib.resources import files
from typing import Any
from unittest.mock import patch

import gymnasium as gym
import mujoco
import numpy as np
import torch
from mujoco.rollout import Rollout
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor, nn

from benchmarks.measure import interleave, ratio, report, rows
from dawm.evaluation.environments import PlanarRobots
from dawm.evaluation.episodes import Policy, run_episodes

LOOP = "one environment in a loop"


class RolloutRobots(PlanarRobots):
    """The robots simulated by ``mujoco.rollout``, which takes B states and returns those after each physics step."""

    def __init__(self, env: Any, robot: Any, count: int, threads: int) -> None:
        super().__init__(env, robot, count, threads)
        self.kind = mujoco.mjtState.mjSTATE_FULLPHYSICS
        self.states = np.zeros((count, mujoco.mj_stateSize(self.model, self.kind)))
        self.rollout = Rollout(nthread=threads if threads > 1 else 0)
        self.workspaces = [mujoco.MjData(self.model) for _ in range(threads)]

    def reset(self, slot: int, seed: int) -> None:
        super().reset(slot, seed)
        mujoco.mj_getState(self.model, self.template, self.states[slot], self.kind)

    def move(self, slots: list[int], actions: NDArray) -> None:
        controls = np.repeat(actions[:, None].astype(np.float64), self.frame_skip, axis=1)
        chunk = -(-len(slots) // self.threads)
        after, _ = self.rollout.rollout(
            self.model, self.workspaces, self.states[slots], controls, nstep=self.frame_skip, chunk_size=chunk
        )
        self.states[slots] = after[:, -1]
        size = self.model.nq
        # a state is the time, the positions and the velocities
        self.positions[slots], self.velocities[slots] = after[:, -1, 1 : 1 + size], after[:, -1, 1 + size :]

    def close(self) -> None:
        self.rollout.close()
        super().close()


def make_policy(name: str, env: gym.Env) -> Policy:
    """A policy of plain layers, from observations, shape (B, O), to actions, shape (B, A)."""
    sizes = [env.observation_space.shape[0], 256, 256, env.action_space.shape[0]]
    torch.manual_seed(0)
    layers = [nn.Linear(*pair) for pair in zip(sizes[:-1], sizes[1:])]
    if name == "Hopper-v5":
        weights = load(files("dawm.data.sources").joinpath("policies", "hopper.safetensors").read_bytes())
        for index, layer in enumerate(layers):
            # the last one's outputs are means and deviations
            layer.weight.data = weights[f"expert.w{index}"].float()[:, : sizes[index + 1]].T.contiguous()
            layer.bias.data = weights[f"expert.b{index}"].float()[: sizes[index + 1]]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.Tanh())


def pad(observations: NDArray) -> Tensor:
    """Rows padded to a multiple of 16: a matrix product may round otherwise for another number of rows."""
    padded = np.zeros((-(-len(observations) // 16) * 16, observations.shape[1]), dtype=np.float32)
    padded[: len(observations)] = observations
    return torch.from_numpy(padded)


def contestants(
    name: str, episodes: int, num_envs: int, threads: int, returns: dict[str, NDArray]
) -> dict[str, Callable[[], int]]:
    """Each contestant's work, which answers with the episodes' steps and leaves their returns in a dictionary."""
    env = gym.make(name, disable_env_checker=True)
    policy = make_policy(name, env)
    steps = 0

    @torch.no_grad()
    def loop() -> int:
        nonlocal steps
        steps, earned = 0, np.zeros(episodes)
        for episode in range(episodes):
            observation, _ = env.reset(seed=episode)
            over = False
            while not over:
                action = policy(pad(observation[None]))[0].numpy()
                observation, reward, terminated, truncated, _ = env.step(action)
                earned[episode] += reward
                over = terminated or truncated
                steps += 1
        returns[LOOP] = earned
        return steps

    def vector(label: str, mode: str) -> Callable[[], int]:
        envs = gym.make_vec(name, num_envs, vectorization_mode=mode)

        @torch.no_grad()
        def work() -> int:
            earned = np.zeros(-(-episodes // num_envs) * num_envs)
            for first in range(0, episodes, num_envs):
                observations, _ = envs.reset(seed=list(range(first, first + num_envs)))
                running = np.ones(num_envs, dtype=bool)
                # at the last episodes some environments may have none to play
                running[episodes - first :] = False
                while running.any():
                    actions = policy(pad(observations))[:num_envs].numpy()
                    observations, rewards, terminated, truncated, _ = envs.step(actions)
                    earned[first : first + num_envs] += np.where(running, rewards, 0.0)
                    running &= ~(terminated | truncated)
            returns[label] = earned[:episodes]
            return steps

        return work

    def ours(label: str, environment: Any, threads: int, robots: type = PlanarRobots) -> Callable[[], int]:
        def work() -> int:
            with patch("dawm.evaluation.episodes.PlanarRobots", robots):
                returns[label] = run_episodes(policy, environment, range(episodes), num_envs, threads=threads)
            return steps

        return work

    def make() -> gym.Env:
        return gym.make(name, disable_env_checker=True)

    works = {LOOP: loop}
    for mode in ("sync", "async"):
        label = f"{mode.capitalize()}VectorEnv, {num_envs}"
        works[label] = vector(label, mode)
    label = f"any environments, {num_envs}"
    works[label] = ours(label, make, 1)
    for count in dict.fromkeys((1, threads)):
        suffix = f"{num_envs}" + (f", {count} threads" if count > 1 else "")
        works[f"mujoco.rollout, {suffix}"] = ours(f"mujoco.rollout, {suffix}", name, count, RolloutRobots)
        works[f"DAWM, {suffix}"] = ours(f"DAWM, {suffix}", name, count)
    return works


def main(argv: list[str] | None = None) -> list[tuple[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", nargs="+", default=["Hopper-v5", "HalfCheetah-v5"])
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--num_envs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    tables, headlines = [], []
    for name in options.environments:
        returns: dict[str, NDArray] = {}
        works = contestants(name, options.episodes, options.num_envs, options.threads, returns)
        results = interleave(works, options.rounds)
        differences = {label: float(np.abs(earned - returns[LOOP]).max()) for label, earned in returns.items()}
        for label, difference in differences.items():
            if difference and not label.startswith("mujoco.rollout"):
                raise AssertionError(f"{name}: the returns of {label} are not those of {LOOP}")
        header = ["contestant", "steps/s, median", "min to max", f"x {LOOP}", "difference of a return"]
        body = [[*row, f"{differences[row[0]]:.2g}"] for row in rows(results, [LOOP])]
        tables.append((name, header, body))
        headlines.append((f"evaluation, {name}: DAWM x {LOOP}", ratio(results, f"DAWM, {options.num_envs}", LOOP)))
    command = f"python -m benchmarks.evaluation --episodes {options.episodes} --rounds {options.rounds}"
    report("evaluation", command, tables, "All contestants" + __doc__.split("All contestants", 1)[1].rstrip())
    return headlines


if __name__ == "__main__":
    main()
