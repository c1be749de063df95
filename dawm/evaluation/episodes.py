"""Evaluation: what a policy earns in its environment, and how sure that figure is.

Symbols: B observations acted on at once, E episodes, S seeds, O observation size, A action size.

A return is the undiscounted sum of an episode's rewards. Each episode has a seed of its own, so the returns do not
depend on how many environments run side by side or on how the episodes are shared out among processes.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dawm.errors import UserError
from dawm.evaluation.environments import GymnasiumEnvironments, PlanarRobots, planar_robot

__all__ = [
    "Environment",
    "Evaluation",
    "Policy",
    "bootstrap_interval",
    "evaluate",
    "make_environment",
    "policies",
    "run_episodes",
    "summarize",
]

Policy = Callable[[Tensor], Tensor]
Environment = str | EnvSpec | Callable[[], gym.Env]

# A matrix product may round differently for another number of rows, and a simulation with contacts magnifies the last
# bit into another episode. Rows are padded to a multiple of this, which keeps every row's result the same where layers
# are as wide as DAWM's. (A product with a handful of columns and an odd inner size, 11 or 750 say, can still differ.)
ROWS = 16


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation; low and high bound the mean's 95 % confidence interval.

    Args:
        returns: Undiscounted return of each episode, shape (E,); of S agents trained side by side (S, E).
        mean_return: Their mean.
        low: Lower bound of the mean return.
        high: Upper bound of the mean return.
        score: The mean on the reference's scale of 0 to 100, or None without a reference.
        score_low: Lower bound of the score.
        score_high: Upper bound of the score.
    """

    returns: NDArray[np.float64]
    mean_return: float
    low: float
    high: float
    score: float | None = None
    score_low: float | None = None
    score_high: float | None = None


def evaluate(
    act: Policy,
    environment: Environment,
    episodes: int = 10,
    seed: int = 1000,
    num_envs: int = 10,
    normalize: Callable[[float], float] | None = None,
    device: torch.device | str = "cpu",
    seeds: int = 1,
) -> Evaluation:
    """Runs episodes with the seeds ``seed, seed + 1, ...`` and summarises their returns.

    Args:
        act: The policy: observations, shape (B, O), to actions in [-1, 1], shape (B, A).
        environment: A Gymnasium id, a specification, or a function that makes the environment.
        episodes: Number of episodes E.
        seed: Seed of the first episode.
        num_envs: Environments side by side.
        normalize: Turns a return into a score, such as ``ReferenceScores.normalize``.
        device: Where the policy's observations go.
        seeds: Agents trained side by side S, each of which plays all episodes; with more than one, ``act`` answers
            with actions of shape (S, B, A).
    """
    returns = [
        run_episodes(policy, environment, range(seed, seed + episodes), num_envs, device)
        for policy in policies(act, seeds)
    ]
    return summarize(np.stack(returns) if seeds > 1 else returns[0], normalize)


def policies(act: Policy, seeds: int) -> list[Policy]:
    """The policy of each of the agents trained side by side.

    Args:
        act: Observations, shape (B, O), to actions, shape (B, A), or of several agents (S, B, A).
        seeds: Their number S.
    """

    def policy(member: int) -> Policy:
        return lambda observations: act(observations)[member]

    return [act] if seeds == 1 else [policy(member) for member in range(seeds)]


def summarize(returns: NDArray[np.float64], normalize: Callable[[float], float] | None = None) -> Evaluation:
    """Mean of the returns with its confidence interval, as returns and as scores.

    Args:
        returns: Undiscounted returns, shape (E,) or (S, E).
        normalize: Turns a return into a score by an increasing line; None leaves the scores out.
    """
    mean, (low, high) = float(returns.mean()), bootstrap_interval(returns)
    if normalize is None:
        return Evaluation(returns, mean, low, high)
    return Evaluation(returns, mean, low, high, *(float(normalize(value)) for value in (mean, low, high)))


