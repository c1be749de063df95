"""The data set of these tests (see conftest) has 26 rows: episodes 5T 3 7T 4 1 6T, where T ends with a termination."""

import warnings
from dataclasses import replace

import lightning as L
import pytest
import torch

from dawm.data.batches import BatchLoader, RowStream
from dawm.data.module import TransitionDataModule
from dawm.data.segments import SegmentTable
from dawm.data.transitions import Transitions
from dawm.errors import UserError

EPISODES = [(0, 5, True), (5, 8, False), (8, 15, True), (15, 19, False), (19, 20, False), (20, 26, True)]
LOADERS = ["mixed_loader", "segment_loader", "transition_loader"]


def module(path, **kwargs):
    settings = {"horizon": 3, "batch_size": 10, "segment_batch_size": 6, "updates_per_step": 2, "discount": 0.5}
    data = TransitionDataModule(path, **settings | kwargs)
    data.setup()
    return data


def synthetic(count, reward=-1.0):
    """Rows that no recorded row is like: rewards are negative, the observation names the row."""
    rows = torch.arange(float(count))
    observations = -1 - torch.stack([rows, rows], dim=1)
    return Transitions(observations, rows[:, None] * 0, torch.full((count,), reward), observations, rows * 0)


def flat(loader: BatchLoader):
    """One item per update, every field of it."""
    items = list(loader)
    return [
        [values[k] for values in vars(item).values() if values is not None]
        for item in items
        for k in range(item.rewards.shape[0])
    ]


def assert_equal(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for one, other in zip(first, second) for a, b in zip(one, other))


# Segments


def expected_segment(episode, start, horizon):
    """One segment, step by step, from what conftest wrote."""
    number, (_, end, _) = episode, EPISODES[episode]
    segment = {"observations": [[start, number]], "actions": [], "rewards": [], "terminations": [], "valid": []}
    for row in range(start, start + horizon):
        real = row < end
        segment["observations"].append([min(row + 1, end), number])
        segment["actions"].append([row / 1000 if real else 0.0])
        segment["rewards"].append(row + 0.25 if real else 0.0)
        segment["terminations"].append(float(row >= end - 1 and EPISODES[episode][2]))
        segment["valid"].append(float(real))
    segment["returns_to_go"] = sum(0.5 ** (row - start) * (row + 0.25) for row in range(start, end))
    return segment


@pytest.mark.parametrize("horizon", [1, 3, 6])
def test_segments_equal_a_loop_over_the_rows(dataset, horizon):
    """Misaligned fields, a segment across an end, a missing start or a wrong absorbing row would show here."""
    data = module(dataset, horizon=horizon, bootstrap_truncated=False)
    everything = torch.arange(len(EPISODES))
    table = SegmentTable(data.episodes, everything, data.episodes.transitions.pack(), data.returns_to_go, horizon)
    expected = [
        expected_segment(number, start, horizon)
        for number, (first, end, terminated) in enumerate(EPISODES)
        for start in range(first, end if terminated else end - horizon + 1)
    ]
    assert len(table) == len(expected) == {1: 26, 3: 21, 6: 18}[horizon]
    got = table.gather(torch.arange(len(table)))
    assert vars(got).pop("observed") is None
    for key, values in vars(got).items():
        torch.testing.assert_close(
            values, torch.tensor([e[key] for e in expected], dtype=torch.float32), msg=lambda m, k=key: f"{k}: {m}"
        )


def test_segments_say_which_observations_were_not_recorded(dataset):
    """Those of terminated episodes' last steps in a file without next observations, and of the absorbing steps."""
    data = module(dataset)
    assert next(iter(data.segment_loader(4))).observed is None
    episodes = replace(data.episodes, end_observed=~data.episodes.terminated)
    everything = torch.arange(len(episodes.ends))
    table = SegmentTable(episodes, everything, data.episodes.transitions.pack(), data.returns_to_go, 3)
    segments = table.gather(torch.arange(len(table)))
    assert 0 < segments.terminations.sum() < segments.terminations.numel()
    assert torch.equal(segments.observed, 1 - segments.terminations)


def test_segments_keep_the_shape_of_their_numbers(dataset):
    data = module(dataset)
    batch = next(iter(data.segment_loader(4)))
    assert batch.observations.shape == (2, 6, 4, 2)
    assert batch.actions.shape == (2, 6, 3, 1)
    assert batch.rewards.shape == batch.terminations.shape == batch.valid.shape == (2, 6, 3)
    assert batch.returns_to_go.shape == (2, 6)


