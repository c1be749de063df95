from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from dawm.data.episodes import load_episodes
from dawm.data.sources import minari as minari_files
from dawm.data.sources.catalog import local_datasets
from dawm.data.sources.d4rl import D4RLSource
from dawm.data.sources.scores import ReferenceScores, d4rl_scores, reference_scores
from dawm.data.sources.spaces import unscale_actions
from dawm.errors import UserError
from dawm.evaluation.episodes import run_episodes

pytestmark = pytest.mark.filterwarnings("ignore:.*(set to None|env_spec is None):UserWarning")

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (2,), np.float64)
ACTIONS = spaces.Box(np.array([0.0, -1.0]), np.array([4.0, 1.0]), dtype=np.float64)
UNIT = spaces.Box(-1.0, 1.0, (2,), np.float32)


class Line(gym.Env):
    """A stand-in with two observations, two actions in [-1, 1], and a time limit of three steps."""

    observation_space = OBSERVATIONS
    action_space = UNIT


gym.register("Line-v0", entry_point=Line, max_episode_steps=3)


@pytest.fixture(autouse=True)
def datasets_path(tmp_path, monkeypatch):
    path = tmp_path / "minari"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return path


def episode(first, length, terminated):
    """Every number names its row: the observation at t is (t, -t), the reward t, the action follows from t."""
    rows = np.arange(first, first + length + 1, dtype=np.float64)
    return EpisodeBuffer(
        observations=list(np.stack([rows, -rows], axis=1)),
        actions=list(np.stack([rows[:-1] % 5, np.zeros(length)], axis=1)),
        rewards=list(rows[:-1]),
        terminations=[False] * (length - 1) + [terminated],
        truncations=[False] * (length - 1) + [not terminated],
    )


def write_minari(dataset_id, buffers, observation_space=OBSERVATIONS, action_space=ACTIONS, **metadata):
    minari.create_dataset_from_buffers(
        dataset_id, buffers, observation_space=observation_space, action_space=action_space, **metadata
    )
    return dataset_id


def write_d4rl(path, **columns):
    with h5py.File(path, "w") as file:
        for key, values in columns.items():
            file[key] = values
    return str(path)


def d4rl_columns(rows=6, size=2, actions=2):
    """Six rows: an episode of three that terminates, one of two that is truncated, and one row that is unfinished."""
    observations = np.arange(rows * size, dtype=np.float32).reshape(rows, size)
    return {
        "observations": observations,
        "actions": np.zeros((rows, actions), np.float32),
        "rewards": np.arange(rows, dtype=np.float32),
        "terminals": np.arange(rows) == 2,
        "timeouts": np.arange(rows) == 4,
    }


def same(first, second):
    left, right = first.transitions, second.transitions
    return all(torch.equal(values, getattr(right, name)) for name, values in vars(left).items() if values is not None)


def test_every_number_stays_in_its_row():
    write_minari("toy/line-v0", [episode(0, 3, terminated=True), episode(10, 2, terminated=False)])
    episodes = load_episodes("toy/line-v0")
    rows = episodes.transitions
    assert rows.observations.tolist() == [[0, 0], [1, -1], [2, -2], [10, -10], [11, -11]]
    assert rows.next_observations.tolist() == [[1, -1], [2, -2], [3, -3], [11, -11], [12, -12]]
    assert rows.rewards.tolist() == [0, 1, 2, 10, 11]
    assert rows.terminations.tolist() == [0, 0, 1, 0, 0]
    assert rows.actions[:, 0].tolist() == [-1, -0.5, 0, -1, -0.5]  # 0, 1, 2, 0, 1 in [0, 4]
    assert all(values.dtype == torch.float32 for values in vars(rows).values() if values is not None)
    assert unscale_actions(rows.actions, episodes.action_space)[:, 0].tolist() == [0, 1, 2, 0, 1]
    assert episodes.ends.tolist() == [3, 5]
    assert episodes.starts.tolist() == [0, 3]
    assert episodes.lengths.tolist() == [3, 2]
    assert episodes.truncated.tolist() == [False, True]
    assert episodes.episode_returns.tolist() == [3, 21]
    assert episodes.end_observed.all()


