"""What other methods do with the same parts: rollouts in the forward models, value expansion, a reward for falls."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from small_world_model import model
from torch.testing import assert_close

from dawm.agents import IQL, TD3BC
from dawm.agents.losses import td_target
from dawm.callbacks import RegenerateRollouts
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Transitions
from dawm.errors import UserError
from dawm.inverse_dynamics import InverseDynamics
from dawm.synthesis.ensemble import EnsembleSynthesizer
from dawm.synthesis.rollouts import Rollouts
from dawm.synthesis.starts import Starts


def knowing(world_model, offsets=(0.0, 0.0)):
    """Its forward models know s' = s + a (1, -1), an end at s'_1 > 1 and r = s_1 + a, plus an offset each."""

    def forward(codec, observations, actions):
        after = observations + actions * torch.tensor([1.0, -1.0])
        ends = 2 * (after[:, :1] > 1).float() - 1
        members = []
        for offset in offsets:
            rewards = observations[:, :1] + actions + offset
            parts = codec.difference_normalizer(after - observations), codec.reward_normalizer(rewards), ends
            members.append(torch.cat(parts, dim=-1))
        return torch.stack(members)

    world_model.forward_model.forward = forward
    return world_model.eval()


def rollouts(offsets=(0.0, 0.0), starts=((0.0, 0.0), (0.75, 5.0)), noise=0.0, seed=0):
    """Of 3 steps; the first action is 0.25, the policy's are half of the first observation."""
    world_model = knowing(model(horizon=3, forward_members=2), offsets)
    policy = Starts(policy=lambda observations: observations[:, :1] / 2, noise=noise)
    synthesizer, first = EnsembleSynthesizer(world_model, InverseDynamics(2, 1), policy), torch.tensor(starts)
    generator = torch.Generator().manual_seed(seed)
    start = first, torch.full((len(first), 1), 0.25), torch.zeros(len(first))
    return synthesizer.judge(synthesizer.imagine(start, generator))


def test_a_perfect_ensemble_follows_a_linear_system_by_hand():
    """From (0, 0): 0, .25, .375, .5625. From (.75, 5): 1, which does not end it, 1.5, which does."""
    made = rollouts()
    assert_close(made.observations[0], torch.tensor([[0, 0], [0.25, -0.25], [0.375, -0.375], [0.5625, -0.5625]]))
    assert_close(made.actions[..., 0], torch.tensor([[0.25, 0.125, 0.1875], [0.25, 0.5, 0.75]]))
    assert_close(made.rewards, torch.tensor([[0.25, 0.375, 0.5625], [1.0, 1.5, 2.25]]))
    assert made.lengths.tolist() == [3, 2]
    assert made.transitions().terminations.tolist() == [0, 0, 0, 0, 1]
    assert_close(made.transitions().next_observations[-1], torch.tensor([1.5, 4.25]))
    assert {fate: count for fate, count in made.counts.items() if count} == {"kept": 5, "after_end": 1}


def test_a_member_is_drawn_for_every_step():
    made = rollouts(offsets=(0.0, 1.0), starts=[(0.0, 0.0)] * 100)
    drawn = (made.rewards - torch.tensor([0.25, 0.375, 0.5625])).round(decimals=4)
    assert set(drawn.flatten().tolist()) == {0.0, 1.0}
    assert len(drawn.unique(dim=0)) == 8


def test_the_policys_actions_are_noisy_after_the_first():
    made = rollouts(starts=[(0.0, 0.0)] * 2000, noise=0.1)
    assert (made.actions[:, 0] == 0.25).all()
    errors = made.actions[:, 1:, 0] - made.observations[:, 1:-1, 0] / 2
    assert errors.std().item() == pytest.approx(0.1, rel=0.1)


class Watching(TD3BC):
    """Keeps its batches; learns fast, so that its policy soon differs."""

    batches: list

    def update(self, batch):
        self.batches.append(batch.pack())
        return super().update(batch)


