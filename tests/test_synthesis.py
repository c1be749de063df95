from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks.ablation import Endless
from dawm.callbacks import RegenerateRollouts
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Transitions
from dawm.errors import UserError
from dawm.inverse_dynamics import InferredActions
from dawm.synthesis import rollouts as synthesis
from dawm.synthesis.guards import Bounds, DataStatistics, Watch
from dawm.synthesis.rollouts import Synthesizer
from dawm.synthesis.targets import ConstantReturn, LiftedReturn, QuantileReturn
from dawm.world_model import Imagined

FATES = {"kept", "after_end", "non_finite", "out_of_range", "uncertain", "inconsistent", "unfamiliar"}


class Counting(torch.nn.Module):
    """Imagines s, s + 1, s + 2, ...; the reward is the observation before, and parts of it can be replaced."""

    device = torch.device("cpu")

    def __init__(self, horizon=4, observations=None, rewards=None, terminations=None):
        super().__init__()
        self.horizon = horizon
        self.replacements = {"observations": observations, "rewards": rewards, "terminations": terminations}
        self.asked = []

    def imagine(self, observations, actions, returns_to_go, guidance=1.0, generator=None):
        self.asked.append((observations, actions, returns_to_go, guidance))
        path = observations.unsqueeze(1) + torch.arange(self.horizon + 1.0).view(1, -1, 1)
        parts = {
            "observations": path,
            "rewards": path[:, :-1, 0].clone(),
            "terminations": torch.zeros(len(path), self.horizon),
        }
        if generator is not None:
            parts["rewards"] += torch.randn(parts["rewards"].shape, generator=generator)
        for key, places in self.replacements.items():
            for place, value in (places or {}).items():
                parts[key][place] = value
        return Imagined(**parts)


class Inverse(torch.nn.Module):
    """Infers the observation before, over 100; its disagreement is the observation after."""

    def infer(self, observations, next_observations):
        assert observations.dim() == 2
        return InferredActions(observations / 100, next_observations[:, 0])


def run(world_model, count=2, generator=None, kind=Synthesizer, **settings):
    """Rollouts from 0, 10, 20, ..., whose real actions are -0.5, -0.6, ..."""
    starts, returns = torch.arange(count).float().unsqueeze(1), torch.arange(count).float()
    synthesizer = kind(world_model, Inverse(), **settings)
    return synthesizer.judge(synthesizer.imagine((10 * starts, -0.5 - starts / 10, returns), generator))


def bounds(low, high, lowest=-1e9, highest=1e9):
    """Bounds of the one observation and of the reward."""
    return Bounds((torch.tensor([low]), torch.tensor([high])), (torch.tensor(lowest), torch.tensor(highest)))


def states(rollouts):
    return rollouts.transitions().observations[:, 0].tolist()


def test_transitions_are_made_of_what_was_imagined():
    """The first action is the real one, the others are inferred; the end of a rollout bootstraps."""
    rollouts = run(Counting(horizon=3))
    transitions = rollouts.transitions()
    torch.testing.assert_close(transitions.observations[:, 0], torch.tensor([0.0, 1, 2, 10, 11, 12]))
    torch.testing.assert_close(transitions.next_observations[:, 0], torch.tensor([1.0, 2, 3, 11, 12, 13]))
    torch.testing.assert_close(transitions.rewards, torch.tensor([0.0, 1, 2, 10, 11, 12]))
    torch.testing.assert_close(transitions.actions[:, 0], torch.tensor([-0.5, 0.01, 0.02, -0.6, 0.11, 0.12]))
    assert transitions.terminations.tolist() == [0] * 6
    assert rollouts.counts == {"kept": 6} | dict.fromkeys(FATES - {"kept"}, 0)


def test_steps_after_an_imagined_termination_are_dropped():
    """The step that ends the task is kept and says so; a second end after it changes nothing."""
    rollouts = run(Counting(terminations={(0, 1): 0.6, (0, 3): 0.9, (1, 0): 0.5}))
    assert states(rollouts) == [0, 1, 10, 11, 12, 13]
    assert rollouts.transitions().terminations.tolist() == [0, 1, 0, 0, 0, 0]
    assert rollouts.counts["after_end"] == 2
    assert rollouts.counts["kept"] == 6


def test_without_termination_channel_nothing_ends():
    rollouts = run(Counting(terminations={(0, 1): 0.6, (0, 3): 0.9, (1, 0): 0.5}), kind=Endless)
    assert rollouts.transitions().terminations.tolist() == [0] * 8
    assert rollouts.counts["kept"] == 8


