"""Offline data of five tiny problems whose values are known, and the contract that every agent keeps."""

import math
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import data_of, update_each
from torch.utils.data import DataLoader

from dawm.agents import IQL, TD3BC, OfflineAgent
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Transitions
from dawm.errors import UserError

SETTINGS = {"hidden": (32, 32), "learning_rate": 3e-3, "tau": 0.05, "discount": 0.9}
AGENTS = [
    pytest.param(lambda **kwargs: TD3BC(1, 1, **SETTINGS | kwargs), id="td3_bc"),
    pytest.param(lambda **kwargs: IQL(1, 1, **SETTINGS | kwargs), id="iql"),
    pytest.param(lambda **kwargs: IQL(1, 1, deterministic_actor=True, **SETTINGS | kwargs), id="iql_deterministic"),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def uniform(rows: int = 512) -> Transitions:
    """Terminated one-step episodes with observations and actions all over [-1, 1] and reward 0."""
    observations, actions = torch.rand(2, rows, 1) * 2 - 1
    return Transitions(observations, actions, torch.zeros(rows), observations, torch.ones(rows))


def train(agent: OfflineAgent, data: Transitions, updates: int = 400, batch_size: int = 64) -> OfflineAgent:
    update_each(agent, (data[torch.randint(len(data), (batch_size,))] for _ in range(updates)))
    return agent


def values(agent: OfflineAgent, data: Transitions) -> torch.Tensor:
    """The mean of both critics at the data's observations and actions, shape (N,)."""
    inputs = torch.cat([agent.observation_normalizer(data.observations), data.actions], dim=1)
    return agent.critics(inputs).detach().squeeze(-1).mean(dim=0)


# Probe problems


@pytest.mark.parametrize("make", AGENTS)
def test_constant_reward(make):
    data = replace(uniform(), rewards=torch.ones(512))
    error = values(train(make(), data), data) - 1
    assert error.abs().max() < 0.1


@pytest.mark.parametrize("make", AGENTS)
def test_reward_depends_on_observation(make):
    data = uniform()
    data = replace(data, rewards=data.observations[:, 0].sign())
    data = data[data.observations[:, 0].abs() > 0.2]
    error = values(train(make(), data, updates=800), data) - data.rewards  # a step is harder than a constant
    assert error.abs().max() < 0.1


@pytest.mark.parametrize("make", AGENTS)
def test_two_steps_with_discounting(make):
    # observation 0 leads to observation 1 without reward, observation 1 ends the task with reward 1
    first = torch.arange(512) % 2 == 0
    observations = (~first).float().unsqueeze(-1)
    data = Transitions(observations, torch.rand(512, 1) * 2 - 1, (~first).float(), torch.ones(512, 1), (~first).float())
    learnt = values(train(make(), data), data)
    assert (learnt[first] - 0.9).abs().max() < 0.1
    assert (learnt[~first] - 1.0).abs().max() < 0.1


@pytest.mark.parametrize("make", AGENTS)
def test_reward_depends_on_action(make):
    # two actions in the data, the rarer one better: a clone of the data would prefer the other
    data = uniform()
    good = torch.arange(512) % 4 == 0
    data = replace(data, actions=torch.where(good, 0.8, -0.8).unsqueeze(-1), rewards=torch.where(good, 1.0, -1.0))
    agent = train(make(), data)
    error = values(agent, data) - data.rewards
    assert error.abs().max() < 0.1
    assert agent.act(data.observations).min() > 0.4


@pytest.mark.parametrize("make", AGENTS)
@pytest.mark.parametrize(("termination", "value"), [(0.0, 2.0), (1.0, 1.0)])
def test_truncated_end_bootstraps_and_terminated_end_does_not(make, termination, value):
    data = uniform()
    data = replace(data, rewards=torch.ones(512), terminations=torch.full((512,), termination))
    error = values(train(make(discount=0.5), data), data) - value
    assert error.abs().max() < 0.1


# The contract


@pytest.mark.parametrize("make", AGENTS)
def test_actor_moves_in_units_of_the_data(make):
    # observations far from 0: without normalisation in `act` as in `update` the policy would not distinguish them
    data = uniform()
    data = replace(data, actions=data.observations.sign() / 2, rewards=torch.ones(512))
    data = data[data.observations[:, 0].abs() > 0.2]
    far = replace(
        data, observations=data.observations * 100 + 5000, next_observations=data.next_observations * 100 + 5000
    )
    agent = make()
    agent.fit_normalizers(data_of(far, [0.0, 1000.0]))
    prepared = agent.prepare(far)
    assert torch.equal(prepared.observations, prepared.next_observations)
    train(agent, far)
    assert torch.equal(agent.act(far.observations).sign(), data.actions.sign())


def test_rewards_are_scaled_to_a_span_of_1000_and_shifted():
    agent = IQL(1, 1, normalize_rewards=True, reward_shift=-1.0)
    data = replace(uniform(), rewards=torch.full((512,), 3.0))
    agent.fit_normalizers(data_of(data, [100.0, 600.0, 300.0]))
    torch.testing.assert_close(agent.prepare(data).rewards, torch.full((512,), 3.0 * 1000 / 500 - 1))
    agent.fit_normalizers(data_of(data, [600.0, 600.0]))  # which says nothing about the scale
    torch.testing.assert_close(agent.prepare(data).rewards, torch.full((512,), 3.0 - 1))


def test_normalisation_can_be_switched_off():
    agent = TD3BC(1, 1, normalize_observations=False)
    data = uniform()
    agent.fit_normalizers(data_of(data))
    assert torch.equal(agent.prepare(data).observations, data.observations)
    assert torch.equal(agent.prepare(data).rewards, data.rewards)


def test_td3_bc_actor_loss_is_the_paper_s():
    agent = TD3BC(1, 1, **SETTINGS, alpha=1.5)
    batch = agent.prepare(uniform(64))
    loss, _ = agent.actor_loss(batch)
    actions = agent.actor(batch.observations).tanh()
    first = agent.critics(torch.cat([batch.observations, actions], dim=1))[0, :, 0]
    expected = -1.5 / first.abs().mean() * first.mean() + (actions - batch.actions).square().mean()
    torch.testing.assert_close(loss, expected)


def mixed(seeds: int = 1) -> Transitions:
    """24 rows, of which the last 8 are synthetic; with a leading dimension for several seeds."""
    batch = replace(uniform(24), rewards=torch.randn(24), terminations=torch.zeros(24))
    batch = replace(batch, real=(torch.arange(24) < 16).float())
    return batch if seeds == 1 else batch._apply(lambda values: values.expand(seeds, *values.shape))


def actor_gradient(agent: OfflineAgent, batch: Transitions) -> torch.Tensor:
    loss = agent.actor_loss(batch)[0] if isinstance(agent, TD3BC) else agent.total_loss(batch)[0]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), list(agent.actor.parameters()))])


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize(
    ("make", "only", "rest"),
    [(TD3BC, {"clone_real_only": True}, True), (IQL, {"actor_on_real": True}, False)],
    ids=["td3_bc", "iql"],
)
def test_a_cloned_action_is_a_real_row_s(make, only, rest, seeds):
    """Synthetic rows reach TD3+BC's actor by the value term, and IQL's not at all."""
    batch, noise = mixed(seeds), torch.rand(24, 1)
    foreign = replace(batch, actions=torch.where(batch.real.unsqueeze(-1) == 1, batch.actions, noise))
    elsewhere = batch.observations + (1 - batch.real.unsqueeze(-1))
    for settings, equal in ((only, True), ({}, False)):
        agent = make(1, 1, **SETTINGS, seeds=seeds, **settings)
        gradient = actor_gradient(agent, batch)
        assert torch.equal(gradient, actor_gradient(agent, foreign)) == equal
        assert torch.equal(gradient, actor_gradient(agent, replace(batch, observations=elsewhere))) == (
            equal and not rest
        )