def test_an_episode_ends_at_a_termination_in_its_middle():
    buffer = episode(0, 4, terminated=False)
    buffer.terminations[1] = True
    write_minari("toy/line-v0", [buffer])
    assert load_episodes("toy/line-v0").ends.tolist() == [2, 4]


def test_a_d4rl_file_and_minari_give_the_same_transitions(tmp_path):
    buffers = [episode(0, 3, terminated=True), episode(10, 2, terminated=False)]
    for buffer in buffers:
        buffer.actions[:] = [0.1 * action for action in buffer.actions]  # not exact in binary, within [-1, 1]
    write_minari("toy/line-v0", buffers, action_space=UNIT)
    path = write_d4rl(
        tmp_path / "line.hdf5",
        observations=np.concatenate([buffer.observations[:-1] for buffer in buffers]).astype(np.float32),
        next_observations=np.concatenate([buffer.observations[1:] for buffer in buffers]).astype(np.float32),
        actions=np.concatenate([buffer.actions for buffer in buffers]).astype(np.float32),
        rewards=np.concatenate([buffer.rewards for buffer in buffers]).astype(np.float32)[:, None],
        terminals=np.concatenate([buffer.terminations for buffer in buffers]).astype(np.uint8),
        timeouts=np.concatenate([buffer.truncations for buffer in buffers]),
    )
    minari_form, d4rl_form = load_episodes("toy/line-v0"), load_episodes(path)
    assert same(minari_form, d4rl_form)
    assert minari_form.ends.tolist() == d4rl_form.ends.tolist() == [3, 5]
    assert minari_form.fingerprint == d4rl_form.fingerprint


def test_a_d4rl_file_without_next_observations(tmp_path):
    episodes = load_episodes(write_d4rl(tmp_path / "a.hdf5", **d4rl_columns()))
    # Row 4 (truncated) and row 5 (unfinished, alone in its episode) have no next observation; row 2 terminates.
    assert episodes.transitions.rewards.tolist() == [0, 1, 2, 3]
    assert episodes.ends.tolist() == [3, 4]
    assert episodes.truncated.tolist() == [False, True]
    assert episodes.transitions.next_observations[:, 0].tolist() == [2, 4, 4, 8]
    assert episodes.end_observed.tolist() == [False, True]
    assert episodes.observed_rows().tolist() == [0, 1, 3]


def test_next_observations_that_were_made_by_shifting_count_as_missing(tmp_path):
    columns = {key: np.concatenate(4 * [values]) for key, values in d4rl_columns().items()}
    columns["observations"] = np.random.default_rng(0).normal(size=columns["observations"].shape).astype(np.float32)
    missing = load_episodes(write_d4rl(tmp_path / "a.hdf5", **columns))
    columns["next_observations"] = np.roll(columns["observations"], -1, axis=0)
    with pytest.warns(
        UserWarning, match="next_observations: at the ends of episodes they are the next episode's first"
    ):
        assert same(load_episodes(write_d4rl(tmp_path / "b.hdf5", **columns)), missing)


def test_a_d4rl_file_without_timeouts(tmp_path):
    columns = d4rl_columns(rows=9)
    columns["next_observations"] = columns["observations"] + 2
    columns["terminals"] = np.arange(9) == 1
    del columns["timeouts"]
    path = write_d4rl(tmp_path / "a.hdf5", **columns)
    with pytest.warns(UserWarning, match="cut at terminals alone"):
        assert load_episodes(path).ends.tolist() == [2, 9]
    # the time limit is three steps; next_observations that lead on past it were made by shifting, and count as missing
    assert load_episodes(path, env_id="Line-v0").ends.tolist() == [2, 4, 6]


