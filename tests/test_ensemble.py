"""Rollouts of the policy in the forward models."""

import pytest
import torch
from small_world_model import model
from torch.testing import assert_close

from dawm.agents import TD3BC
from dawm.callbacks import RegenerateRollouts
from dawm.data.module import TransitionDataModule
from dawm.errors import UserError
from dawm.inverse_dynamics import InverseDynamics
from dawm.synthesis.ensemble import EnsembleSynthesizer
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
    return synthesizer.imagine(first, torch.full((len(first), 1), 0.25), torch.zeros(len(first)), generator)


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
    callback = RegenerateRollouts(imagination="ensemble")
    with pytest.raises(UserError, match=r"first_action: got 'recorded', expected policy"):
        callback.connect(model(forward_members=2), InverseDynamics(2, 1))
    callback = RegenerateRollouts(imagination="ensemble", first_action="policy")
    with pytest.raises(UserError, match=r"forward_members: got 0, expected at least 1, as .*imagination"):
        callback.connect(model(forward_members=0), InverseDynamics(2, 1))


def test_rows_that_terminate_get_the_reward_in_the_agents_batches_alone(dataset):
    """Rewards are 0.25 to 25.25, and 3 of 26 rows terminate."""
    data = TransitionDataModule(dataset, horizon=1, batch_size=100, updates_per_step=1, termination_reward=-100.0)
    (batch,) = data.mixed_loader(1, squeeze=True)
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