def test_td3_bc_scales_by_the_real_rows_values():
    batch = mixed()
    agent = TD3BC(1, 1, **SETTINGS, alpha=1.5, scale_on_real=True)
    actions = agent.actor(batch.observations).tanh()
    values = agent.critics(torch.cat([batch.observations, actions], dim=1))[0, :, 0]
    expected = -1.5 / values[:16].abs().mean() * values.mean() + (actions - batch.actions).square().mean()
    torch.testing.assert_close(agent.actor_loss(batch)[0], expected)


@pytest.mark.parametrize("real", [None, torch.ones(64)], ids=["not said", "all"])
@pytest.mark.parametrize(
    ("make", "settings"), [(TD3BC, ("clone_real_only", "scale_on_real")), (IQL, ("actor_on_real",))]
)
def test_losses_over_real_rows_change_no_bit_where_all_are_real(make, settings, real):
    agents = []
    for value in (True, False):
        torch.manual_seed(3)
        agent = make(1, 1, **SETTINGS, **dict.fromkeys(settings, value))
        update_each(agent, [replace(uniform(64), rewards=torch.randn(64), real=real if value else None)] * 4)
        agents.append(agent)
    assert equal_weights(*agents)


def test_losses_over_real_rows_need_some(dataset):
    for agent, fraction in ((TD3BC(2, 1, clone_real_only=True), 1.0), (IQL(2, 1, actor_on_real=True), 0.95)):
        data = TransitionDataModule(dataset, horizon=2, batch_size=8, synthetic_fraction=fraction)
        with pytest.raises(UserError, match=r"--data.synthetic_fraction: got .*, expected one that leaves real rows"):
            agent.train_loader(data, 1, 0)
    assert len(TD3BC(2, 1).train_loader(data, 1, 0)) == 1