def test_without_timeouts_next_observations_say_where_episodes_end(tmp_path):
    """As in a saved `d4rl.qlearning_dataset`, whose episodes are a row shorter than the time limit."""
    columns = d4rl_columns(rows=9)
    columns["observations"] = columns["observations"] + 100 * np.repeat(np.arange(4), [2, 3, 2, 2])[:, None]
    columns["next_observations"] = columns["observations"] + 2
    columns["terminals"] = np.zeros(9)
    del columns["timeouts"]
    path = write_d4rl(tmp_path / "a.hdf5", **columns)
    with pytest.warns(UserWarning, match="cut at terminals alone"):
        assert load_episodes(path, env_id="Line-v0").ends.tolist() == [2, 5, 7, 9]


@pytest.mark.parametrize("name", ["hopper_medium_replay-v2.hdf5", "hopper-medium-replay-v2.hdf5"])
def test_d4rl_file_names_bring_environment_and_reference(tmp_path, name):
    path = write_d4rl(tmp_path / name, **d4rl_columns(size=11, actions=3))
    for env_id, expected in ((None, "Hopper-v5"), ("Hopper-v4", "Hopper-v4")):
        episodes = load_episodes(path, env_id)
        assert episodes.env_spec.id == expected
        assert episodes.reference == ReferenceScores(-20.272305, 3234.3, "D4RL v2 table")


def test_unknown_file_names_take_the_reference_of_their_environment(tmp_path):
    path = write_d4rl(tmp_path / "hopper.hdf5", **d4rl_columns(size=11, actions=3))
    assert load_episodes(path).env_spec is None
    assert load_episodes(path).reference is None
    assert load_episodes(path, "Hopper-v5").reference.source == "Gymnasium v5 table"


def test_reference_scores():
    assert reference_scores("Hopper-v5").maximum == 3276
    assert reference_scores("Hopper-v4") == d4rl_scores("hopper")
    assert reference_scores("Ant-v5") is None  # D4RL's ant is another environment
    assert reference_scores("hopper-jump-v0") is None  # somebody's own
    assert d4rl_scores("maze2d-umaze-dense-v1").minimum == 68.537689
    assert d4rl_scores("maze2d-umaze-sparse-v1").minimum == 23.85
    assert d4rl_scores("antmaze-large-play-v2").maximum == 1
    scores = ReferenceScores(minimum=-10, maximum=40, source="").normalize(np.array([-10.0, 15.0, 40.0]))
    assert scores.tolist() == [0, 50, 100]


def test_the_metadata_win_over_the_tables():
    buffers = [episode(0, 2, terminated=True)]
    hopper = {"env": gym.spec("Hopper-v5"), "action_space": UNIT}
    write_minari("toy/own-v0", buffers, **hopper, ref_min_score=1.0, ref_max_score=2.0, eval_env="Hopper-v5")
    write_minari("toy/none-v0", buffers, **hopper)
    assert load_episodes("toy/own-v0").reference == ReferenceScores(1, 2, "data set's metadata")
    assert load_episodes("toy/none-v0").reference.source == "Gymnasium v5 table"


@pytest.mark.parametrize("references", [(5.0, 5.0), (9.0, 5.0), (float("nan"), 5.0), ("low", 5.0)])
def test_reference_scores_that_score_nothing_are_refused(references):
    minimum, maximum = references
    hopper = {"env": gym.spec("Hopper-v5"), "action_space": UNIT, "eval_env": "Hopper-v5"}
    write_minari("toy/own-v0", [episode(0, 2, True)], **hopper, ref_min_score=minimum, ref_max_score=maximum)
    assert f"toy/own-v0 with ref_min_score {minimum!r} and ref_max_score 5.0, expected a lower" in error_of(
        "toy/own-v0"
    )


def test_joined_data_sets(tmp_path):
    write_minari("toy/one-v0", [episode(0, 3, terminated=True)])
    write_minari("toy/two-v0", [episode(10, 2, terminated=False), episode(20, 1, terminated=True)])
    joined = load_episodes("toy/one-v0+toy/two-v0")
    assert joined.transitions.rewards.tolist() == [0, 1, 2, 10, 11, 20]
    assert joined.ends.tolist() == [3, 5, 6]
    assert joined.name == "toy/one-v0+toy/two-v0"
    assert joined.fingerprint != load_episodes("toy/two-v0+toy/one-v0").fingerprint