def run_episodes(
    act: Policy,
    environment: Environment,
    seeds: Sequence[int],
    num_envs: int = 10,
    device: torch.device | str = "cpu",
    threads: int | None = None,
) -> NDArray[np.float64]:
    """Undiscounted return of one episode per seed, shape (E,).

    Args:
        act: The policy: observations, shape (B, O), to actions in [-1, 1], shape (B, A).
        environment: A Gymnasium id, a specification, or a function that makes the environment.
        seeds: Seed of each episode's reset; its length is E.
        num_envs: Environments side by side; no more are made than there are episodes.
        device: Where the policy's observations go.
        threads: Threads that share the physics of ``PlanarRobots``; None takes as many as PyTorch has. The returns do
            not depend on it.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    returns, count = np.zeros(len(seeds)), min(num_envs, len(seeds))
    if not count:
        return returns
    with ExitStack() as stack:
        envs = _side_by_side(environment, count, threads, stack)
        waiting = iter(enumerate(seeds))
        episodes = np.zeros(count, dtype=np.int64)
        for slot in range(count):
            episodes[slot], seed = next(waiting)
            envs.reset(slot, seed)
        policy = _in_units(act, envs.env.action_space, device)
        running = np.arange(count)
        while len(running):
            rewards, over = envs.step(running, policy(envs.observations(running)))
            returns[episodes[running]] += rewards
            for slot in running[over]:
                following = next(waiting, None)
                if following is None:
                    running = running[running != slot]
                else:
                    episodes[slot], seed = following
                    envs.reset(slot, seed)
    return returns


def _side_by_side(
    environment: Environment, count: int, threads: int | None, stack: ExitStack
) -> GymnasiumEnvironments | PlanarRobots:
    """Environments that take their steps together, in the fastest way there is for their kind.

    Args:
        environment: A Gymnasium id, a specification, or a function that makes the environment.
        count: Number of environments.
        threads: Threads that share the physics; None takes as many as PyTorch has.
        stack: Closes whatever has been opened.
    """

    def make() -> gym.Env:
        return stack.enter_context(closing(make_environment(environment)))

    first = make()
    # a function may make a different environment each time, or change what it has made
    robot = None if callable(environment) else planar_robot(first)
    if robot is None:
        return GymnasiumEnvironments([first] + [make() for _ in range(count - 1)])
    return stack.enter_context(closing(PlanarRobots(first, robot, count, threads or torch.get_num_threads())))


def bootstrap_interval(
    values: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of the mean (Efron 1979): the interval that resampled means fall into.

    Of several seeds, the seeds are resampled first and then each one's episodes, because the seeds differ among
    themselves (Agarwal et al. 2021, arXiv 2108.13264, resample runs). With few seeds such an interval is too narrow.

    Args:
        values: Values, shape (E,), or of several seeds (S, E).
        confidence: Share of the resampled means inside, in (0, 1).
        resamples: Number of resampled means.
        seed: Seed of the resampling; a generator of its own leaves the global one alone.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim not in (1, 2) or values.size == 0:
        raise ValueError(f"values must have one or two dimensions and at least one entry, got shape {values.shape}")
    generator = np.random.default_rng(seed)
    if values.ndim == 1:
        means = values[generator.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    else:
        seeds, episodes = values.shape
        drawn = generator.integers(seeds, size=(resamples, seeds, 1))
        means = values[drawn, generator.integers(episodes, size=(resamples, seeds, episodes))].mean(axis=(1, 2))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def make_environment(environment: Environment) -> gym.Env:
    """One environment with flat observations.

    Args:
        environment: A Gymnasium id, a specification, or a function that makes the environment.

    Raises:
        UserError: It cannot be made, or its actions are not a Box.
    """
    try:
        # checking every step takes as long as a policy does
        env = environment() if callable(environment) else gym.make(environment, disable_env_checker=True)
    except Exception as error:  # gymnasium lets through whatever the environment's own package raises
        name = environment if isinstance(environment, str) else getattr(environment, "id", environment)
        raise UserError(
            f"data.env_id: the environment {name!r} cannot be made ({error}); "
            "install what it needs or set --data.env_id"
        ) from error
    if not isinstance(env.action_space, gym.spaces.Box):
        env.close()
        raise UserError(f"data.env_id: {env.action_space} is not a Box of actions; choose another --data.env_id")
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        space = _sorted_keys(env.observation_space)
        env = gym.wrappers.TransformObservation(
            env, lambda observation: gym.spaces.flatten(space, observation), gym.spaces.flatten_space(space)
        )
    return env


def _sorted_keys(space: gym.Space) -> gym.Space:
    """A space whose observations are laid out as in data sets: Dicts by sorted keys, whatever order they were given."""
    if not isinstance(space, gym.spaces.Dict):
        return space
    return gym.spaces.Dict([(key, _sorted_keys(part)) for key, part in sorted(space.spaces.items())])


def _in_units(act: Policy, space: gym.Space, device: torch.device | str) -> Callable[[NDArray], NDArray]:
    """The policy in the environment's own units: observations, shape (B, O), to actions, shape (B, A).

    Args:
        act: The policy.
        space: The environment's Box of actions.
        device: Where the policy's observations go.
    """
    assert isinstance(space, gym.spaces.Box)
    # centre and half-width: exact where the Box is [-1, 1] already
    centre, half_width = (space.high + space.low) / 2, (space.high - space.low) / 2

    def policy(observations: NDArray) -> NDArray:
        count, size = observations.shape
        padded = np.zeros((-(-count // ROWS) * ROWS, size), dtype=np.float32)
        padded[:count] = observations
        with torch.no_grad():
            actions = act(torch.from_numpy(padded).to(device))[:count].cpu().numpy()
        return (centre + half_width * actions.astype(np.float64)).clip(space.low, space.high).astype(space.dtype)

    return policy
