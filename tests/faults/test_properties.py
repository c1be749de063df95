"""Whatever the data set looks like, a few updates of every stage go through, or one line says why not."""

import contextlib
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dawm.agents import IQL, TD3BC
from dawm.data.module import TransitionDataModule
from dawm.diffusion.denoisers import ResidualMLP
from dawm.errors import UserError
from dawm.inverse_dynamics import InverseDynamics
from dawm.training.updates import UpdateModule
from dawm.world_model import DiffusionWorldModel

EXAMPLES = settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
OBSERVATIONS, ACTIONS = 3, 2  # of a set that names no environment; the file's own sizes
UPDATES = 4


class Case(NamedTuple):
    """What a data set looks like."""

    lengths: list[int]
    terminated: list[bool]
    scale: float
    reward_scale: float
    constant: list[bool]
    kind: str
    integer_rewards: bool
    at_bounds: bool
    next_recorded: bool
    horizon: int


@st.composite
def cases(draw) -> Case:
    lengths = draw(
        st.one_of(
            st.lists(st.integers(1, 12), min_size=1, max_size=8),
            st.lists(st.sampled_from([1, 2, 50, 1000, 2000]), min_size=1, max_size=3),
            st.integers(1, 2000).map(lambda length: [length]),
        )
    )
    count = len(lengths)
    terminated = draw(
        st.one_of(
            st.sampled_from([[True] * count, [False] * count]), st.lists(st.booleans(), min_size=count, max_size=count)
        )
    )
    return Case(
        lengths,
        terminated,
        scale=10.0 ** draw(st.integers(-6, 6)),
        reward_scale=10.0 ** draw(st.integers(-6, 6)),
        constant=draw(st.lists(st.booleans(), min_size=OBSERVATIONS, max_size=OBSERVATIONS)),
        kind=draw(st.sampled_from(["float32", "float64"])),
        integer_rewards=draw(st.booleans()),
        at_bounds=draw(st.booleans()),
        next_recorded=draw(st.booleans()),
        horizon=draw(st.integers(1, 6)),
    )


def write(path: Path, case: Case, observations: np.ndarray, next_observations: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    rows, last = sum(case.lengths), np.cumsum(case.lengths) - 1
    actions = rng.uniform(-1, 1, (rows, ACTIONS))
    rewards = np.rint(3 * rng.normal(size=rows)).astype(np.int64)
    ended = np.array(case.terminated)
    with h5py.File(path, "w") as file:
        file["observations"] = observations
        if case.next_recorded:
            file["next_observations"] = next_observations
        file["actions"] = (np.sign(actions) if case.at_bounds else actions).astype(case.kind)
        file["rewards"] = rewards if case.integer_rewards else (case.reward_scale * rewards).astype(case.kind)
        file["terminals"] = np.isin(np.arange(rows), last[ended])
        file["timeouts"] = np.isin(np.arange(rows), last[~ended])


@contextlib.contextmanager
def loaded(case: Case, observations: np.ndarray, next_observations: np.ndarray):
    """The data set as the data module loads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.hdf5"
        write(path, case, observations, next_observations)
        data = TransitionDataModule(
            str(path), horizon=case.horizon, batch_size=8, segment_batch_size=8, updates_per_step=UPDATES,
            synthetic_fraction=0.0,
        )  # fmt: skip
        data.setup()
        yield data


def modules(horizon: int) -> list[UpdateModule]:
    sizes = {"observation_size": OBSERVATIONS, "action_size": ACTIONS}
    network = partial(ResidualMLP, width=8, depth=1)
    return [
        DiffusionWorldModel(**sizes, horizon=horizon, network=network, warmup_steps=1),
        InverseDynamics(**sizes, hidden=(8,), members=2),
        TD3BC(**sizes, hidden=(8, 8)),
        IQL(**sizes, hidden=(8, 8)),
    ]


@EXAMPLES
@given(case=cases())
@pytest.mark.filterwarnings("ignore")
def test_every_stage_goes_through_or_says_why_not(make_trainer, case):
    rng = np.random.default_rng(1)
    rows = sum(case.lengths)
    constant = np.array(case.constant)
    walk = np.where(constant, 1.0, rng.normal(size=(rows + 1, OBSERVATIONS)).cumsum(axis=0)) * case.scale
    walk = walk.astype(case.kind)
    # without next observations the last row of a truncated episode is lost
    kept = [n - (not end and not case.next_recorded) for n, end in zip(case.lengths, case.terminated)]
    if max(kept) < case.horizon:
        with pytest.raises(UserError, match="^--data.horizon: |is empty"), loaded(case, walk[:-1], walk[1:]):
            pass
        return
    with loaded(case, walk[:-1], walk[1:]) as data:
        for module in modules(case.horizon):
            message = ""
            try:
                make_trainer(UPDATES, val_check_interval=1).fit(module, datamodule=data)
            except UserError as error:
                message = str(error)
            if message:
                segments = isinstance(module, DiffusionWorldModel)
                assert segments or isinstance(module, InverseDynamics)
                assert message.startswith("--data.horizon: " if segments else "--data.dataset: ")
                continue
            for key, value in module.state_dict().items():
                # no validation is better than this one: it starts there
                assert value.isfinite().all() or key == "best_errors", f"{module.name}: {key}"


@EXAMPLES
@given(case=cases())
@pytest.mark.filterwarnings("ignore")
def test_no_segment_crosses_the_end_of_an_episode(case):
    """The observations name row and episode; float32 distinguishes them up to 2^24 rows."""
    case = case._replace(next_recorded=True)
    rows = np.arange(sum(case.lengths), dtype=case.kind)
    episode = np.repeat(np.arange(len(case.lengths), dtype=case.kind), case.lengths)
    ids, next_ids = (np.stack([rows + k, episode, np.zeros_like(rows)], axis=1) for k in (0, 1))
    if max(case.lengths) < case.horizon:
        return
    ends, terminated = np.cumsum(case.lengths), np.array(case.terminated)
    with loaded(case, ids, next_ids) as data:
        try:
            segments = next(iter(data.segment_loader(UPDATES)))
        except UserError:
            chosen = data.training_episodes.numpy()
            assert all(case.lengths[e] < case.horizon and not terminated[e] for e in chosen)
            return
    row, which = segments.observations[..., 0].long().numpy(), segments.observations[..., 1].long().numpy()
    assert (which == which[..., :1]).all()
    end = ends[which[..., 0]][..., None]
    assert (row[..., 0] < end[..., 0]).all()
    steps = np.arange(case.horizon + 1)
    assert (row == np.minimum(row[..., :1] + steps, end)).all()  # on to the end's observation, which then repeats
    valid = segments.valid.numpy().astype(bool)
    assert (valid == (row[..., :1] + steps[:-1] < end)).all()
    assert (valid | terminated[which[..., :-1]]).all()  # nothing is made up after a truncation
    at_end = terminated[which[..., :-1]] & (row[..., :1] + steps[:-1] >= end - 1)
    assert (segments.terminations.numpy().astype(bool) == at_end).all()
