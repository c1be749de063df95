import re
import warnings

import pytest
import torch
from conftest import Recorder
from lightning.pytorch.loggers.logger import DummyLogger

from dawm.callbacks import RegenerateRollouts
from dawm.data.module import TransitionDataModule
from dawm.data.weights import TopShare
from dawm.errors import UserError
from dawm.inverse_dynamics import InferredActions
from dawm.synthesis.guards import DataStatistics
from dawm.synthesis.targets import ConstantReturn
from dawm.world_model import Imagined

HORIZON = 2
UNWATCHED = {"margin": 10.0, "max_reward_drift": 10.0, "max_termination_drift": 1.0}
NAN = float("nan")


class Imagining(torch.nn.Module):
    """Stays at the start, with a random negative reward: no recorded row looks like that."""

    device = torch.device("cpu")

    def __init__(self, jump=0.0, termination=0.0):
        super().__init__()
        self.jump, self.termination = jump, termination
        self.asked = []

    def imagine(self, observations, actions, returns_to_go, guidance=1.0, generator=None):
        self.asked.append((observations, actions, returns_to_go, guidance, self.training))
        path = observations.unsqueeze(1).repeat(1, HORIZON + 1, 1)
        path[:, 1:] += self.jump
        rewards = -1 - torch.rand(len(path), HORIZON, generator=generator)
        return Imagined(path, rewards, torch.full_like(rewards, self.termination))


