"""Environment steps per second while a policy of two hidden layers of 256 is evaluated.

    python -m benchmarks.evaluation                  # some 5 minutes

All contestants play the same episodes, by their seeds, to their ends. The steps counted are those of the episodes: what
a vector environment steps after an episode's end, while others still run, takes time and counts nothing. Resets
take part. The environments of DAWM are made within the measured time, those of the others beforehand.

Contestants: one environment in a loop, as single-file research code evaluates; Gymnasium's vector environments, in the
process and in processes of their own; `run_episodes`. The returns of all must be equal to the last bit. Hopper's policy
is the expert inside the package, some of whose episodes end early; the others' are fresh. Then agents trained side by
side: each evaluated by itself, or all by one call of `run_episodes`. One thread, except in AsyncVectorEnv.
"""

import argparse
from collections.abc import Callable
from importlib.resources import files

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor, nn

from benchmarks.measure import command_of, interleave, ratio, report, rows
from dawm.agents import TD3BC
from dawm.evaluation.episodes import Policy, run_episodes

LOOP = "one environment in a loop"
APART, TOGETHER = "agents one after the other", "agents side by side"


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
    """Rows padded to a multiple of 16: a matmul may round otherwise for another number of rows."""
    padded = np.zeros((-(-len(observations) // 16) * 16, observations.shape[1]), dtype=np.float32)
    padded[: len(observations)] = observations
    return torch.from_numpy(padded)


def contestants(name: str, episodes: int, num_envs: int, returns: dict[str, NDArray]) -> dict[str, Callable[[], int]]:
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

    def ours() -> int:
        returns[f"DAWM, {num_envs}"] = run_episodes(policy, name, range(episodes), num_envs)
        return steps

    vectors = {f"{mode.capitalize()}VectorEnv, {num_envs}": mode for mode in ("sync", "async")}
    return {LOOP: loop, **{label: vector(label, mode) for label, mode in vectors.items()}, f"DAWM, {num_envs}": ours}


def side_by_side(
    name: str, episodes: int, num_envs: int, agents: int, returns: dict[str, NDArray]
) -> dict[str, Callable[[], int]]:
    """Several agents evaluated one after the other or together; the work counts episodes."""
    env = gym.make(name, disable_env_checker=True)
    torch.manual_seed(0)
    agent = TD3BC(env.observation_space.shape[0], env.action_space.shape[0], seeds=agents).eval()

    def apart() -> int:
        policies = [lambda observations, member=member: agent.act(observations)[member] for member in range(agents)]
        returns[APART] = np.stack([run_episodes(policy, name, range(episodes), num_envs) for policy in policies])
        return agents * episodes

    def together() -> int:
        returns[TOGETHER] = run_episodes(agent.act, name, range(episodes), num_envs, agents=agents)
        return agents * episodes

    return {APART: apart, TOGETHER: together}


def main(argv: list[str] | None = None) -> list[tuple[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", nargs="+", default=["Hopper-v5", "HalfCheetah-v5"])
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--num_envs", type=int, default=10)
    parser.add_argument("--agents", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    tables, headlines = [], []
    for name in options.environments:
        returns: dict[str, NDArray] = {}
        sizes = name, options.episodes, options.num_envs
        for unit, first, works in (
            ("steps/s", LOOP, contestants(*sizes, returns)),
            ("episodes/s", APART, side_by_side(*sizes, options.agents, returns)),
        ):
            results = interleave(works, options.rounds)
            for label in works:
                if not np.array_equal(returns[label], returns[first]):
                    raise AssertionError(f"{name}: the returns of {label} are not those of {first}")
            tables.append(
                (
                    name if first == LOOP else f"{name}, {options.agents} agents",
                    ["contestant", f"{unit}, median", "min to max", f"x {first}"],
                    rows(results, [first]),
                )
            )
            last = list(works)[-1]
            headlines.append((f"evaluation, {name}: {last} x {first}", ratio(results, last, first)))
    notes = "All contestants" + __doc__.split("All contestants", 1)[1].rstrip()
    report("evaluation", command_of(__doc__, options), tables, notes)
    return headlines


if __name__ == "__main__":
    main()
