"""The agents' arithmetic against numbers worked out by hand."""

import math

import pytest
import torch

from dawm.agents import losses
from dawm.training.updates import cosine_decay


def test_td_target_bootstraps_unless_terminated():
    rewards, next_values = torch.tensor([1.0, 1.0]), torch.tensor([10.0, 10.0], requires_grad=True)
    target = losses.td_target(rewards, torch.tensor([0.0, 1.0]), next_values, discount=0.9)
    assert target.tolist() == [10.0, 1.0]
    assert not target.requires_grad


def test_critic_loss_sums_over_critics_and_averages_over_rows():
    values = torch.tensor([[1.0, 2.0], [0.0, 4.0]])  # errors 0, 0 and -1, 2
    assert losses.critic_loss(values, torch.tensor([1.0, 2.0])).item() == pytest.approx(0 + (1 + 4) / 2)


def test_smoothed_actions_clips_noise_then_actions():
    noise = torch.tensor([[2.0, -0.1, -2.0]])
    actions = losses.smoothed_actions(torch.tensor([[0.0, 0.0, -0.9]]), noise, noise_clip=0.5)
    torch.testing.assert_close(actions, torch.tensor([[0.5, -0.1, -1.0]]))


def test_policy_improvement_weight_is_alpha_over_mean_absolute_value():
    values = torch.tensor([-1.0, 3.0], requires_grad=True)  # mean 1, mean absolute value 2
    weight = losses.policy_improvement_weight(values, alpha=2.5)
    assert weight.item() == pytest.approx(1.25)
    assert not weight.requires_grad
    assert math.isfinite(losses.policy_improvement_weight(torch.zeros(2), alpha=2.5))


def test_behaviour_cloning_loss_averages_over_rows_and_dimensions():
    loss = losses.behaviour_cloning_loss(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    assert loss.item() == pytest.approx(0.5)


def test_a_mask_takes_the_mean_over_its_rows_alone():
    values, mask = torch.tensor([-1.0, 100.0, 3.0]), torch.tensor([1.0, 0.0, 1.0])
    assert losses.policy_improvement_weight(values, alpha=2.5, mask=mask).item() == pytest.approx(1.25)
    actions = torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.0, 0.0]])
    loss = losses.behaviour_cloning_loss(actions, torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 2.0]]), mask)
    assert loss.item() == pytest.approx((1 + 4) / 4)
    seeds = losses.masked(torch.stack([values, values]), torch.stack([mask, 1 - mask])).mean(dim=-1)
    assert seeds.tolist() == pytest.approx([1, 100])


def test_a_mask_of_all_rows_changes_no_bit_and_one_of_none_leaves_nothing():
    values = torch.randn(37, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(losses.masked(values, torch.ones(37)), values)
    assert not losses.masked(values, torch.zeros(37)).any()


def test_expectile_loss_weighs_the_two_signs():
    # 0.7 * 2^2 for the positive error, 0.3 * 1^2 for the negative one
    assert losses.expectile_loss(torch.tensor([2.0, -1.0]), expectile=0.7).item() == pytest.approx((2.8 + 0.3) / 2)


def test_expectile_loss_is_least_at_the_expectile():
    # for values 0 and 1 the expectile e solves 0.9 (1 - e) = 0.1 e
    guess = torch.tensor(0.9, requires_grad=True)
    losses.expectile_loss(torch.tensor([0.0, 1.0]) - guess, expectile=0.9).backward()
    assert guess.grad.item() == pytest.approx(0, abs=1e-6)


def test_advantage_weights_are_bounded_and_constant_to_the_gradient():
    advantages = torch.tensor([0.0, math.log(2), 1e6, -1.0], requires_grad=True)
    weights = losses.advantage_weights(advantages, beta=3.0, max_weight=100.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 8.0, 100.0, math.exp(-3)]))
    assert not weights.requires_grad


def test_gaussian_log_likelihood_agrees_with_torch():
    generator = torch.Generator().manual_seed(0)
    actions, means = torch.randn(2, 5, 3, generator=generator)
    log_std = torch.tensor([-1.0, 0.0, 0.5])
    expected = torch.distributions.Normal(means, log_std.exp()).log_prob(actions).sum(dim=-1)
    torch.testing.assert_close(losses.gaussian_log_likelihood(actions, means, log_std), expected)


def test_cosine_decay_falls_from_one_to_zero():
    assert [cosine_decay(step, 100) for step in (0, 50, 100, 150)] == pytest.approx([1, 0.5, 0, 0])
    assert cosine_decay(25, 100) == pytest.approx(0.5 + math.sqrt(0.5) / 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda row, column: losses.td_target(row, row, column, 0.9),
        lambda row, column: losses.critic_loss(column[None], row),
        lambda row, column: losses.smoothed_actions(row, column, 0.5),
        lambda row, column: losses.behaviour_cloning_loss(row[:, None], column.expand(4, 2)),
        lambda row, column: losses.gaussian_log_likelihood(column, column, row),
        lambda row, column: losses.policy_improvement_weight(row, 2.5, column),
    ],
)
def test_a_column_is_refused_where_a_row_is_meant(call):
    with pytest.raises(ValueError, match="shapes differ"):
        call(torch.zeros(4), torch.zeros(4, 1))