class Replaying(torch.nn.Module):
    """Imagines the rows after the start as they were recorded, but for what is done to three of four rollouts."""

    device = torch.device("cpu")

    def __init__(self, data, spoil):
        super().__init__()
        self.real, self.spoil = data.episodes.transitions, spoil

    def imagine(self, observations, actions, returns_to_go, guidance=1.0, generator=None):
        rows = (observations[:, :1].long() + torch.arange(HORIZON)) % len(self.real)
        path = torch.cat([observations.unsqueeze(1), self.real.next_observations[rows]], dim=1)
        imagined = Imagined(path, self.real.rewards[rows], self.real.terminations[rows])
        self.spoil(*(part[: len(part) * 3 // 4] for part in imagined[:3]))
        return imagined


class Inferring(torch.nn.Module):
    def infer(self, observations, next_observations):
        return InferredActions(torch.full((len(observations), 1), 0.5), torch.zeros(len(observations)))


class Memory(DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        if "synthetic/kept" in metrics:
            self.rows.append((step, metrics))


@pytest.fixture
def data(dataset):
    return TransitionDataModule(dataset, horizon=HORIZON, batch_size=6, updates_per_step=2, synthetic_fraction=0.5)


def regenerate(every_n_steps=4, rollouts=20, jump=0.0, termination=0.0, **kwargs):
    callback = RegenerateRollouts(every_n_steps, rollouts, **UNWATCHED | kwargs)
    callback.connect(Imagining(jump, termination), Inferring())
    return callback


def replay(data, spoil, **kwargs):
    """A callback whose world model replays the data, as its guards are by default."""
    callback = RegenerateRollouts(4, 2000, **kwargs)
    callback.connect(Replaying(data, spoil), Inferring())
    return callback


def reported(trainer, recorder, data):
    """What the guards warn of in a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(recorder, datamodule=data)
    return [text for text in (str(warning.message) for warning in caught) if "RegenerateRollouts" in text]


def refills(callback, monkeypatch):
    """The updates for which the callback imagines, as they happen."""
    seen, refill = [], callback.refill

    def spy(trainer, step):
        seen.append(step)
        refill(trainer, step)

    monkeypatch.setattr(callback, "refill", spy)
    return seen


def imagine(callback, data, rank=0, step=0):
    """What the callback imagines."""
    synthesizer = callback.synthesizer(data, DataStatistics.of(data.episodes))
    return synthesizer.rollouts(data, callback.rollouts, callback.seed, rank, step).transitions()


# When


@pytest.mark.parametrize(("max_steps", "expected"), [(4, [0]), (8, [0, 4]), (10, [0, 4, 8]), (11, [0, 4, 8])])
def test_refills_before_training_and_every_n_updates_but_not_after_the_last(
    data, make_trainer, recorder, monkeypatch, max_steps, expected
):
    callback = regenerate()
    steps = refills(callback, monkeypatch)
    make_trainer(max_steps, callbacks=[callback]).fit(recorder, datamodule=data)
    assert steps == expected
    assert all((batch.rewards < 0).sum() == 3 for batch in recorder.batches)  # the very first batch, too


def test_a_refill_replaces_what_was_imagined_before(data, make_trainer, recorder):
    make_trainer(12, callbacks=[regenerate()]).fit(recorder, datamodule=data)
    imagined = [
        {r for batch in recorder.batches[first : first + 4] for r in batch.rewards.tolist() if r < 0}
        for first in (0, 4, 8)
    ]
    assert all(len(rewards) > 3 for rewards in imagined)
    assert not imagined[0] & imagined[1]
    assert not imagined[1] & imagined[2]


def test_a_callback_used_again_starts_again(data, make_trainer, recorder, monkeypatch):
    callback = regenerate()
    steps = refills(callback, monkeypatch)
    for _ in range(2):
        make_trainer(8, callbacks=[callback]).fit(recorder, datamodule=data)
    assert steps == [0, 4, 0, 4]


def test_a_resumed_run_trains_on_the_same_batches(dataset, make_trainer, recorder, monkeypatch, tmp_path):
    """It imagines again what was in use when the checkpoint was written, and resumes from there; so do the logs."""

    def start(max_steps, ckpt_path=None):
        data = TransitionDataModule(dataset, horizon=HORIZON, batch_size=6, updates_per_step=2, synthetic_fraction=0.5)
        callback = regenerate()
        steps = refills(callback, monkeypatch)
        trainer = make_trainer(max_steps, callbacks=[callback], logger=Memory())
        recorder.batches = []
        trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return trainer, steps, torch.stack([batch.pack() for batch in recorder.batches])

    trainer, _, whole = start(14)
    logged = trainer.logger.rows
    trainer, _, _ = start(6)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer, steps, rest = start(14, tmp_path / "half.ckpt")
    assert steps == [4, 8, 12]
    assert torch.equal(rest, whole[6:])
    assert trainer.logger.rows == logged[1:]


class Acting(Recorder):
    """Its policy follows its one weight, which every update changes; of two seeds the second's is the opposite."""

    def __init__(self, seeds=1):
        super().__init__()
        self.seeds = seeds

    def act(self, observations):
        actions = torch.tanh((self.weight.detach() - 1) / 10).expand(*observations.shape[:-1], 1)
        return actions if self.seeds == 1 else actions * torch.tensor([1.0, -1.0]).view(2, 1, 1)


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("stop", [4, 6, 8])
def test_a_resumed_run_starts_from_the_policy_of_the_last_refill(dataset, make_trainer, tmp_path, stop, seeds):
    """And not from that of the checkpoint, which has learnt on; whether it stopped at a refill or between two."""

    def start(max_steps, ckpt_path=None):
        data = TransitionDataModule(dataset, horizon=HORIZON, batch_size=6, updates_per_step=2)
        agent, callback = Acting(seeds), regenerate(first_action="policy", first_action_noise=0.01)
        trainer = make_trainer(max_steps, callbacks=[callback])
        trainer.fit(agent, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return trainer, torch.stack([batch.pack() for batch in agent.batches])

    _, whole = start(14)
    trainer, _ = start(stop)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, rest = start(14, tmp_path / "half.ckpt")
    assert torch.equal(rest, whole[stop:])
    chosen = [whole[k][whole[k][..., 3] < 0][:, 2] for k in (0, 4, 8)]  # actions of synthetic rows, first or not
    firsts = [actions[actions != 0.5].abs().mean() for actions in chosen]
    assert firsts[0] < 0.05 < firsts[1] < firsts[2], "the policy moves from refill to refill"


def test_each_agent_draws_the_rollouts_of_its_own_policy(data, make_trainer):
    """Agents that train side by side; the recorded actions of the data are at most 0.025."""
    agent = Acting(seeds=2)
    with torch.no_grad():
        agent.weight.fill_(11.0)
    callback = regenerate(first_action="policy", first_action_noise=0.0)
    make_trainer(2, callbacks=[callback]).fit(agent, datamodule=data)
    for batch in agent.batches[:2]:
        for own, sign in ((0, 1), (1, -1)):
            actions = batch.actions[own, 3:, 0]
            first = actions[actions != 0.5]
            assert torch.allclose(first, sign * torch.tensor(1.0).tanh())
    assert len(data.synthetic) == 2 * 20 * HORIZON
    assert not torch.equal(data.synthetic.observations[:40], data.synthetic.observations[40:])


# What


def test_rollouts_depend_on_seed_rank_and_update_alone(data):
    def rows(rank=0, step=0, seed=0):
        return imagine(regenerate(seed=seed), data, rank, step).pack()

    assert torch.equal(rows(), rows())
    for other in (rows(rank=1), rows(step=4), rows(seed=1)):
        assert not torch.equal(rows()[:, :2], other[:, :2])  # other starts
        assert not set(rows()[:, 3].tolist()) & set(other[:, 3].tolist())  # other noise


def test_starts_are_whole_real_rows_and_the_models_are_in_evaluation_mode(data):
    callback = regenerate(rollouts=300, guidance=1.7)
    imagine(callback, data)
    observations, actions, targets, guidance, training = callback._models[0].asked[0]
    rows = observations[:, 0].long()
    assert rows.unique().tolist() == list(range(26))
    assert torch.equal(actions, data.episodes.transitions.actions[rows])
    assert torch.equal(targets, data.returns_to_go[rows])  # by default each start's own
    assert guidance == 1.7
    assert not training


@pytest.mark.parametrize("starts", [None, TopShare(1.0)])
def test_starts_follow_the_weights_of_the_real_rows_unless_told_otherwise(dataset, starts):
    data = TransitionDataModule(dataset, horizon=HORIZON, real_weights=TopShare(0.5))
    callback = regenerate(rollouts=400, starts=starts)
    imagine(callback, data)
    rows = callback._models[0].asked[0][0][:, 0].long().unique()
    wanted = (TopShare(0.5)(data.episodes) if starts is None else torch.ones(26)).nonzero()[:, 0]
    assert rows.tolist() == wanted.tolist()
    assert (len(rows) < 26) == (starts is None)


def test_the_target_return_policy_is_asked(data):
    callback = regenerate(target_return=ConstantReturn(77.0))
    imagine(callback, data)
    assert callback._models[0].asked[0][2].unique().tolist() == [77.0]


@pytest.mark.parametrize(("margin", "kept"), [(0.0, {100}), (0.1, {100, 99, 98})])
def test_margin_is_a_fraction_of_the_datas_range(write_dataset, margin, kept):
    """Observations are (row, episode), from (100, 0) to (125, 5): a step of 25 down leaves the data's range."""
    data = TransitionDataModule(write_dataset(first=100), horizon=HORIZON)

    def step_down(observations, rewards, terminations):
        observations[:, 1:, 0] = observations[:, :1, 0] - 25

    callback = replay(data, step_down, margin=margin)
    spoilt = imagine(callback, data).next_observations[:, 0]
    assert set(spoilt[spoilt < 101].tolist()) == kept


# Guards. Rewards are 0.25 to 25.25 with a mean of 12.75 and a standard deviation of 7.5; 3 of 26 rows terminate.


def nothing(observations, rewards, terminations):
    pass


def not_finite(observations, rewards, terminations):
    rewards[:, 0] = NAN


def observations_far_out(observations, rewards, terminations):
    observations[:, 1] = 1e6


def rewards_far_out(observations, rewards, terminations):
    rewards[:, 0] = -1e6


def shifted(observations, rewards, terminations):
    rewards[:] = rewards.clamp(min=24)


def lowered(observations, rewards, terminations):
    rewards[:] = rewards.clamp(max=1)


def never_ending(observations, rewards, terminations):
    terminations[:] = 0


def ending_at_once(observations, rewards, terminations):
    terminations[:] = 1


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (nothing, None),
        (not_finite, r"max_rejected: got 7[45]\.\d% of the imagined steps dropped .*non_finite .*at most 0.5"),
        (
            observations_far_out,
            r"max_rejected: got 7[45]\.\d% of the imagined steps dropped .*out_of_range .*at most 0.5",
        ),
        (rewards_far_out, r"max_rejected: got 7[45]\.\d% of the imagined steps dropped .*out_of_range .*at most 0.5"),
        (shifted, "max_reward_drift: got a mean imagined reward of 21.*, 1.1.* standard .* 12.75, .*at most 1;"),
        (lowered, r"max_reward_drift: got a mean imagined reward of 3\.9.*, 1.1.* standard .* 12.75, .*at most 1;"),
        (
            never_ending,
            "max_termination_drift: got 0.0[23].* in a termination, 0.0.* from the data's 0.115, .*at most 0.02;",
        ),
        (
            ending_at_once,
            "max_termination_drift: got 0.6.* in a termination, 0.5.* from the data's 0.115, .*at most 0.02;",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_guard_warns_of_its_own_fault_and_of_nothing_else(data, make_trainer, recorder, spoil, expected):
    found = reported(make_trainer(2, callbacks=[replay(data, spoil)]), recorder, data)
    assert len(found) == (expected is not None), found
    if expected is not None:
        assert re.search(expected, found[0]), found


@pytest.mark.parametrize(
    ("spoil", "limit"),
    [(not_finite, {"max_rejected": 0.9}), (shifted, {"max_reward_drift": 1.5}),
     (never_ending, {"max_termination_drift": 0.1})],
)  # fmt: skip
def test_a_raised_limit_is_silent(data, make_trainer, recorder, spoil, limit):
    assert reported(make_trainer(2, callbacks=[replay(data, spoil, **limit)]), recorder, data) == []


def test_a_warning_comes_once_a_run_and_not_once_a_refill(data, make_trainer, recorder):
    callback = replay(data, not_finite)
    for _ in range(2):
        assert len(reported(make_trainer(12, callbacks=[callback]), recorder, data)) == 1


def test_steps_after_an_imagined_end_are_not_rejected(data, make_trainer, recorder):
    """Half of the steps, none of which can be had."""
    callback = regenerate(termination=1.0, max_rejected=0.0)
    assert reported(make_trainer(2, callbacks=[callback]), recorder, data) == []


def test_what_the_guards_measure_is_logged(data, make_trainer, recorder):
    """20 rollouts of 2 steps: 5 are whole, 10 lose both to a reward, and 5 their second one to an imagined end."""

    class Known(Imagining):
        def imagine(self, *args, **kwargs):
            observations, rewards, terminations, _ = super().imagine(*args, **kwargs)
            rewards[:] = torch.tensor([20.25, 27.5])  # above the data by less than a tenth of the range
            rewards[5:15, 0] = 28.0
            terminations[15:, 0] = 1
            return Imagined(observations, rewards, terminations)

    logger, callback = Memory(), RegenerateRollouts(4, 20, max_reward_drift=2, max_termination_drift=1)
    callback.connect(Known(), Inferring())
    assert reported(make_trainer(2, callbacks=[callback], logger=logger), recorder, data) == [
        "--stages.agent.callbacks.RegenerateRollouts.max_rejected: got 57.1% of the imagined steps dropped "
        "(after_end 5, out_of_range 20, kept 15), expected at most 0.5; train the world model longer with "
        "--stages.world_model.max_steps, or raise the limit if this is wanted"
    ]
    mean = (10 * 20.25 + 5 * 27.5) / 15
    assert {key.removeprefix("synthetic/"): value for key, value in logger.rows[0][1].items()} == pytest.approx(
        {
            "kept": 15,
            "after_end": 5,
            "non_finite": 0,
            "out_of_range": 20,
            "uncertain": 0,
            "inconsistent": 0,
            "unfamiliar": 0,
            "rejected_fraction": 20 / 35,
            "mean_reward": mean,
            "reward_drift": (mean - 12.75) / 7.5,
            "termination_rate": 5 / 15,
            "termination_drift": 5 / 15 - 3 / 26,
        },
        abs=1e-6,
    )


# Messages and logs


def test_counts_reach_the_loggers_at_the_update_they_are_for(data, make_trainer, recorder):
    logger = Memory()
    make_trainer(8, callbacks=[regenerate(termination=1.0)], logger=logger).fit(recorder, datamodule=data)
    assert [step for step, _ in logger.rows] == [0, 4]
    metrics = logger.rows[0][1]
    assert metrics["synthetic/kept"] == metrics["synthetic/after_end"] == 20
    assert metrics["synthetic/termination_rate"] == 1
    assert -2 < metrics["synthetic/mean_reward"] < -1


def test_every_n_steps_must_fit_updates_per_step(data, make_trainer, recorder):
    with pytest.raises(UserError, match="RegenerateRollouts.every_n_steps: got 5, .*updates_per_step, which is 2"):
        make_trainer(8, callbacks=[regenerate(every_n_steps=5)]).fit(recorder, datamodule=data)


def test_when_nothing_is_left_the_message_says_why(data, make_trainer, recorder):
    with pytest.raises(UserError, match=r"RegenerateRollouts\.margin: got all 40 .*out_of_range 40"):
        make_trainer(8, callbacks=[regenerate(jump=1e6)]).fit(recorder, datamodule=data)


def test_without_models_it_says_what_is_missing(data, make_trainer, recorder):
    with pytest.raises(UserError, match="connect"):
        make_trainer(2, callbacks=[RegenerateRollouts(4)]).fit(recorder, datamodule=data)


@pytest.mark.parametrize(
    "setting",
    [{"labels": "forward"}, {"max_inconsistency": 1.0}, {"max_forward_disagreement": 1}, {"pessimism": 1.0}],
)
def test_what_asks_forward_models_needs_some(setting):
    with pytest.raises(
        UserError, match=f"forward_members: got 0, expected at least 1, as .*{next(iter(setting))} asks"
    ):
        regenerate(**setting)


@pytest.mark.parametrize(
    "setting",
    [{"every_n_steps": 0}, {"rollouts": 0}, {"margin": -0.1}, {"max_rejected": 1.1}, {"max_rejected": -0.1},
     {"max_rejected": NAN}, {"max_reward_drift": -1.0}, {"max_termination_drift": -0.1}, {"first_action_noise": -0.1},
     {"max_inconsistency": 0.0}, {"max_forward_disagreement": 1.1}, {"pessimism": -1.0}],
)  # fmt: skip
def test_mistakes_name_the_setting(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        RegenerateRollouts(**setting)