@pytest.mark.parametrize(
    ("part", "place", "value", "kept"),
    [
        ("observations", (0, 3, 0), float("nan"), [0, 1]),
        ("observations", (0, 3, 0), float("inf"), [0, 1]),
        ("rewards", (0, 1), float("nan"), [0]),
        ("rewards", (0, 1), float("-inf"), [0]),
        ("terminations", (0, 1), float("nan"), [0]),
    ],
)
def test_steps_that_are_not_finite_take_the_later_ones_along(part, place, value, kept):
    rollouts = run(Counting(**{part: {place: value}}))
    assert states(rollouts) == [*kept, 10, 11, 12, 13]
    assert rollouts.counts["non_finite"] == 4 - len(kept)
    assert rollouts.transitions().pack().isfinite().all()


@pytest.mark.parametrize("outlier", [-99.0, 99.0])
def test_steps_out_of_range_take_the_later_ones_along(outlier):
    """Bounds are inclusive, and hold for where a rollout starts, too: some codecs imagine it."""
    rollouts = run(Counting(observations={(0, 2, 0): outlier}), bounds=bounds(0.0, 14.0))
    assert states(rollouts) == [0, 10, 11, 12, 13]
    assert rollouts.counts["out_of_range"] == 3
    start_outside = run(Counting(horizon=1), bounds=bounds(1.0, 20.0))
    assert states(start_outside) == [10]


@pytest.mark.parametrize("outlier", [-99.0, 99.0])
def test_rewards_out_of_range_drop_their_step_and_the_later_ones(outlier):
    """Bounds are inclusive: rewards are 0 to 3 and 10 to 13."""
    rollouts = run(Counting(rewards={(0, 2): outlier}), bounds=bounds(-1e9, 1e9, 0.0, 13.0))
    assert states(rollouts) == [0, 1, 10, 11, 12, 13]
    assert rollouts.counts["out_of_range"] == 2


def test_bounds_leave_a_fraction_of_the_range_on_both_sides():
    """The second dimension is always 5, give or take a float's last bit: it has no range, and gets a unit's."""
    low, high = torch.tensor([-1.0, 5.0]), torch.tensor([3.0, 5.0000005])
    statistics = DataStatistics((low, high), (torch.tensor(0.0), torch.tensor(10.0)), 5.0, 1.0, 0.1, 1.0)
    observations, rewards = statistics.bounds(margin=0.5)
    torch.testing.assert_close(torch.stack(observations), torch.tensor([[-3.0, 4.5], [5.0, 5.5]]))
    assert rewards == (-5, 15)


def test_what_the_data_are_like_by_hand(write_dataset):
    """Rewards are 100.25, 101.25 and 102.25, and 103.25 in an episode of its own, the one that does not terminate."""
    data = TransitionDataModule(write_dataset((3, 1), (True, False), first=100), horizon=1)
    statistics = DataStatistics.of(data.episodes)
    assert [bound.tolist() for bound in statistics.observation_range] == [[100, 0], [104, 1]]  # s_{t+1}, too
    assert statistics.reward_range == (100.25, 103.25)
    assert statistics[2:] == pytest.approx((101.75, 1.25**0.5, 1 / 4, 0.5**0.5))  # within: -1, 0, 1, and 0
    assert [float(bound) for bound in statistics.bounds(0.1).rewards] == pytest.approx([99.95, 103.55])
    steps = data.episodes.transitions[torch.zeros(5, dtype=torch.int64)]
    steps = replace(steps, rewards=torch.tensor([102.0, 106, 104, 104, 104]), terminations=torch.eye(5)[4])
    measured = Watch(statistics, {}, "key").measure(steps, Counter(kept=5))
    assert measured["reward_drift"] == pytest.approx(2.25 / 1.25**0.5)
    assert measured["termination_drift"] == pytest.approx(0.2 - 0.25)


def test_uncertain_steps_take_the_later_ones_along():
    """The first action is real, so nothing about it is uncertain."""
    assert states(run(Counting(), max_disagreement=2.0)) == [0, 1, 10]
    assert states(run(Counting(), max_disagreement=-1.0)) == [0, 10]
    rollouts = run(Counting(), max_disagreement=3.0)
    assert states(rollouts) == [0, 1, 2, 10]
    assert rollouts.counts["uncertain"] == 4


