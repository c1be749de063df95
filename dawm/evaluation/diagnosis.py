"""What is true, new and usable in imagined rollouts, each figure beside that of held-out real transitions.

Symbols: B rollouts or segments, H horizon, O observation size, A action size, M rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from dawm.agents.losses import td_target
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Segments, Transitions
from dawm.evaluation.actions import play
from dawm.evaluation.fidelity import ColumnDistances, Novelty, ReturnResponse, TransitionErrors
from dawm.evaluation.simulator import Outcome, Simulator
from dawm.forward_model import ForwardPrediction
from dawm.inverse_dynamics import InverseDynamics
from dawm.nn.normalizer import Normalizer
from dawm.synthesis.rollouts import Rollouts

__all__ = [
    "Paths", "Units", "action_errors", "column_names", "distributions", "edges", "errors", "forward_errors",
    "imagined_paths", "novelty", "real_paths", "return_response", "simulated", "td_targets",
]  # fmt: skip

Figures = dict[str, Any]  # by name, tensors or further figures

COMPARED = 2000  # rows whose nearest neighbours are looked for
REFERENCE = 100_000  # training rows to compare with


@dataclass(frozen=True)
class Paths:
    """Some futures, and which of their steps to look at, by the name of the choice."""

    observations: Tensor  # s_t .. s_{t+H}, shape (B, H + 1, O)
    steps: Transitions  # what an agent would learn from, fields of shape (B, H, ...)
    asked: Tensor  # return-to-go that was asked for, or recorded, shape (B,)
    chosen: Mapping[str, Tensor]  # each of shape (B, H), bool

    def rows(self) -> dict[str, Transitions]:
        """The chosen steps, fields of shape (M, ...)."""
        return {name: self.steps[mask] for name, mask in self.chosen.items()}


def imagined_paths(rollouts: Rollouts, kept: Tensor, asked: Tensor) -> Paths:
    """Unfiltered rollouts, and which of their steps the filters keep, shape (B, H).

    ``before_filters`` are the finite steps up to the imagined end, ``after_filters`` those kept.
    """
    chosen = {"before_filters": rollouts.kept, "after_filters": kept}
    return Paths(rollouts.observations, rollouts.steps(), asked, chosen)


def real_paths(segments: Segments, ends_observed: bool) -> Paths:
    """Recorded segments; without ``ends_observed`` the steps that ended the task lack their next observation."""
    before, after = segments.observations[:, :-1], segments.observations[:, 1:]
    steps = Transitions(before, segments.actions, segments.rewards, after, segments.terminations)
    valid = segments.valid > 0.5
    if not ends_observed:
        valid &= segments.terminations < 0.5
    return Paths(segments.observations, steps, segments.returns_to_go, {"real": valid})


class Units:
    """The training episodes' rows, and the standard deviations that errors are counted in."""

    def __init__(self, data: TransitionDataModule) -> None:
        episodes = data.episodes
        self.training = episodes.transitions[episodes.observed_rows(data.training_episodes)]
        differences, rewards = Normalizer(data.observation_size), Normalizer(1)
        differences.fit(self.training.next_observations - self.training.observations)
        rewards.fit(self.training.rewards.unsqueeze(-1))
        self.difference_std, self.reward_std = differences.std, rewards.std.squeeze()


def errors(units: Units, predicted: Transitions, true: Transitions, chosen: Mapping[str, Tensor]) -> Figures:
    """`TransitionErrors` of each choice of steps, fields of shape (B, H, ...)."""
    found = {}
    for name, mask in chosen.items():
        metric = TransitionErrors(mask.shape[1], units.difference_std, units.reward_std)
        metric.update(predicted, true, mask)
        found[name] = metric.compute()
    return found


def simulated(simulator: Simulator, paths: Paths, action_space: gym.spaces.Box, units: Units) -> Figures:
    """The same against the simulator: ``one_step``, ``open_loop``, and the fraction of steps that are ``clipped``.

    The state is set at every step, or once at the start of each rollout.
    """
    observations = paths.steps.observations.double().numpy()
    allowed = simulator.env.action_space
    assert isinstance(allowed, gym.spaces.Box)
    actions = play(paths.steps.actions, action_space, allowed)
    clipped, chosen = torch.from_numpy(simulator.clipped(observations)), dict(paths.chosen)
    if "real" in chosen:
        chosen["real_unclipped"] = chosen["real"] & ~clipped
    imagined = replace(paths.steps, next_observations=paths.observations[:, 1:])
    judged = {
        "one_step": (paths.steps, simulator.one_step(observations, actions)),
        "open_loop": (imagined, simulator.open_loop(observations[:, 0], actions)),
    }
    found: Figures = {"clipped": {name: clipped[mask].double().mean() for name, mask in paths.chosen.items()}}
    for name, (predicted, outcome) in judged.items():
        played = torch.from_numpy(outcome.played)
        masks = {choice: mask & played for choice, mask in chosen.items()}
        found[name] = errors(units, predicted, _truth(paths.steps, outcome), masks)
    # a state that is not known at the start is not known later either
    found["open_loop"].pop("real_unclipped", None)
    return found


def _truth(steps: Transitions, outcome: Outcome) -> Transitions:
    following, rewards, terminations = (torch.from_numpy(part) for part in outcome[:3])
    return replace(steps, next_observations=following, rewards=rewards, terminations=terminations)