def test_a_plus_in_a_path_does_not_join(tmp_path):
    assert len(load_episodes(write_d4rl(tmp_path / "a+b.hdf5", **d4rl_columns()))) == 4


def test_goal_observations_have_their_keys_sorted():
    goal = {"z": spaces.Box(-7, 7, (1,), np.float32), "a": spaces.Box(-8, 8, (1,), np.float64)}
    parts = {"observation": spaces.Box(-9, 9, (2,), np.float64), "desired_goal": spaces.Dict(goal)}
    steps = [spaces.Dict(parts).sample() for _ in range(4)]
    observations = {
        "observation": [step["observation"] for step in steps],
        "desired_goal": {key: [step["desired_goal"][key] for step in steps] for key in goal},
    }
    recorded = replace(episode(0, 3, terminated=True), observations=observations)
    write_minari("toy/goal-v0", [recorded], observation_space=spaces.Dict(**parts))  # by keywords: not sorted
    episodes = load_episodes("toy/goal-v0")
    flat = torch.tensor(np.stack([spaces.flatten(spaces.Dict(parts), step) for step in steps]), dtype=torch.float32)
    assert torch.equal(episodes.transitions.observations, flat[:-1])
    assert torch.equal(episodes.transitions.next_observations, flat[1:])
    assert episodes.observation_space.high.tolist() == [8, 7, 9, 9]


def test_data_and_environment_lay_goals_out_alike():
    parts = {"b": spaces.Box(-9, 9, (1,)), "a": spaces.Dict(z=spaces.Box(-9, 9, (1,)), y=spaces.Box(-9, 9, (1,)))}
    values = {"b": np.ones(1, np.float32), "a": {"z": np.full(1, 2, np.float32), "y": np.full(1, 3, np.float32)}}

    class Goal(gym.Env):
        observation_space = spaces.Dict(**parts)  # by keywords: not sorted
        action_space = UNIT

        def reset(self, seed=None, options=None):
            return values, {}

        def step(self, action):
            return values, 0.0, True, False, {}

    observations = {"b": np.ones((2, 1)), "a": {"z": np.full((2, 1), 2.0), "y": np.full((2, 1), 3.0)}}
    recorded = replace(episode(0, 1, terminated=True), observations=observations)
    write_minari("toy/goal-v0", [recorded], observation_space=Goal.observation_space)
    seen = []
    run_episodes(lambda rows: seen.append(rows[0]) or torch.zeros(len(rows), 2), Goal, [0], 1)
    assert seen[0].tolist() == load_episodes("toy/goal-v0").transitions.observations[0].tolist() == [3, 2, 1]