@pytest.mark.parametrize("imagination", ["ensemble", "diffusion"])
def test_a_resumed_run_asks_the_policy_of_the_refill(imagination, dataset, make_trainer, tmp_path):
    """Two agents side by side, each with rollouts of its own; the batches after resuming are the same to the bit."""
    torch.manual_seed(0)
    world_model, inverse_dynamics = model(horizon=2, forward_members=2), InverseDynamics(2, 1)
    world_model.forward_model.network.weights.data.normal_(std=0.05)

    def start(max_steps, ckpt_path=None):
        data = TransitionDataModule(dataset, horizon=2, batch_size=6, updates_per_step=2)
        callback = RegenerateRollouts(
            4, 20, imagination=imagination, first_action="policy", margin=100.0, max_rejected=1.0,
            max_reward_drift=100.0, max_termination_drift=1.0,
        )  # fmt: skip
        callback.connect(world_model, inverse_dynamics)
        torch.manual_seed(0)
        agent = Watching(2, 1, hidden=(8,), learning_rate=0.05, seeds=2, policy_noise=0.0)
        agent.batches = []
        trainer = make_trainer(max_steps, callbacks=[callback])
        trainer.fit(agent, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return trainer, torch.stack(agent.batches)

    _, whole = start(14)
    trainer, _ = start(6)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, rest = start(14, tmp_path / "half.ckpt")
    assert torch.equal(rest, whole[6:])
    assert not torch.equal(whole[0, 0], whole[0, 1])


def test_it_needs_forward_models_and_the_policy():
    with pytest.raises(UserError, match=r"first_action: got 'recorded', expected policy"):
        RegenerateRollouts(imagination="ensemble")
    with pytest.raises(UserError, match=r"max_inconsistency: got 0.9, expected None, as imagination is ensemble"):
        RegenerateRollouts(imagination="ensemble", first_action="policy", max_inconsistency=0.9)
    callback = RegenerateRollouts(imagination="ensemble", first_action="policy")
    with pytest.raises(UserError, match=r"forward_members: got 0, expected at least 1, as .*imagination"):
        callback.connect(model(forward_members=0), InverseDynamics(2, 1))


def test_rows_that_terminate_get_the_reward_in_the_agents_batches_alone(dataset):
    """Rewards are 0.25 to 25.25, and 3 of 26 rows terminate."""
    data = TransitionDataModule(dataset, horizon=1, batch_size=100, updates_per_step=1, termination_reward=-100.0)
    ((batch,),) = data.mixed_loader(1)
    ended = batch.terminations > 0.5
    assert 0 < ended.sum() < 100
    assert (batch.rewards[ended] == -100).all()
    assert (batch.rewards[~ended] > 0).all()
    (pairs,) = data.transition_loader(1)
    assert pairs.terminations.any()
    assert (pairs.rewards > 0).all()
    assert (data.episodes.transitions.rewards > 0).all()
    with pytest.raises(UserError, match="termination_reward: got nan, expected a finite number"):
        TransitionDataModule(dataset, termination_reward=float("nan"))


def test_value_expansion_by_hand():
    """Three rollouts of two steps, discount 1/2: whole, ended by its first step, cut at the second; one is lost."""
    nan = float("nan")
    made = Rollouts(
        observations=torch.arange(12.0).view(4, 3, 1),
        actions=torch.tensor([[0.1, 0.9], [0.2, 0.9], [0.3, 0.9], [0.4, 0.9]]).unsqueeze(-1),
        rewards=torch.tensor([[4.0, 6.0], [5.0, 9.0], [3.0, nan], [nan, nan]]),
        next_observations=torch.arange(12.0).view(4, 3, 1)[:, 1:],
        terminations=torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
        lengths=torch.tensor([2, 1, 1, 0]),
        counts=Counter(kept=4),
    )
    rows = made.expansions(0.5)
    assert rows.observations[:, 0].tolist() == [0, 3, 6]
    assert_close(rows.actions[:, 0], torch.tensor([0.1, 0.2, 0.3]))
    assert rows.rewards.tolist() == [4 + 0.5 * 6, 5, 3]
    assert rows.next_observations[:, 0].tolist() == [2, 4, 7]
    assert rows.terminations.tolist() == [0, 1, 0]
    targets = td_target(rows.rewards, rows.terminations, torch.full((3,), 8.0), 0.5, rows.steps)
    assert targets.tolist() == [7 + 0.25 * 8, 5, 3 + 0.5 * 8]


@pytest.mark.parametrize("make", [partial(TD3BC, policy_noise=0.0), IQL])
def test_the_agents_bootstrap_over_the_steps_that_a_row_spans(make):
    """Rows of two steps at a discount of 0.9 are as rows of one at 0.81."""
    rows = Transitions(torch.randn(9, 2), torch.rand(9, 1), torch.randn(9), torch.randn(9, 2), torch.zeros(9))
    losses = []
    for discount, steps in ((0.9, 2.0), (0.81, 1.0), (0.81, None), (0.9, 1.0)):
        torch.manual_seed(0)
        agent = make(2, 1, hidden=(8,), discount=discount)
        for network in (agent.critics, agent.target_critics, getattr(agent, "value", agent.critics)):
            torch.nn.init.normal_(network.weights, generator=torch.Generator().manual_seed(1))
        batch = replace(rows, steps=None if steps is None else torch.full((9,), steps))
        losses.append(agent.critic_loss(batch)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) == pytest.approx(losses[2], rel=1e-5)
    assert losses[3] != pytest.approx(losses[1], rel=1e-3)


def test_recorded_rows_span_one_step_beside_expanded_ones(dataset):
    data = TransitionDataModule(dataset, horizon=1, batch_size=6, updates_per_step=2)
    real = data.episodes.transitions[:5]
    data.refill(real)
    assert next(iter(data.mixed_loader(2))).steps is None
    data.refill(replace(real, steps=torch.full((5,), 3.0)))
    batch = next(iter(data.mixed_loader(2, seeds=2)))
    assert torch.equal(batch.steps, torch.tensor([1.0, 1, 1, 3, 3, 3]).expand(2, 2, 6))
    assert_close(data.synthetic.steps, torch.full((5,), 3.0))
    assert batch.observations.shape == (2, 2, 6, 2)


def test_value_expansion_reaches_the_agent(dataset, make_trainer):
    """Every row of its batches begins at a recorded observation with the recorded action."""
    data = TransitionDataModule(dataset, horizon=2, batch_size=20, updates_per_step=2, synthetic_fraction=1.0)
    callback = RegenerateRollouts(4, 50, value_expansion=True, margin=1e3, max_reward_drift=1e3, max_rejected=1.0,
                                  max_termination_drift=1.0)  # fmt: skip
    callback.connect(model(horizon=2), InverseDynamics(2, 1))
    agent = Watching(2, 1, hidden=(8,))
    agent.batches = []
    make_trainer(4, callbacks=[callback]).fit(agent, datamodule=data)
    rows = Transitions.unpack(torch.cat(agent.batches), 2, 1)
    recorded = data.episodes.transitions
    assert set(rows.steps.tolist()) <= {1.0, 2.0}
    assert (rows.steps == 2).any()
    assert_close(rows.actions, recorded.actions[rows.observations[:, 0].long()])
    shifted = IQL(2, 1, hidden=(8,), reward_shift=-1.0)
    with pytest.raises(UserError, match=r"reward_shift: got -1.0, expected none"):
        make_trainer(4, callbacks=[callback]).fit(shifted, datamodule=data)
    data = TransitionDataModule(dataset, horizon=2, termination_reward=-100.0)
    with pytest.raises(UserError, match=r"termination_reward: got -100.0, expected none, as rows sum several rewards"):
        make_trainer(4, callbacks=[callback]).fit(agent, datamodule=data)
