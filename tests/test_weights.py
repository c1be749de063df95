"""Weights of rows against numbers worked out by hand, and drawing by them."""

import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from test_data import assert_equal, flat, module, synthetic

from dawm.data.batches import RowStream, WeightedRows, derive_seed
from dawm.data.episodes import Episodes
from dawm.data.transitions import Transitions
from dawm.data.weights import AdvantageWeights, RowWeights, TopShare, linear_regression
from dawm.errors import UserError


def three_episodes(returns=(0.0, 6.0, 8.0)) -> Episodes:
    """Of 2, 1 and 3 rows, from the observations -1, 0 and 1 on."""
    observations = torch.tensor([-1.0, 9, 0, 1, 9, 9]).unsqueeze(-1)
    rows = Transitions(observations, observations, torch.zeros(6), observations, torch.zeros(6)).pack()
    space, none = Box(-10, 10, (1,), np.float32), torch.zeros(3, dtype=torch.bool)
    return Episodes(
        rows=rows, ends=torch.tensor([2, 3, 6]), terminated=none, end_observed=~none,
        episode_returns=torch.tensor(returns), low=rows.amin(0), high=rows.amax(0),
        fingerprint="", name="three", observation_space=space, action_space=space, env_spec=None, reference=None,
    )  # fmt: skip


# Weights


def test_advantage_weights_are_those_on_paper():
    """The baseline is 14/3 + 3 s_0, so the advantages are -5/3, 4/3 and 1/3: the second is the best."""
    weights = AdvantageWeights(temperature=0.5)(three_episodes())
    assert weights.dtype == torch.float64
    worst, best, middle = 1.0, math.exp(1 / 0.5), math.exp(2 / 3 / 0.5)
    mean = (2 * worst + best + 3 * middle) / 6
    expected = torch.tensor([worst, worst, best, middle, middle, middle], dtype=torch.float64) / mean
    torch.testing.assert_close(weights, expected)


def test_the_baseline_is_least_squares_of_many_episodes_and_the_mean_where_observations_tell_nothing():
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(20_000, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 100, 0]) + 7
    returns = 5 + 2 * observations[:, 0] - 0.1 * observations[:, 1]
    torch.testing.assert_close(linear_regression(observations, returns, observations), returns, rtol=0, atol=0.02)
    constant = torch.full((4, 2), 0.1, dtype=torch.float64)
    same = linear_regression(constant, torch.arange(4).double(), constant)
    assert same.tolist() == [1.5] * 4


def test_the_baseline_is_the_same_block_by_block(monkeypatch):
    observations, returns = torch.randn(50, 3), torch.randn(50)
    rows = torch.randperm(50)[:40]
    whole = linear_regression(observations[rows], returns[rows], observations)
    monkeypatch.setattr("dawm.data.weights.BLOCK", 7)
    torch.testing.assert_close(linear_regression(observations, returns[rows], observations, rows), whole)