def return_response(paths: Paths, discount: float) -> Figures:
    """`ReturnResponse` of the discounted rewards of the H steps, over rollouts of which no step was lost.

    A rollout that ended its task has all its steps, too.
    """
    steps, found = paths.steps, {}
    weights = discount ** torch.arange(steps.rewards.shape[1])
    ended = steps.terminations.cumsum(dim=1) - steps.terminations > 0
    for name, mask in paths.chosen.items():
        whole = (mask | ended).all(dim=1)
        metric = ReturnResponse()
        metric.update(paths.asked[whole], (steps.rewards.where(mask, 0.0) * weights).sum(dim=1)[whole])
        found[name] = metric.compute() | {"rollouts": whole.sum()}
    return found


def action_errors(inverse_dynamics: InverseDynamics, rows: Transitions) -> Figures:
    """Squared error of the inferred actions, (M, ...), by dimension, and as a fraction of the actions' variance."""
    inferred, disagreement = inverse_dynamics.infer(rows.observations, rows.next_observations)
    by_action = (inferred - rows.actions).square().mean(dim=0)
    return {
        "squared_error": by_action.mean(), "by_action": by_action, "disagreement": disagreement.mean(),
        "fraction_of_variance": by_action.mean() / rows.actions.var(dim=0, correction=0).mean(),
    }  # fmt: skip


def novelty(units: Units, groups: Mapping[str, Transitions], generator: torch.Generator) -> Figures:
    """`Novelty` of (s, a, r, s' - s) in each group of rows, among the training rows; of samples of many."""
    reference, found = _columns(_sample(units.training, REFERENCE, generator)), {}
    for name, rows in groups.items():
        metric = Novelty(reference)
        metric.update(_columns(_sample(rows, COMPARED, generator)))
        found[name] = metric.compute()
    return found


def distributions(units: Units, groups: Mapping[str, Transitions], generator: torch.Generator) -> Figures:
    """`ColumnDistances` of (s, a, r, s' - s) in each group of rows from the training rows, or a sample of many."""
    reference, found = _columns(_sample(units.training, REFERENCE, generator)), {}
    for name, rows in groups.items():
        metric = ColumnDistances(reference)
        metric.update(_columns(rows))
        found[name] = metric.compute()
        found[name]["mean_marginal"] = found[name]["marginal"].mean()
    return found


def column_names(observation_size: int, action_size: int) -> list[str]:
    """Names of the columns that are compared."""
    sizes = {"s": observation_size, "a": action_size}
    first = [f"{letter}{number}" for letter, size in sizes.items() for number in range(size)]
    return [*first, "r", *(f"ds{number}" for number in range(observation_size))]


def _columns(rows: Transitions) -> Tensor:
    differences = rows.next_observations - rows.observations
    return torch.cat([rows.observations, rows.actions, rows.rewards.unsqueeze(-1), differences], dim=-1)


def _sample(rows: Transitions, most: int, generator: torch.Generator) -> Transitions:
    return rows if len(rows) <= most else rows[torch.randperm(len(rows), generator=generator)[:most]]


def edges(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Kept steps whose next observation is no kept step's start, and the last of each rollout; each (B, H), bool.

    Of those that bootstrap. Where the forward models say what a step leads to, the next one starts beside it.
    """
    last = torch.arange(rollouts.rewards.shape[1]) == rollouts.lengths.unsqueeze(1) - 1
    leads_on = (rollouts.next_observations == rollouts.observations[:, 1:]).all(dim=-1) & ~last
    bootstraps = rollouts.kept & (rollouts.terminations < 0.5)
    return bootstraps & ~leads_on, bootstraps & last


@torch.no_grad()
def td_targets(agent: Any, groups: Mapping[str, Transitions], discount: float) -> Figures | None:
    """The target ``r + gamma min Q'(s', pi(s'))`` in each group of rows: mean, standard deviation, 99th percentile.

    In the units that the agent scales rewards to. None for an agent without ``target_critics``, the target critics of
    `dawm.agents`.
    """
    if not hasattr(agent, "target_critics"):
        return None
    found = {}
    for name, rows in groups.items():
        batch, actions = agent.prepare(rows), agent.act(rows.next_observations)
        observations = batch.next_observations.expand(*actions.shape[:-1], -1)
        values = agent.target_critics(torch.cat([observations, actions], dim=-1)).squeeze(-1).amin(dim=-2)
        rewards, ends = batch.rewards.expand_as(values), batch.terminations.expand_as(values)  # the same for each seed
        targets = td_target(rewards, ends, values, discount).flatten()
        if len(targets):
            high = targets.kthvalue(max(1, round(0.99 * len(targets)))).values
            found[name] = {"mean": targets.mean(), "std": targets.std(correction=0), "quantile_99": high}
    return found


def forward_errors(predict: Callable[[Tensor, Tensor], ForwardPrediction], paths: Paths, units: Units) -> Figures:
    """`errors` against what forward models predict from each step's own observation and action.

    With their mean ``disagreement``. ``predict`` is asked with shapes (M, O) and (M, A).
    """
    steps = paths.steps
    predicted = predict(steps.observations.flatten(0, 1), steps.actions.flatten(0, 1))
    following, rewards, ends, disagreement = (part.unflatten(0, steps.rewards.shape) for part in predicted)
    told = replace(steps, next_observations=following, rewards=rewards, terminations=ends)
    found = errors(units, steps, told, paths.chosen)
    for name, mask in paths.chosen.items():
        found[name]["disagreement"] = disagreement[mask].mean()
    return found