def test_an_environment_of_another_package(tmp_path, monkeypatch):
    source = "import gymnasium; gymnasium.register('FarLine-v0', entry_point='test_episodes:Line')"
    (tmp_path / "far_away.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    path = write_d4rl(tmp_path / "a.hdf5", **d4rl_columns())
    assert load_episodes(path, "far_away:FarLine-v0").env_spec.id == "FarLine-v0"
    assert "did you mean FarLine-v0" in error_of(path, "far_away:FarLin-v0")
    assert "absent_package" in error_of(path, "absent_package:FarLine-v0")


def test_minaris_own_reader_gives_the_same(monkeypatch):
    write_minari("toy/line-v0", [episode(i * 10, 3, terminated=i % 2 == 0) for i in range(12)])
    fast = load_episodes("toy/line-v0")
    monkeypatch.setattr(minari_files, "_read_hdf5", minari_files._read_any)
    assert load_episodes("toy/line-v0").fingerprint == fast.fingerprint


def test_actions_just_outside_are_clipped(tmp_path):
    columns = d4rl_columns() | {"actions": np.full((6, 2), 1.3, np.float32)}
    with pytest.warns(UserWarning, match=r"4 actions outside .* row 0; they are clipped"):
        episodes = load_episodes(write_d4rl(tmp_path / "a.hdf5", **columns))
    assert (episodes.transitions.actions == 1).all()


def error_of(dataset, env_id=None):
    with pytest.raises(UserError) as caught:
        load_episodes(dataset, env_id)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_names_get_the_nearest(monkeypatch):
    write_minari("toy/line-v0", [episode(0, 3, terminated=True)])
    assert "toy/line-v0" in error_of("toy/lime")
    assert "embedded/hopper/medium-replay" in error_of("embedded/hopper/medium-reply-v0")
    assert "D4RL's names" in error_of("hopper-medium-v2")
    assert "both sides of every +" in error_of("toy/line-v0+")

    def no_network(dataset_id):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(minari, "download_dataset", no_network)
    message = error_of("mujoco/hopper/medium-v0")
    assert message.startswith("--data.dataset: got mujoco/hopper/medium-v0")
    assert "Name or service not known" in message
    assert "connect to the network" in message
    assert "nearest names are mujoco/hopper/medium-v0" in error_of("mujoco/hoper/medium-v0")


def test_a_missing_data_set_is_downloaded(monkeypatch):
    def download(dataset_id):
        write_minari(dataset_id, [episode(0, 3, terminated=True)])

    monkeypatch.setattr(minari, "download_dataset", download)
    assert len(load_episodes("toy/remote-v0")) == 3


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(0, 255, (64, 64, 3), np.uint8),
        spaces.Box(-1, 1, (2, 2), np.float32),
        spaces.Discrete(3),
        spaces.Tuple((UNIT, UNIT)),
        spaces.Dict(a=UNIT, b=spaces.Text(3)),
    ],
    ids=["image", "matrix", "discrete", "tuple", "text"],
)
def test_unusable_observations(space):
    write_minari("toy/odd-v0", [], observation_space=space)
    message = error_of("toy/odd-v0")
    assert message.startswith("--data.dataset: got toy/odd-v0 with observations of the kind")
    assert "expected flat Boxes" in message


def test_unusable_actions():
    write_minari("toy/discrete-v0", [], action_space=spaces.Discrete(3))
    assert "expected a flat Box of real numbers" in error_of("toy/discrete-v0")
    write_minari("toy/unbounded-v0", [], action_space=spaces.Box(-np.inf, np.inf, (2,)))
    assert "expected finite bounds" in error_of("toy/unbounded-v0")


def test_an_unusable_environment_is_named_and_closed(monkeypatch):
    closed = []
    monkeypatch.setattr("gymnasium.envs.classic_control.CartPoleEnv.close", lambda env: closed.append(env))
    write_minari("toy/line-v0", [episode(0, 3, terminated=True)])
    message = error_of("toy/line-v0", env_id="CartPole-v1")
    assert message.startswith("--data.env_id: got 'CartPole-v1' with the action space Discrete(2), expected a flat Box")
    assert "data.dataset" not in message
    assert len(closed) == 1


def test_empty_data(tmp_path):
    write_minari("toy/empty-v0", [])
    assert "got toy/empty-v0, expected complete steps, but it is empty" in error_of("toy/empty-v0")
    path = write_d4rl(tmp_path / "a.hdf5", **{key: values[:0] for key, values in d4rl_columns().items()})
    assert "it is empty" in error_of(path)


def test_values_that_are_not_finite(tmp_path):
    columns = d4rl_columns()
    columns["observations"][1, 1] = columns["observations"][3, 1] = np.nan
    message = error_of(write_d4rl(tmp_path / "a.hdf5", **columns))
    assert "2 NaN or infinite values in observations[1], the first in row 1" in message
    columns = d4rl_columns() | {"rewards": np.array([0, 0, np.inf, 0, 0, 0], np.float32)}
    assert "1 NaN or infinite values in rewards, the first in row 2" in error_of(
        write_d4rl(tmp_path / "b.hdf5", **columns)
    )


