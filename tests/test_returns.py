import pytest
import torch

from dawm.data import returns
from dawm.data.returns import returns_to_go

REWARDS, ENDS = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0]), torch.tensor([3, 5])


def test_hand_numbers_and_no_sum_across_an_end():
    assert returns_to_go(REWARDS, ENDS, 0.5).tolist() == [2.75, 3.5, 3.0, 20.0, 20.0]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (1, [1.0, 2.0, 3.0, 10.0, 20.0]),
        (2, [2.0, 3.5, 3.0, 20.0, 20.0]),
        (9, [2.75, 3.5, 3.0, 20.0, 20.0]),
    ],
)
def test_window_sums_only_the_next_rewards(window, expected):
    assert returns_to_go(REWARDS, ENDS, 0.5, window).tolist() == expected


@pytest.mark.parametrize("block", [1, 8, 9, 1000])
@pytest.mark.parametrize("window", [None, 4])
def test_many_episodes_at_once_equal_a_loop(window, block, monkeypatch):
    """However many whole episodes are summed at once."""
    monkeypatch.setattr(returns, "BLOCK", block)
    lengths = torch.tensor([7, 1, 12, 3])
    ends, rewards = lengths.cumsum(0), torch.randn(23)
    expected = torch.zeros(23)
    for start, end in zip((ends - lengths).tolist(), ends.tolist()):
        for t in range(start, end):
            stop = end if window is None else min(end, t + window)
            expected[t] = sum(0.9 ** (i - t) * float(rewards[i]) for i in range(t, stop))
    torch.testing.assert_close(returns_to_go(rewards, ends, 0.9, window), expected)


@pytest.mark.parametrize("window", [None, 10])
def test_a_long_episode_does_not_lose_digits(window):
    """Sums of float32 numbers, or the difference of two of them, are off in the fourth digit here."""
    rewards = torch.rand(100_000)
    first = returns_to_go(rewards, torch.tensor([100_000]), 1.0, window)[0]
    assert float(first) == pytest.approx(float(rewards[:window].double().sum()), rel=1e-6)
