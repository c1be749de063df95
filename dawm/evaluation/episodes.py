"""Evaluation: what a policy earns in its environment, and how sure that figure is.

Symbols: B observations acted on at once, E episodes, S seeds, O observation size, A action size.

A return is the undiscounted sum of an episode's rewards. Each episode has a seed of its own, so the returns do not
depend on how many environments run side by side or on how the episodes are divided among processes.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dawm.data.sources.scores import ReferenceScores
from dawm.errors import UserError
from dawm.evaluation.actions import play, recorded_box
from dawm.evaluation.environments import ENV_ID, Environment, GymnasiumEnvironments, make_environment

__all__ = ["Evaluation", "Policy", "bootstrap_interval", "evaluate", "run_episodes", "summarize"]

Policy = Callable[[Tensor], Tensor]
Device = torch.device | str

# A matmul may round differently for another number of rows, and a simulation with contacts magnifies the last bit into
# another episode. Observations are padded to a multiple of this, which keeps the actions the same where layers are as
# wide as DAWM's. (A matmul with a handful of columns and an odd inner size, 11 or 750 say, can still differ.)
ROWS = 16


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation; low and high bound the mean's 95 % confidence interval."""

    returns: NDArray[np.float64]  # undiscounted, of each episode, shape (E,); of S agents trained side by side (S, E)
    mean_return: float
    low: float
    high: float
    score: float | None = None  # the mean on the reference's scale of 0 to 100, or None without a reference
    score_low: float | None = None
    score_high: float | None = None


def evaluate(
    act: Policy,
    environment: Environment,
    episodes: int = 10,
    seed: int = 1000,
    num_envs: int = 10,
    reference: ReferenceScores | None = None,
    seeds: int = 1,
    action_space: gym.spaces.Box | None = None,
    max_episode_steps: int | None = None,
    env_id_key: str = ENV_ID,
) -> Evaluation:
    """Runs E episodes with the seeds ``seed, seed + 1, ...`` and summarises their returns.

    ``seeds`` is the number S of agents trained side by side, each of which plays all episodes; ``reference`` is that of
    `summarize`. The other settings are those of `run_episodes`.
    """
    played, limits = range(seed, seed + episodes), (action_space, max_episode_steps, env_id_key)
    return summarize(run_episodes(act, environment, played, num_envs, "cpu", seeds, *limits), reference)


def summarize(returns: NDArray[np.float64], reference: ReferenceScores | None = None) -> Evaluation:
    """Mean of the returns, shape (E,) or (S, E), with its confidence interval; as scores, too, with a reference."""
    found = float(returns.mean()), *bootstrap_interval(returns)
    return Evaluation(returns, *found, *(float(reference.normalize(value)) for value in found if reference is not None))


def run_episodes(
    act: Policy,
    environment: Environment,
    seeds: Sequence[int],
    num_envs: int = 10,
    device: Device = "cpu",
    agents: int = 1,
    action_space: gym.spaces.Box | None = None,
    max_episode_steps: int | None = None,
    env_id_key: str = ENV_ID,
) -> NDArray[np.float64]:
    """Undiscounted return of one episode per seed, shape (E,); of S agents trained side by side (S, E).

    Each agent has environments of its own, and every call of ``act`` serves all agents.

    Args:
        act: The policy: observations, shape (B, O), to actions in [-1, 1], shape (B, A); of several agents (S, B, O)
            to (S, B, A).
        environment: A Gymnasium id, a specification, or a function that makes the environment.
        seeds: Seed of each episode's reset; its length is E.
        num_envs: Environments side by side, of each agent; no more are made than there are episodes.
        device: Where the policy's observations go.
        agents: Agents trained side by side S.
        action_space: The data's Box of actions, in whose units the policy acts; None takes the environment's.
        max_episode_steps: The environment's time limit; None leaves it the one it has.
        env_id_key: The setting that names the environment, for messages.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    returns, count = np.zeros((agents, len(seeds))), min(num_envs, len(seeds))
    with ExitStack() as stack:
        made: list[gym.Env] = []
        for _ in range(agents * count):
            env = make_environment(environment, max_episode_steps, env_id_key)
            made.append(stack.enter_context(closing(env)))
        if made:
            envs = GymnasiumEnvironments(made, env_id_key)
            units = recorded_box(action_space, envs.env, envs.named)
            _play(lambda observations: act(observations.to(device)), envs, units, seeds, returns)
    return returns if agents > 1 else returns[0]


def _play(
    act: Policy, envs: GymnasiumEnvironments, units: gym.spaces.Box, seeds: Sequence[int], returns: NDArray
) -> None:
    """Adds up the returns, shape (S, E), of all episodes of all agents, whose environments follow one another."""
    agents, slots, allowed = len(returns), len(envs.envs), envs.env.action_space
    assert isinstance(allowed, gym.spaces.Box)
    count = slots // agents
    waiting = [iter(enumerate(seeds)) for _ in range(agents)]
    episodes = np.zeros(slots, dtype=np.int64)

    def start(slot: int) -> bool:
        """Starts the next episode of the environment's agent, if there is one left."""
        episode = next(waiting[slot // count], None)
        if episode is not None:
            episodes[slot], seed = episode
            envs.reset(slot, seed)
        return episode is not None

    running = np.array([slot for slot in range(slots) if start(slot)])
    # finished environments stay in the batch, so that it always has the same shape
    padded = torch.zeros(agents, -(-count // ROWS) * ROWS, envs.observations.shape[1])
    while len(running):
        padded[:, :count] = torch.from_numpy(envs.observations).view(agents, count, -1)
        observations = padded.clone() if agents > 1 else padded[0].clone()
        with torch.no_grad():
            answer = act(observations)
        got, expected = tuple(answer.shape), (*observations.shape[:-1], *allowed.shape)
        if got != expected:
            raise UserError(f"--agent: got actions of shape {got} from act, expected {expected}; mend its act")
        actions = play(answer.cpu().view(*padded.shape[:2], -1)[:, :count].flatten(0, 1), units, allowed)
        rewards, over = envs.step(running, actions[running])
        returns[running // count, episodes[running]] += rewards
        running = np.array([slot for slot, ended in zip(running, over) if not ended or start(slot)], dtype=np.int64)


def bootstrap_interval(
    values: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of the mean (Efron 1979): the interval that resampled means fall into.

    Of several seeds, the seeds are resampled first and then each one's episodes, because the seeds differ among
    themselves (Agarwal et al. 2021, arXiv 2108.13264, resample runs). With few seeds such an interval is too narrow.
    Values have the shape (E,), or of several seeds (S, E); a fraction ``confidence`` of the means is inside.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if values.ndim > 2 or values.size == 0:
        raise ValueError(f"values must have one or two dimensions and at least one entry, got shape {values.shape}")
    generator, (seeds, episodes) = np.random.default_rng(seed), values.shape
    drawn = generator.integers(seeds, size=(resamples, seeds, 1))  # of one seed it takes no random numbers
    means = values[drawn, generator.integers(episodes, size=(resamples, seeds, episodes))].mean(axis=(1, 2))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