def test_files_that_cannot_be_read(tmp_path):
    assert "does not exist" in error_of(str(tmp_path / "absent.hdf5"))
    (tmp_path / "text.hdf5").write_text("no")
    assert "expected a readable HDF5 file" in error_of(str(tmp_path / "text.hdf5"))
    columns = d4rl_columns()
    del columns["rewards"]
    assert "without rewards, expected observations" in error_of(write_d4rl(tmp_path / "a.hdf5", **columns))
    columns = d4rl_columns() | {"rewards": np.zeros(5)}
    assert "with rewards of shape (5,), expected 6 rows" in error_of(write_d4rl(tmp_path / "b.hdf5", **columns))


def test_a_damaged_minari_data_set(datasets_path):
    write_minari("toy/line-v0", [episode(0, 3, terminated=True)])
    with h5py.File(datasets_path / "toy/line-v0/data/main_data.hdf5", "a") as file:
        del file["episode_0/rewards"]
    assert "got toy/line-v0, expected whole data, but it is damaged" in error_of("toy/line-v0")
    (datasets_path / "toy/line-v0/data/metadata.json").unlink()
    assert "got toy/line-v0, which Minari cannot open" in error_of("toy/line-v0")


def test_actions_in_other_units(tmp_path):
    columns = d4rl_columns() | {"actions": np.full((6, 2), 2.5, np.float32)}
    message = error_of(write_d4rl(tmp_path / "a.hdf5", **columns))
    assert "4 actions outside" in message
    assert "data.env_id" in message


def test_wrong_environments(tmp_path):
    path = write_d4rl(tmp_path / "a.hdf5", **d4rl_columns())
    assert error_of(path, "Hoper-v5").startswith(
        "--data.env_id: got 'Hoper-v5', expected an environment that Gymnasium knows; did you mean"
    )
    assert "got 'Hopper-v5' with observations and actions of sizes (11, 3)" in error_of(path, "Hopper-v5")


def test_joined_data_sets_that_disagree(tmp_path):
    write_minari("toy/one-v0", [episode(0, 3, terminated=True)])
    write_minari("toy/two-v0", [episode(0, 3, terminated=True)], action_space=spaces.Box(-4, 4, (2,)))
    assert "expected the same spaces" in error_of("toy/one-v0+toy/two-v0")
    columns = d4rl_columns(size=11, actions=3)
    old = write_d4rl(tmp_path / "hopper_medium-v2.hdf5", **columns)
    new = write_d4rl(tmp_path / "own.hdf5", **columns)
    assert "different reference scores" in error_of(f"{old}+{new}", "Hopper-v5")
    assert load_episodes(f"{new}+{old}").reference.source == "D4RL v2 table"  # a set without scores has none to differ


def test_an_unusable_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file" / "minari"))
    assert "set MINARI_DATASETS_PATH" in error_of("toy/line-v0")
    assert "set MINARI_DATASETS_PATH" in error_of("embedded/hopper/medium")


def write_columns(path, **columns):
    """Replaces columns of the first episode of a Minari data set."""
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        for key, values in columns.items():
            del file[f"episode_0/{key}"]
            file[f"episode_0/{key}"] = values