def test_few_episodes_of_many_dimensions_keep_their_advantages():
    """Least squares would fit them exactly, and rank them by rounding errors."""
    observations = torch.randn(10, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    returns = torch.arange(10).double()
    advantages = returns - linear_regression(observations, returns, observations)
    assert torch.corrcoef(torch.stack([advantages, returns]))[0, 1] > 0.9


@pytest.mark.parametrize("returns", [(3.3, 3.3, 3.3), (0.0, 0.0, 0.0)])
def test_equal_returns_weigh_alike(returns):
    weights = AdvantageWeights()(three_episodes(returns))
    torch.testing.assert_close(weights, torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize(
    ("share", "weights"),
    [(0.1, [0, 0, 0, 2, 2, 2]), (0.5, [0, 0, 0, 2, 2, 2]), (0.51, [0, 0, 1.5, 1.5, 1.5, 1.5]), (1.0, [1] * 6)],
)
def test_the_top_share_is_the_best_episodes_whole(share, weights):
    assert TopShare(share)(three_episodes()).tolist() == pytest.approx(weights)


@pytest.mark.parametrize("make", [lambda: AdvantageWeights(0.0), lambda: TopShare(0.0), lambda: TopShare(1.1)])
def test_a_setting_out_of_range_is_refused(make):
    with pytest.raises(UserError, match=r"--(AdvantageWeights.temperature|TopShare.share): got .*, expected .*above 0"):
        make()


# Drawing


def test_rows_are_drawn_as_often_as_their_weights_say():
    weights = torch.tensor([0.0, 1, 3, 3, 0, 0, 4, 1e-9, 0], dtype=torch.float64)
    drawn = RowStream(0, WeightedRows(weights)).draw(9, 10, 11_000)
    assert drawn.shape == (10, 11_000)
    counts = drawn.flatten().bincount(minlength=9) / 10_000
    torch.testing.assert_close(counts, weights.float(), rtol=0, atol=0.05)  # five standard deviations
    assert not counts[[0, 4, 5, 8]].any()


@pytest.mark.parametrize(("number", "row"), [(0.0, 1), (0.5 - 2**-53, 2), (0.5, 4), (1 - 2**-53, 5)])
def test_the_extreme_numbers_draw_rows_that_can_be_drawn(number, row, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, generator: torch.full(shape, number, dtype=dtype))
    weights = torch.tensor([0, 0.1, 0.1, 0, 0.1, 0.1, 0], dtype=torch.float64)
    assert WeightedRows(weights).draw((1,), torch.Generator()).tolist() == [row]


def test_rounding_leads_to_no_other_run(monkeypatch):
    """Ten rows that together weigh half of what the first one's weight is rounded by."""
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, generator: torch.full(shape, 1 - 2**-52, dtype=dtype))
    weights = torch.tensor([1.0] + [1.2e-17] * 10, dtype=torch.float64)
    assert WeightedRows(weights).draw((1,), torch.Generator()).tolist() == [1]


def test_uniform_rows_are_still_those_of_randint(dataset):
    loader = module(dataset, updates_per_step=2).mixed_loader(4)
    generator = torch.Generator().manual_seed(derive_seed(0, 0, "real"))
    rows = torch.cat([batch.observations[..., 0] for batch in loader])
    assert torch.equal(rows, torch.randint(26, (4, 10), generator=generator).float())


@pytest.mark.parametrize("settings", [{}, {"memory_limit": 0.0}], ids=["memory", "mapped"])
def test_weighted_batches_hold_the_chosen_rows_and_resume(dataset, settings):
    """The rows 20 to 25 are the episode of the best return, 8 to 14 the second best."""
    settings = settings | {"real_weights": TopShare(0.4), "synthetic_fraction": 0.3}
    data = module(dataset, **settings)
    whole = flat(data.mixed_loader(60))
    rows = torch.cat([batch[0][:, 0] for batch in whole])
    assert rows.unique().tolist() == [*range(8, 15), *range(20, 26)]
    other = module(dataset, **settings, updates_per_step=7)
    other.refill(synthetic(4))
    assert_equal(
        [[v[:7] for v in batch] for batch in flat(other.mixed_loader(60))], [[v[:7] for v in b] for b in whole]
    )
    resumed = module(dataset, **settings).mixed_loader(60)
    resumed.load_state_dict({"drawn": 23})
    assert_equal(flat(resumed), whole[23:])


def test_only_the_agent_draws_by_weight(dataset):
    weighted, uniform = module(dataset, real_weights=TopShare(0.1)), module(dataset)
    for name in ("segment_loader", "transition_loader"):
        assert_equal(flat(getattr(weighted, name)(4)), flat(getattr(uniform, name)(4)))


class Wrong(RowWeights):
    def __init__(self, weights):
        self.weights = torch.tensor(weights)

    def __call__(self, episodes):
        return self.weights


@pytest.mark.parametrize("weights", [[1.0] * 25, [-1.0] + [1.0] * 25, [0.0] * 26, [math.nan] * 26, [math.inf] * 26])
def test_weights_that_cannot_be_drawn_by_are_refused(dataset, weights):
    with pytest.raises(UserError, match=r"--data.real_weights: got .*, expected .* each of 26 rows"):
        module(dataset, real_weights=Wrong(weights))


# Which rows are real


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_batch_says_which_of_its_rows_are_real(dataset, seeds):
    data = module(dataset, synthetic_fraction=0.3)
    assert all((batch.real == 1).all() for batch in data.mixed_loader(4, seeds=seeds))
    data.refill(synthetic(4))
    for batch in data.mixed_loader(4, seeds=seeds):
        assert torch.equal(batch.real, (batch.rewards >= 0).float())
        assert (batch.real.sum(dim=-1) == 7).all()
    single = next(iter(data.mixed_loader(1)))[0]
    assert single.real.shape == single.rewards.shape == (10,)


def test_the_pairs_of_the_inverse_dynamics_are_all_real(dataset):
    assert all((batch.real == 1).all() for batch in module(dataset).transition_loader(4))


# A fraction of the episodes


def test_a_fraction_of_the_episodes_is_whole_episodes_for_everything(dataset):
    whole, half = (module(dataset, episode_fraction=f, bootstrap_truncated=False) for f in (1.0, 0.5))
    episodes = half.episodes
    kept = episodes.transitions.observations[episodes.starts, 1].long()
    assert len(kept) == 3
    assert kept.tolist() == sorted(kept.tolist())
    assert torch.equal(episodes.lengths, whole.episodes.lengths[kept])
    assert torch.equal(episodes.terminated, whole.episodes.terminated[kept])
    assert torch.equal(episodes.episode_returns, whole.episodes.episode_returns[kept])
    rows = torch.isin(whole.episodes.transitions.observations[:, 1], kept.float())
    assert torch.equal(episodes.rows, whole.episodes.rows[rows])
    assert torch.equal(half.returns_to_go, whole.returns_to_go[rows])
    assert torch.equal(episodes.high, episodes.rows.amax(dim=0))
    assert episodes.fingerprint != whole.episodes.fingerprint
    assert sorted([*half.training_episodes, *half.validation_episodes]) == [0, 1, 2]
    drawn = {int(e) for batch in half.mixed_loader(8) for e in batch.observations[..., 1].unique()}
    assert drawn == set(kept.tolist())


def test_smaller_fractions_are_within_larger_ones_and_another_seed_draws_others(dataset):
    def kept(fraction, seed=0):
        episodes = module(dataset, episode_fraction=fraction, seed=seed, horizon=1).episodes
        return set(episodes.transitions.observations[:, 1].tolist())

    chains = [[kept(fraction, seed) for fraction in (0.01, 0.34, 0.67, 1.0)] for seed in range(4)]
    for chain in chains:
        assert [len(episodes) for episodes in chain] == [1, 2, 4, 6]
        assert all(small < large for small, large in zip(chain, chain[1:]))
    assert len({frozenset(chain[1]) for chain in chains}) > 1
    assert kept(0.5) == kept(0.5)


def test_a_fraction_of_data_beyond_memory_has_to_fit_into_it(dataset):
    with pytest.raises(UserError, match=r"--data.memory_limit: got 0.0, expected at least .* --data.episode_fraction"):
        module(dataset, memory_limit=0.0, episode_fraction=0.5)
    size = 26 * 7 * 4 / 2**30
    mapped = module(dataset, memory_limit=0.6 * size, episode_fraction=0.5)
    assert mapped.episodes.cache is None
    assert torch.equal(mapped.episodes.rows, module(dataset, episode_fraction=0.5).episodes.rows)