# Drawing


@pytest.mark.parametrize("name", LOADERS)
def test_batches_do_not_depend_on_updates_per_step(dataset, name):
    streams = []
    for updates_per_step in (1, 4, 7):
        data = module(dataset, updates_per_step=updates_per_step)
        data.refill(synthetic(5))
        streams.append(flat(getattr(data, name)(10)))
    assert len(streams[0]) == 10
    assert_equal(streams[0], streams[1])
    assert_equal(streams[0], streams[2])
    assert not torch.equal(streams[0][0][0], streams[0][1][0])


@pytest.mark.parametrize("name", LOADERS)
def test_a_resumed_loader_continues_where_it_was(dataset, name):
    data = module(dataset)
    data.refill(synthetic(5))
    whole = flat(getattr(data, name)(9))
    first = getattr(data, name)(9)
    iterator = iter(first)
    next(iterator), next(iterator)
    assert first.state_dict() == {"drawn": 4}
    resumed = getattr(data, name)(9)
    resumed.load_state_dict(first.state_dict())
    assert_equal(flat(resumed), whole[4:])


def test_the_last_chunk_is_shortened_and_made_up_for_in_a_longer_run(dataset):
    loader = module(dataset, updates_per_step=4).mixed_loader(10)
    assert len(loader) == 3
    assert [len(batch) for batch in loader] == [4, 4, 2]
    longer = module(dataset, updates_per_step=4).mixed_loader(16)
    longer.load_state_dict(loader.state_dict())
    assert [len(batch) for batch in longer] == [2, 4]


@pytest.mark.parametrize("name", LOADERS)
def test_ranks_and_seeds_draw_different_rows(write_dataset, name):
    path = write_dataset([40], [True])  # one episode: the split cannot be what differs
    one, same, rank, seed = (
        flat(getattr(module(path, seed=seed), name)(4, rank)) for seed, rank in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert_equal(one, same)
    assert not torch.equal(one[0][0], rank[0][0])
    assert not torch.equal(one[0][0], seed[0][0])


def test_every_real_row_is_drawn_with_its_own_fields(dataset):
    """The agent learns from all episodes; only the last row of a terminated episode never bootstraps."""
    batches = list(module(dataset, batch_size=200).mixed_loader(4))
    rows = torch.cat([batch.observations[..., 0].flatten() for batch in batches])
    terminations = torch.cat([batch.terminations.flatten() for batch in batches])
    assert rows.unique().tolist() == list(range(26))
    assert rows[terminations == 1].unique().tolist() == [4, 14, 25]
    assert 4 not in rows[terminations == 0]
    for batch in batches:
        torch.testing.assert_close(batch.actions[..., 0], batch.observations[..., 0] / 1000)
        assert torch.equal(batch.rewards, batch.observations[..., 0] + 0.25)
        assert torch.equal(batch.next_observations, batch.observations + torch.tensor([1.0, 0.0]))


def test_no_update_is_made_beyond_max_steps(dataset, make_trainer, recorder):
    """Even if a loader hands over more."""
    trainer = make_trainer(3)
    trainer.fit(recorder, module(dataset).mixed_loader(8))
    assert trainer.global_step == len(recorder.batches) == 3


# Mixing


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.3, 3), (0.37, 4), (0.5, 5), (1.0, 10)])
def test_fraction_of_synthetic_rows_is_exact(dataset, fraction, count):
    data = module(dataset, synthetic_fraction=fraction)
    before = [batch.rewards for batch in data.mixed_loader(6)]
    assert all((rewards >= 0).all() for rewards in before)
    data.refill(synthetic(4))
    for batch in data.mixed_loader(6):
        assert ((batch.rewards < 0).sum(dim=-1) == count).all()
        assert torch.equal(batch.rewards < 0, batch.observations[..., 0] < 0)


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_real_rows_do_not_depend_on_the_synthetic_ones(dataset, fraction):
    """The real rows of a mixed batch are the first of the real-only draw: nothing else differs."""
    real_only = flat(module(dataset, synthetic_fraction=0.0).mixed_loader(6))
    mixed = module(dataset, synthetic_fraction=fraction)
    mixed.refill(synthetic(4))
    kept = 10 - round(10 * fraction)
    assert_equal(
        [[v[:kept] for v in batch] for batch in flat(mixed.mixed_loader(6))], [[v[:kept] for v in b] for b in real_only]
    )