def test_columns_of_one_number_a_row_may_have_two_dimensions(datasets_path):
    write_minari("toy/line-v0", [episode(0, 3, terminated=True), episode(10, 2, terminated=False)])
    before = load_episodes("toy/line-v0").fingerprint
    ended = np.array([[0.0], [0.0], [1.0]])
    write_columns(datasets_path / "toy/line-v0", rewards=np.arange(3.0)[:, None], terminations=ended)
    assert load_episodes("toy/line-v0").fingerprint == before


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"rewards": np.zeros((3, 2))}, "rewards of shape (3, 2) in the episode of row 0, expected (3,)"),
        ({"actions": np.zeros((3, 1))}, "actions of shape (3, 1) in the episode of row 0, expected (3, 2)"),
        ({"observations": np.zeros((3, 2))}, "observations of shape (3, 2) in the episode of row 0, expected (4, 2)"),
        ({"rewards": np.ones(3, np.complex64)}, "rewards of type complex64, expected real numbers"),
        ({"rewards": np.array([b"1", b"2", b"3"])}, "rewards of type |S1, expected real numbers"),
        ({"terminations": np.array([b"False"] * 3)}, "3 terminations that are no flags, the first b'False' in row 0"),
        ({"terminations": np.array([0, np.nan, 0])}, "1 terminations that are no flags, the first nan in row 1"),
    ],
)
def test_good_data_of_another_form_are_never_called_damaged(datasets_path, column, message):
    write_minari("toy/line-v0", [episode(0, 3, terminated=True)])
    write_columns(datasets_path / "toy/line-v0", **{key: values for key, values in column.items()})
    error = error_of("toy/line-v0")
    assert message in error.replace("episode_0/", "")
    assert "delete" not in error


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"terminals": np.array([b"False"] * 6)}, "6 terminals that are no flags, the first b'False' in row 0"),
        ({"timeouts": np.array([0, 0, np.nan, 0, 1, 0])}, "1 timeouts that are no flags, the first nan in row 2"),
        ({"terminals": np.array([0, 1, 2, 0, 0, 0])}, "1 terminals that are no flags, the first 2 in row 2"),
        ({"terminals": np.array([0, 0, 255, 1, 0, 0])}, "that are no flags"),
        ({"terminals": np.zeros(6, complex)}, "6 terminals that are no flags"),
        ({"rewards": np.ones(6, complex)}, "rewards of type complex128, expected real numbers"),
        ({"observations": np.array([[b"1", b"2"]] * 6)}, "observations of type |S1, expected real numbers"),
    ],
)
def test_columns_of_other_kinds(tmp_path, column, message):
    assert message in error_of(write_d4rl(tmp_path / "a.hdf5", **d4rl_columns() | column))


@pytest.mark.parametrize("kind", [np.uint8, np.float64, np.int64])
def test_flags_are_ones_or_all_255(tmp_path, kind):
    columns = d4rl_columns()
    expected = load_episodes(write_d4rl(tmp_path / "a.hdf5", **columns)).fingerprint
    for name, true in (("b", 1), ("c", 255)):
        flags = {key: columns[key].astype(kind) * true for key in ("terminals", "timeouts")}
        assert load_episodes(write_d4rl(tmp_path / f"{name}.hdf5", **columns | flags)).fingerprint == expected


def walk(rows=200, size=4):
    steps = np.random.default_rng(0).normal(size=(rows + 1, size)) * 0.1
    return steps.cumsum(axis=0)


@pytest.mark.parametrize("form", ["d4rl", "minari"])
def test_a_jump_inside_an_episode_is_refused(tmp_path, form):
    """Two episodes were joined without a flag; a single dimension may jump, and a glitch may come back."""
    observations = walk()
    observations[50:, 0] += 100
    observations[70] += 100
    flags = {"terminals": np.zeros(200, bool), "timeouts": np.arange(200) == 149}
    space = spaces.Box(-np.inf, np.inf, (4,))

    def name(jumped):
        rows = {"actions": walk(size=2)[:200] / 10, "rewards": np.arange(200.0)}
        if form == "d4rl":
            return write_d4rl(
                tmp_path / f"jump{int(np.sum(jumped))}.hdf5", observations=jumped + observations[:200], **rows, **flags
            )
        ended = np.arange(200) == 199
        buffer = EpisodeBuffer(observations=jumped + observations, **rows, terminations=0 * ended, truncations=ended)
        return write_minari(f"toy/jump{int(np.sum(jumped))}-v0", [buffer], space, UNIT)

    assert len(load_episodes(name(0.0))) > 190
    message = error_of(name(10.0 * (np.arange(200 + (form == "minari")) >= 120)[:, None]))
    assert "with 1 jumps of the observations inside episodes, the first in row 119" in message


