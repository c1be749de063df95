"""Returns-to-go that go on after a truncated end."""

import math
from types import SimpleNamespace

import pytest
import torch

from dawm.data.bootstrap import end_values
from dawm.data.module import TransitionDataModule
from dawm.data.returns import returns_to_go
from dawm.data.transitions import Transitions
from dawm.errors import UserError


def episodes(values, lengths, terminated):
    """Episodes of one observation, whose next is the one after, and with reward 1."""
    lengths, terminated = torch.tensor(lengths), torch.tensor(terminated)
    count, following = len(values), torch.cat([values[1:], values[-1:]])
    transitions = Transitions(
        values.unsqueeze(1), torch.zeros(count, 1), torch.ones(count), following.unsqueeze(1), torch.zeros(count)
    )
    return SimpleNamespace(
        transitions=transitions, ends=lengths.cumsum(0), truncated=~terminated, sample_rows=lambda: torch.arange(count)
    )


def test_the_value_of_an_end_counts_after_the_last_reward():
    """By hand: 1 + 0.5 (2 + 0.5 (3 + 0.5 * 8)) = 3.75; the second episode's end is worth nothing."""
    rewards, ends = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0]), torch.tensor([3, 5])
    found = returns_to_go(rewards, ends, 0.5, end_values=torch.tensor([8.0, 0.0]))
    assert found.tolist() == [3.75, 5.5, 7.0, 20.0, 20.0]
    assert rewards.tolist() == [1, 2, 3, 10, 20]


def test_ends_are_worth_what_complete_returns_say_of_such_observations():
    """Returns are 3 s + 1 wherever they are complete; of the truncated episode's last rows they say nothing.

    At a discount of 0.5 seven steps make up a hundredth: of ten rows of the truncated episode four are complete.
    """
    values = torch.cat([torch.arange(400.0) / 100, torch.linspace(0, 2, 10)])
    returns = torch.cat([3 * values[:404] + 1, torch.full((6,), -50.0)])
    data = episodes(values, [400, 10], [True, False])
    assert end_values(data, returns, 0.5).tolist() == pytest.approx([0, 3 * 2 + 1], abs=0.05)
    truncated = episodes(torch.zeros(10), [10], [False])
    assert end_values(truncated, torch.tensor(4 * [7.0] + 6 * [-50.0]), 0.5).tolist() == pytest.approx([7])
    far_out = episodes(torch.cat([values[:-1], torch.tensor([1000.0])]), [400, 10], [True, False])
    assert end_values(far_out, returns, 0.5)[1] == float(returns.max())  # no further than was seen


def test_without_complete_returns_the_mean_reward_goes_on_for_ever():
    data = episodes(torch.zeros(6), [2, 4], [False, False])
    assert end_values(data, torch.ones(6), 0.9).tolist() == pytest.approx([10, 10])


def test_the_data_module_bootstraps_truncated_ends_unless_told_otherwise(dataset):
    """The second episode, rows 5 to 7, is truncated, the first and the last are not."""
    plain = TransitionDataModule(dataset, horizon=1, discount=0.9, bootstrap_truncated=False)
    data = TransitionDataModule(dataset, horizon=1, discount=0.9)
    added = (data.episodes and data.returns_to_go) - (plain.episodes and plain.returns_to_go)
    value = end_values(data.episodes, plain.returns_to_go, 0.9)[1]
    assert value > 0
    assert added[5:8].tolist() == pytest.approx([0.9**k * float(value) for k in (3, 2, 1)], rel=1e-5)
    assert not added[:5].any()
    assert not added[20:].any()


def test_large_data_give_the_same_from_the_cache(dataset):
    """And neither discount nor window may lead to a file of another."""
    held = TransitionDataModule(dataset, horizon=1)
    mapped = [
        TransitionDataModule(dataset, horizon=1, memory_limit=0, bootstrap_truncated=b) for b in (False, None, None)
    ]
    assert all(module.episodes.cache is not None for module in mapped)
    assert torch.equal(mapped[1].returns_to_go, held.episodes and held.returns_to_go)
    assert torch.equal(mapped[2].returns_to_go, mapped[1].returns_to_go)
    assert not torch.equal(mapped[0].returns_to_go, mapped[1].returns_to_go)


@pytest.mark.parametrize("setting", [{"discount": 1.0}, {"discount": 0.0}, {"return_window": 5}])
def test_where_there_is_nothing_to_add_it_is_off_or_refused(dataset, setting):
    plain, data = (TransitionDataModule(dataset, horizon=1, bootstrap_truncated=b, **setting) for b in (False, None))
    assert torch.equal(data.episodes and data.returns_to_go, plain.episodes and plain.returns_to_go)
    assert math.isfinite(float(data.returns_to_go.sum()))
    with pytest.raises(UserError, match=r"data\.bootstrap_truncated: got True"):
        TransitionDataModule(dataset, bootstrap_truncated=True, **setting)