def test_a_smaller_refill_leaves_no_old_rows(dataset):
    data = module(dataset, synthetic_fraction=1.0)
    data.refill(synthetic(20, reward=-1.0))
    storage = data.synthetic.rewards.untyped_storage().data_ptr()
    data.refill(synthetic(7, reward=-2.0))
    assert data.synthetic.rewards.untyped_storage().data_ptr() == storage
    assert len(data.synthetic) == 7
    drawn = torch.cat([batch.observations[..., 0].flatten() for batch in data.mixed_loader(60)])
    rewards = torch.cat([batch.rewards.flatten() for batch in data.mixed_loader(60)])
    assert (rewards == -2).all()
    assert (-1 - drawn).unique().tolist() == list(range(7))
    data.refill(synthetic(30, reward=-3.0))
    assert len(data.synthetic) == 30


class RefillEveryStep(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.datamodule.refill(synthetic(4, reward=-float(trainer.global_step)))


def test_a_refill_is_in_the_very_next_batch(dataset, make_trainer, recorder):
    """A Trainer that fetched one batch ahead would train once more on rows that are gone."""
    data = module(dataset, synthetic_fraction=0.5)
    make_trainer(8, callbacks=[RefillEveryStep()]).fit(recorder, datamodule=data)
    newest = [float(batch.rewards.min().clamp(max=0)) for batch in recorder.batches]
    assert newest == [0, 0, -2, -2, -4, -4, -6, -6]


def test_a_stream_of_very_many_rows_is_passed_over_exactly():
    """Of 2^28 rows and more each number takes more of the generator."""
    for high in (2**28 - 1, 2**28, 2**40):
        whole, resumed = RowStream(3, high=high), RowStream(3, high=high)
        whole.draw(high, 4, 5)
        resumed.skip(20)
        assert torch.equal(whole.draw(high, 1, 5), resumed.draw(high, 1, 5))


def test_lightning_resumes_the_stream(dataset, make_trainer, recorder, tmp_path):
    make_trainer(9).fit(recorder, datamodule=module(dataset))
    whole, recorder.batches = recorder.batches, []
    first = make_trainer(4)
    first.fit(recorder, datamodule=module(dataset))
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = make_trainer(9)
    second.fit(recorder, datamodule=module(dataset), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert second.global_step == 9
    assert torch.equal(torch.stack([b.rewards for b in recorder.batches]), torch.stack([b.rewards for b in whole]))


def test_everything_is_drawn_on_the_training_device(dataset):
    """Real and synthetic rows must meet on one device; "meta" stands in for a GPU."""
    data = module(dataset)
    data.to("meta")
    data.refill(synthetic(4))
    for batch in (next(iter(getattr(data, name)(4))) for name in LOADERS):
        assert {values.device.type for values in vars(batch).values() if values is not None} == {"meta"}


# Splits


def test_held_out_episodes_are_never_trained_on(dataset):
    data = module(dataset, validation_fraction=0.34, horizon=1, batch_size=100, segment_batch_size=100)
    held_out, training = set(data.validation_episodes.tolist()), set(data.training_episodes.tolist())
    assert len(held_out) == 2
    assert held_out | training == set(range(6))
    assert not held_out & training

    def episodes_in(loader):
        return {int(e) for batch in loader for e in batch.observations[..., 1].unique()}

    assert episodes_in(data.segment_loader(4)) == episodes_in(data.transition_loader(4)) == training
    assert episodes_in(data.validation_segment_loader()) == held_out
    assert episodes_in(data.validation_transition_loader()) == held_out


@pytest.mark.parametrize(("episodes", "fraction", "held_out"), [(1, 0.1, 1), (2, 0.1, 1), (3, 0.9, 2), (10, 0.25, 2)])
def test_neither_side_of_the_split_is_empty(write_dataset, episodes, fraction, held_out):
    data = module(write_dataset([4] * episodes, [False] * episodes), validation_fraction=fraction)
    assert len(data.validation_episodes) == held_out
    assert len(data.training_episodes) == max(1, episodes - held_out)
    assert len(list(data.segment_loader(2))) == len(list(data.validation_segment_loader())) == 1


def test_ranks_share_out_the_validation_rows(dataset):
    data = module(dataset, validation_fraction=0.5)
    whole, *shares = (
        torch.cat([batch.observations[:, 0] for batch in data.validation_transition_loader(rank, size)]).tolist()
        for rank, size in ((0, 1), (0, 2), (1, 2))
    )
    assert sorted(shares[0] + shares[1]) == sorted(whole)


def test_rows_without_a_recorded_next_observation_teach_no_actions(write_dataset):
    """A file without next_observations keeps its terminated rows; there s' is only a stand-in."""
    data = module(write_dataset(next_observations=False), batch_size=300)
    batches = [*data.transition_loader(4), *data.validation_transition_loader()]
    rows = torch.cat([batch.observations[..., 0].flatten() for batch in batches])
    assert not {4, 14, 25} & set(rows.tolist())
    agent_rows = next(iter(data.mixed_loader(2))).observations[..., 0]
    assert {4, 14, 25} <= set(agent_rows.flatten().tolist())


# A user's mistakes


@pytest.mark.parametrize(
    "setting",
    [
        {"synthetic_fraction": -0.1},
        {"synthetic_fraction": 1.1},
        {"synthetic_fraction": float("nan")},
        {"validation_fraction": 0.0},
        {"validation_fraction": 1.0},
        {"discount": 1.5},
        {"horizon": 0},
        {"horizon": 8},  # the longest episode has 7 steps
        {"batch_size": 0},
        {"segment_batch_size": 0},
        {"updates_per_step": 0},
        {"return_window": 0},
    ],
)
def test_a_mistake_names_the_setting(dataset, setting):
    with pytest.raises(UserError) as caught:
        module(dataset, **setting)
    assert next(iter(setting)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_horizon_that_fits_no_chosen_episode(write_dataset):
    data = module(write_dataset([9, 2, 2, 2], [False] * 4), horizon=5, validation_fraction=0.5)
    with pytest.raises(UserError, match="horizon"):
        data.segment_loader(1), data.validation_segment_loader()


def test_a_trainer_without_max_steps_says_so(dataset, make_trainer, recorder):
    """Lightning's default of no max_steps would end training before the first update, without a word."""
    with pytest.raises(UserError, match="max_steps"):
        make_trainer(-1).fit(recorder, datamodule=module(dataset))


class Plain(L.LightningModule):
    """A user's own module: one batch per training step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.shapes = []

    def training_step(self, batch, batch_idx):
        self.shapes.append(tuple(batch.observations.shape))
        return (self.weight * batch.rewards).mean()

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)


def test_a_plain_module_trains_on_one_batch_per_step(dataset, make_trainer):
    plain = Plain()
    data = module(dataset, updates_per_step=1)
    data.refill(synthetic(4))
    make_trainer(3).fit(plain, datamodule=data)
    assert plain.shapes == [(10, 2)] * 3
    with pytest.raises(UserError, match="updates_per_step"):
        make_trainer(3).fit(Plain(), datamodule=module(dataset, updates_per_step=2))


class Asking(Plain):
    """A module that says what it trains on and is validated on."""

    def __init__(self):
        super().__init__()
        self.validated = []

    def train_loader(self, data, updates, rank):
        return data.segment_loader(updates, rank)

    def validation_loader(self, data, rank, world_size):
        return data.validation_segment_loader(rank, world_size)

    def validation_step(self, batch, batch_idx):
        self.validated.append(tuple(batch.observations.shape[1:]))


def test_a_module_gets_the_loaders_it_asks_for(dataset, make_trainer):
    asking, data = Asking(), module(dataset, updates_per_step=1)
    make_trainer(2, val_check_interval=1).fit(asking, datamodule=data)
    assert asking.shapes == [(1, 6, 4, 2)] * 2  # one update of six segments
    assert asking.validated == [(4, 2)] * 2


def test_nothing_is_said_of_validation_where_there_is_none(dataset, make_trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", ".*(instantiate_classes|treespec, LeafSpec|does not have many workers|logging).*"
        )
        make_trainer(3).fit(Plain(), datamodule=module(dataset, updates_per_step=1))


def test_each_of_several_seeds_has_batches_of_its_own_and_the_first_those_of_a_single_run(dataset):
    data = module(dataset, synthetic_fraction=0.5, updates_per_step=2)
    data.refill(data.episodes.transitions[:50])
    alone = [batch.rewards for batch in data.mixed_loader(4)]
    several = list(data.mixed_loader(4, seeds=3))
    assert several[0].observations.shape[:3] == (2, 3, data.batch_size)
    for mine, batch in zip(alone, several):
        assert torch.equal(batch.rewards[:, 0], mine)
        assert not torch.equal(batch.rewards[:, 1], mine)
        assert not torch.equal(batch.rewards[:, 1], batch.rewards[:, 2])