def test_a_glitch_may_come_back_in_the_next_block(tmp_path, monkeypatch):
    """Of 100 rows each; the observation that stands out is the last of a block, the first, or the second."""
    monkeypatch.setattr("dawm.data.sources.d4rl.BLOCK", 100)
    rows = {"actions": walk(size=2)[:200] / 10, "rewards": np.arange(200.0)}
    rows |= {"terminals": np.zeros(200, bool), "timeouts": np.zeros(200, bool)}
    for row in (99, 100, 101):
        observations = walk()[:200]
        observations[row] += 100
        load_episodes(write_d4rl(tmp_path / f"{row}.hdf5", observations=observations, **rows))
    observations = walk()[:200] + 10.0 * (np.arange(200) > 150)[:, None]
    assert "1 jumps" in error_of(write_d4rl(tmp_path / "jump.hdf5", observations=observations, **rows))


@pytest.mark.parametrize("ended", [True, False])
def test_the_observation_at_an_end_may_jump_where_the_task_ends(ended):
    """Some environments return zeros there; a truncated end bootstraps from it."""
    observations, last = walk() + 100, np.arange(200) == 199
    observations[-1] = 0
    rows = {"actions": walk(size=2)[:200] / 10, "rewards": np.arange(200.0)}
    buffer = EpisodeBuffer(observations=observations, **rows, terminations=last & ended, truncations=last & (not ended))
    name = write_minari("toy/zero-v0", [buffer], spaces.Box(-np.inf, np.inf, (4,)), UNIT)
    if ended:
        assert len(load_episodes(name)) == 200
    else:
        assert "1 jumps of the observations at the ends of episodes, the first in row 199" in error_of(name)


def test_next_observations_that_do_not_lead_on_end_the_episode(tmp_path):
    columns = d4rl_columns(rows=9)
    columns["next_observations"] = columns["observations"] + 2
    columns["next_observations"][6] += 1
    columns["next_observations"][7] += 1e-6  # rounding
    path = write_d4rl(tmp_path / "a.hdf5", **columns)
    with pytest.warns(UserWarning, match="next_observations: 1 are not .* first in row 6; another episode begins"):
        episodes = load_episodes(path)
    assert episodes.ends.tolist() == [3, 5, 7, 9]
    assert episodes.truncated.tolist() == [False, True, True, True]
    assert len(episodes) == 9
    source = D4RLSource(Path(path), "a")
    for _ in range(2):  # a second reading finds the same, once
        list(source.blocks())
        assert len(source.defects) == 1


def test_a_local_data_set_wins_over_d4rls_name():
    write_minari("hopper-medium-v2", [episode(0, 3, terminated=True)])
    assert len(load_episodes("hopper-medium-v2")) == 3


def test_paths_expand(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path))
    path = write_d4rl(tmp_path / "a.hdf5", **d4rl_columns())
    expected = load_episodes(path).fingerprint
    assert load_episodes("~/a.hdf5").fingerprint == load_episodes("$DATA/a.hdf5").fingerprint == expected
    assert len(load_episodes("~/a.hdf5+${DATA}/a.hdf5")) == 8
    assert "does not exist" in error_of("$ABSENT/a.hdf5")
    load_episodes(path, cache_dir="$DATA/rows", memory_limit=0.0)
    assert (tmp_path / "rows").is_dir()


def test_the_data_keep_their_own_action_bounds():
    """Whatever environment they are evaluated in: the policy's +1 is the data's largest action."""
    write_minari("toy/line-v0", [episode(0, 3, terminated=True)])
    episodes = load_episodes("toy/line-v0", env_id="Line-v0")
    assert episodes.env_spec.id == "Line-v0"
    assert episodes.action_space == ACTIONS != Line.action_space


def test_linked_folders_are_found(datasets_path, tmp_path):
    write_minari("toy/line-v0", [episode(0, 3, terminated=True)])
    (datasets_path / "toy").rename(tmp_path / "elsewhere ü")
    (datasets_path / "linked").symlink_to(tmp_path / "elsewhere ü")
    (tmp_path / "elsewhere ü/up").symlink_to(tmp_path)  # a circle
    assert list(local_datasets()) == ["linked/line-v0"]
    assert "linked/line-v0" in error_of("linked/lime")