def test_td3_bc_actor_step_leaves_the_critics_alone():
    agent = TD3BC(1, 1, **SETTINGS)
    batch = agent.prepare(uniform(64))
    before = [p.detach().clone() for p in agent.critics.parameters()]
    loss, _ = agent.actor_loss(batch)
    agent.minimize(loss, agent.actor_optimizer)
    assert all(p.grad is None for p in agent.critics.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, agent.critics.parameters()))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in agent.actor.parameters())


def test_td3_bc_updates_actor_and_targets_every_second_time():
    agent = TD3BC(1, 1, **SETTINGS, policy_every=2)
    actor = [p.detach().clone() for p in agent.actor.parameters()]
    targets = [p.detach().clone() for p in agent.target_critics.parameters()]
    assert "actor_loss" not in agent.update(uniform(64))
    assert all(torch.equal(a, b) for a, b in zip(actor, agent.actor.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(targets, agent.target_critics.parameters()))
    agent.update_index = 1
    assert "actor_loss" in agent.update(uniform(64))
    assert not any(torch.equal(a, b) for a, b in zip(actor, agent.actor.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(targets, agent.target_critics.parameters()))


@pytest.mark.parametrize("make", AGENTS)
def test_targets_have_no_gradient_and_move_by_tau(make):
    agent = make(tau=0.1)
    pairs = [(agent.target_critics, agent.critics)]
    if isinstance(agent, TD3BC):
        pairs.append((agent.target_actor, agent.actor))
        agent.policy_every = 1
    for target, network in pairs:
        assert not any(p.requires_grad for p in target.parameters())
        assert all(torch.equal(a, b) for a, b in zip(target.parameters(), network.parameters()))
    before = [[p.detach().clone() for p in target.parameters()] for target, _ in pairs]
    agent.update(uniform(64))
    for (target, network), old in zip(pairs, before):
        for moved, source, start in zip(target.parameters(), network.parameters(), old):
            assert not torch.equal(source, start)
            torch.testing.assert_close(moved, start + 0.1 * (source - start))


def test_actor_learning_rate_follows_a_cosine_over_the_run():
    rate = SETTINGS["learning_rate"]
    agent = IQL(1, 1, **SETTINGS)
    assert agent.learning_rates(0) == agent.learning_rates(50) == [rate, rate]  # no trainer sets a length
    agent._trainer = SimpleNamespace(max_steps=100)
    assert agent.learning_rates(50) == pytest.approx([rate / 2, rate])
    agent.run_updates(uniform(64)[None], 50, [agent.learning_rates(50)])
    assert [group["lr"] for group in agent.optimizer.param_groups] == pytest.approx([rate / 2, rate])
    td3_bc = TD3BC(1, 1, **SETTINGS, decay_actor_learning_rate=True)
    td3_bc._trainer = SimpleNamespace(max_steps=100)
    assert td3_bc.learning_rates(50) == pytest.approx([rate, rate / 2])
    assert TD3BC(1, 1, **SETTINGS).learning_rates(50) is None
    constant = IQL(1, 1, **SETTINGS, decay_actor_learning_rate=False)
    constant.run_updates(uniform(64)[None], 50, [constant.learning_rates(50)])
    assert [group["lr"] for group in constant.optimizer.param_groups] == [rate] * 2


def test_iql_draws_from_its_gaussian_and_drops_units_in_training_only():
    agent = IQL(1, 1, **SETTINGS, actor_dropout=0.5)
    observations = uniform().observations
    agent.log_std.data.fill_(-1.5)
    assert agent.train().act(observations).ne(agent.act(observations)).any()
    agent.eval()
    mean = agent.act(observations)
    assert torch.equal(mean, agent.act(observations))
    draws = agent.act(observations, deterministic=False)
    assert draws.abs().max() <= 1
    assert (draws - mean).std().item() == pytest.approx(math.exp(-1.5), rel=0.1)


# Under Lightning


def fit(agent: OfflineAgent, data: Transitions, updates: int, chunk: int, root, ckpt_path=None) -> L.Trainer:
    """Trains on the same batches of 16 rows, handed over `chunk` at a time."""
    chunks = data.pack().view(-1, chunk, 16, 5)
    loader = DataLoader([Transitions.unpack(rows, 1, 1) for rows in chunks], batch_size=None)
    trainer = L.Trainer(
        max_steps=updates,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    torch.manual_seed(1)
    trainer.fit(agent, loader, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def equal_weights(a: OfflineAgent, b: OfflineAgent) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers and logging intervals
@pytest.mark.parametrize("make", AGENTS)
def test_results_do_not_depend_on_batches_per_step(make, tmp_path):
    data = replace(uniform(16 * 12), rewards=torch.randn(16 * 12))
    agents = []
    for chunk in (1, 4):
        torch.manual_seed(2)
        agent = make()
        trainer = fit(agent, data, 10, chunk, tmp_path)  # 10 is no multiple of 4
        assert trainer.global_step == 10
        agents.append(agent)
    torch.manual_seed(2)
    plain = make()
    plain._trainer = SimpleNamespace(max_steps=10)
    torch.manual_seed(1)
    for index, rows in enumerate(data.pack().view(12, 1, 16, 5)[:10]):
        plain.run_updates(Transitions.unpack(rows, 1, 1), index, [plain.learning_rates(index)])
    assert equal_weights(agents[0], agents[1])
    assert equal_weights(agents[0], plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", AGENTS)
def test_checkpoint_holds_everything(make, tmp_path):
    data = replace(uniform(16 * 12), rewards=torch.randn(16 * 12))
    agent = make()
    agent.fit_normalizers(data_of(replace(data, observations=data.observations * 3 + 7), [0.0, 10.0]))
    trainer = fit(agent, data, 3, 1, tmp_path)
    trainer.save_checkpoint(tmp_path / "agent.ckpt")
    loaded = type(agent).load_from_checkpoint(tmp_path / "agent.ckpt", weights_only=True)
    assert equal_weights(agent, loaded)
    assert torch.equal(agent.act(data.observations), loaded.act(data.observations))
    assert loaded.discount == agent.discount

    # from the middle of a pair of TD3+BC's updates: the loaded optimisers and the count of updates must be as they were
    rest = data[16 * 3 :]
    resumed = make()
    chunks = rest.pack().view(-1, 1, 16, 5)
    agent._trainer = SimpleNamespace(max_steps=8)
    torch.manual_seed(1)
    for index, rows in enumerate(chunks[:5], start=3):
        agent.run_updates(Transitions.unpack(rows, 1, 1), index, [agent.learning_rates(index)])
    fit(resumed, rest, 8, 1, tmp_path, ckpt_path=tmp_path / "agent.ckpt")
    assert equal_weights(agent, resumed)


def small(dataset: str) -> TransitionDataModule:
    return TransitionDataModule(dataset, horizon=2, batch_size=8, updates_per_step=2, synthetic_fraction=0.0)


@pytest.mark.parametrize("make", [TD3BC, IQL])
def test_a_plain_trainer_takes_the_statistics_from_the_data(make, dataset, make_trainer):
    agent, data = make(2, 1, hidden=(8,)), small(dataset)
    make_trainer(4).fit(agent, datamodule=data)
    torch.testing.assert_close(agent.observation_normalizer.mean, data.episodes.transitions.observations.mean(dim=0))
    returns = data.episodes.episode_returns
    scale = 1000 / (returns.max() - returns.min()) if isinstance(agent, IQL) else torch.ones(())
    torch.testing.assert_close(agent.reward_scale, scale)


@pytest.mark.parametrize("make", [TD3BC, IQL])
def test_a_loaded_agent_keeps_its_statistics_on_other_data(make, dataset, write_dataset, make_trainer, tmp_path):
    agent, first, other = make(2, 1, hidden=(8,)), small(dataset), small(write_dataset((4, 9), (True, True), first=100))
    trainer = make_trainer(4)
    trainer.fit(agent, datamodule=first)
    trainer.save_checkpoint(tmp_path / "agent.ckpt")
    loaded = make.load_from_checkpoint(tmp_path / "agent.ckpt", weights_only=True)
    expected, foreign = make(2, 1), make(2, 1)
    expected.fit_normalizers(first)
    foreign.fit_normalizers(other)
    assert not torch.equal(expected.observation_normalizer.mean, foreign.observation_normalizer.mean)
    for trained in (agent, loaded):
        make_trainer(4).fit(trained, datamodule=other)
        assert torch.equal(trained.observation_normalizer.mean, expected.observation_normalizer.mean)
        assert torch.equal(trained.reward_scale, expected.reward_scale)


@pytest.mark.filterwarnings("ignore")
def test_a_fit_without_a_data_module_warns_of_missing_statistics(tmp_path):
    data = uniform(32)
    with pytest.warns(UserWarning, match="the normalizers of TD3BC are not fitted.*datamodule="):
        fit(TD3BC(1, 1, **SETTINGS), data, 2, 1, tmp_path)
    fitted = TD3BC(1, 1, **SETTINGS)
    fitted.fit_normalizers(data_of(data))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "TD3BC trains on")
        fit(fitted, data, 2, 1, tmp_path)


def test_half_precision_with_loss_scaling_is_refused():
    agent = TD3BC(1, 1)
    agent._trainer = SimpleNamespace(precision="16-mixed")
    with pytest.raises(UserError, match="trainer.precision"):
        agent.on_fit_start()


# Several seeds side by side


def member(agent, index, make):
    """One of several seeds as an agent of its own: the same weights, optimiser state included."""
    alone = make()
    state = {k: v[index] if v.shape[:1] == (agent.seeds,) else v for k, v in agent.state_dict().items()}
    alone.load_state_dict(state)
    return alone


@pytest.mark.parametrize("make", AGENTS)
def test_a_seed_among_several_learns_as_one_alone(make):
    make = partial(make, **({} if "IQL" in make().__class__.__name__ else {"policy_noise": 0.0}))
    agent = make(seeds=3)
    alone = [member(agent, index, make) for index in range(3)]
    data = uniform()
    data = replace(data, rewards=data.observations[:, 0].sign(), terminations=(data.actions[:, 0] > 0).float())
    rows = torch.randint(len(data), (4, 3, 64))
    update_each(agent, data[rows])
    for index in range(3):
        update_each(alone[index], data[rows[:, index]])
    actions = agent.act(data.observations)
    assert actions.shape == (3, len(data), 1)
    assert not torch.allclose(actions[0], actions[1], atol=1e-3)
    for index in range(3):
        torch.testing.assert_close(actions[index], alone[index].act(data.observations), atol=1e-5, rtol=1e-4)
        for key, value in member(agent, index, make).state_dict().items():
            torch.testing.assert_close(value, alone[index].state_dict()[key], atol=1e-5, rtol=1e-4, msg=key)
