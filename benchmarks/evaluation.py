"""Environment steps per second while a policy of two hidden layers of 256 is evaluated.

    python -m benchmarks.evaluation                  # some 2 minutes

Contestants: one environment in a loop, as single-file research code evaluates; Gymnasium's vector environments, in the
process and in processes of their own; DAWM's `run_episodes`. The loop and `run_episodes` play the same episodes to
their ends and must agree in every return; the vector environments run as many steps.
"""

import argparse
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch

from benchmarks.measure import interleave, ratio, report, rows
from dawm.agents import TD3BC
from dawm.evaluation import run_episodes

LOOP = "one environment in a loop"


def contestants(name: str, episodes: int, num_envs: int) -> dict[str, Callable[[], int]]:
    torch.manual_seed(0)
    env = gym.make(name)
    agent = TD3BC(env.observation_space.shape[0], env.action_space.shape[0])
    returns: dict[str, np.ndarray] = {}
    steps = 0

    def one_by_one() -> int:
        nonlocal steps
        steps, earned = 0, np.zeros(episodes)
        for episode in range(episodes):
            observation, _ = env.reset(seed=episode)
            over = False
            while not over:
                # rows padded to 16: a matrix product may round otherwise for another number of rows
                padded = np.zeros((16, len(observation)), dtype=np.float32)
                padded[0] = observation
                action = agent.act(torch.from_numpy(padded))[0].numpy()
                observation, reward, terminated, truncated, _ = env.step(action)
                earned[episode] += reward
                over = terminated or truncated
                steps += 1
        returns[LOOP] = earned
        return steps

    def vector(mode: str) -> Callable[[], int]:
        envs = gym.make_vec(name, num_envs, vectorization_mode=mode)

        def work() -> int:
            observations, _ = envs.reset(seed=0)
            count = -(-steps // num_envs)
            for _ in range(count):
                actions = agent.act(torch.from_numpy(observations.astype(np.float32))).numpy()
                observations, *_ = envs.step(actions)
            return count * num_envs

        return work

    def ours(count: int) -> Callable[[], int]:
        def work() -> int:
            earned = run_episodes(agent.act, name, range(episodes), count)
            if not np.array_equal(earned, returns[LOOP]):
                raise AssertionError(f"{name}: returns differ from those of one environment in a loop")
            return steps

        return work

    return {
        LOOP: one_by_one,
        f"SyncVectorEnv, {num_envs}": vector("sync"),
        f"AsyncVectorEnv, {num_envs}": vector("async"),
        f"DAWM, {num_envs}": ours(num_envs),
        f"DAWM, {episodes}": ours(episodes),
    }


def main(argv: list[str] | None = None) -> list[tuple[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", nargs="+", default=["Hopper-v5", "HalfCheetah-v5"])
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--num_envs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    tables, headlines = [], []
    for name in options.environments:
        results = interleave(contestants(name, options.episodes, options.num_envs), options.rounds)
        header = ["contestant", "steps/s, median", "min to max", f"x {LOOP}"]
        tables.append((name, header, rows(results, [LOOP])))
        headlines.append((f"evaluation, {name}: DAWM x {LOOP}", ratio(results, f"DAWM, {options.num_envs}", LOOP)))
    command = f"python -m benchmarks.evaluation --episodes {options.episodes} --rounds {options.rounds}"
    report("evaluation", command, tables, "Contestants" + __doc__.split("Contestants", 1)[1].rstrip())
    return headlines


if __name__ == "__main__":
    main()