def test_every_step_is_counted_once_under_the_first_reason():
    """Steps after an end may well be out of range and not finite too; they are dropped for one reason only."""
    rollouts = run(
        Counting(
            observations={(0, 4, 0): float("nan"), (1, 2, 0): 1000.0},
            rewards={(1, 2): float("nan")},
            terminations={(0, 1): 1.0},
        ),
        count=3,
        bounds=bounds(0.0, 100.0),
        max_disagreement=22.0,
    )
    assert states(rollouts) == [0, 1, 10, 20, 21]
    expected = {"kept": 5, "after_end": 2, "non_finite": 2, "out_of_range": 1, "uncertain": 2}
    expected |= {"inconsistent": 0, "unfamiliar": 0}
    assert rollouts.counts == expected
    assert rollouts.counts.total() == 3 * 4


@pytest.mark.parametrize("count", [1, 6, 7])
def test_chunks_change_neither_steps_nor_counts(count, monkeypatch):
    """Without noise, any chunking gives the same; the chunks share one generator, so with noise only equal sizes do."""
    whole = run(Counting(terminations={(0, 2): 1.0}), count)
    monkeypatch.setattr(synthesis, "CHUNK_ON_CPU", 3)
    world_model = Counting()
    chunked = run(world_model, count)
    assert [len(asked[0]) for asked in world_model.asked] == {1: [1], 6: [3, 3], 7: [3, 3, 1]}[count]
    assert chunked.counts.total() == whole.counts.total() == 4 * count
    assert states(chunked) == [10.0 * i + k for i in range(count) for k in range(4)]
    assert torch.equal(chunked.transitions().actions[::4, 0], -0.5 - torch.arange(count) / 10)
    first, second, other = (run(Counting(), count, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first.transitions().rewards, second.transitions().rewards)
    assert not torch.equal(first.transitions().rewards, other.transitions().rewards)
    noise = (first.transitions().rewards - chunked.transitions().rewards).view(count, 4)
    assert len(noise.unique(dim=0)) == count  # no chunk repeats another's noise


def test_targets_and_guidance_reach_the_world_model():
    world_model = Counting()
    run(world_model, guidance=1.7)
    observations, actions, targets, guidance = world_model.asked[0]
    assert observations[:, 0].tolist() == [0, 10]
    torch.testing.assert_close(actions[:, 0], torch.tensor([-0.5, -0.6]))
    assert targets.tolist() == [0, 1]
    assert guidance == 1.7


def test_nothing_left_is_an_error_that_says_why():
    rollouts = run(Counting(), bounds=bounds(50.0, 60.0))
    with pytest.raises(UserError, match=r"--margin: got all 8 imagined steps dropped \(out_of_range 8\), expected"):
        rollouts.require_some("margin")
    run(Counting(), bounds=bounds(10.0, 20.0)).require_some("margin")


# From the data


def test_targets_are_chosen_over_the_rows_that_statistics_are_taken_from(dataset, monkeypatch):
    """Of 26 rows only the first two count: whoever asks, the same return is aimed at."""
    data, world_model = TransitionDataModule(dataset, horizon=1), Counting(horizon=1)
    monkeypatch.setattr(type(data.episodes), "sample_rows", lambda self, *episodes: torch.tensor([0, 1]))
    callback = RegenerateRollouts(target_return=QuantileReturn(1.0), margin=100.0)
    callback.connect(world_model, Inverse())
    callback.synthesizer(data, DataStatistics.of(data.episodes)).rollouts(data, 5, seed=0)
    assert world_model.asked[0][2].unique() == data.returns_to_go[:2].max() < data.returns_to_go.max()


# Target returns

DATA = torch.tensor([4.0, 0.0, 2.0, 8.0, 6.0])
OWN = torch.tensor([2.0, -6.0])


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (QuantileReturn(0.0), [0.0, 0.0]),
        (QuantileReturn(0.5), [4.0, 4.0]),
        (QuantileReturn(0.75), [6.0, 6.0]),
        (QuantileReturn(1.0), [8.0, 8.0]),
        (LiftedReturn(0.0), [2.0, -6.0]),
        (LiftedReturn(2.0), [2 + 2 * 10**0.5, -6 + 2 * 10**0.5]),
        (ConstantReturn(7.5), [7.5, 7.5]),
    ],
)
def test_target_returns_by_hand(policy, expected):
    rows = Transitions(torch.zeros(5, 1), torch.zeros(5, 1), torch.zeros(5), torch.zeros(5, 1), torch.zeros(5))
    target = policy.fit(rows, DATA)
    torch.testing.assert_close(target(torch.zeros(2, 1), torch.zeros(2, 1), OWN), torch.tensor(expected))


@pytest.mark.parametrize("quantile", [-0.1, 1.1])
def test_a_quantile_outside_0_to_1_is_refused(quantile):
    with pytest.raises(UserError, match="quantile"):
        QuantileReturn(quantile)
