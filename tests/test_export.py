"""From imagined rollouts to episodes on the disk."""

from collections import Counter

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch

from dawm.cli.synthesize import _columns
from dawm.data.store.minari_writer import COMPACT_BYTES, EpisodeColumns, write_episodes
from dawm.synthesis.rollouts import Rollouts


def make_rollouts(lengths, terminations):
    """Four rollouts of three steps; at step k of b: observation 10 b + k, action (b - k) / 4, reward 100 b + k."""
    b, k = torch.arange(4.0).view(-1, 1), torch.arange(4.0)
    return Rollouts(
        observations=(10 * b + k).unsqueeze(-1),
        actions=((b - k) / 4)[:, :3].unsqueeze(-1),
        rewards=(100 * b + k)[:, :3],
        next_observations=(10 * b + k)[:, 1:].unsqueeze(-1),
        terminations=torch.tensor(terminations),
        lengths=torch.tensor(lengths),
        counts=Counter(kept=sum(lengths)),
    )


def test_kept_steps_become_episodes_in_the_environments_units():
    """Rollout 1 has nothing to keep; rollout 3 is cut where there is enough, before its termination."""
    space = gym.spaces.Box(-1.0, 3.0, (1,), np.float32)  # action a in [-1, 1] is 1 + 2 a there
    made = make_rollouts([3, 0, 2, 3], [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    columns = _columns(made, space, most=6)
    assert columns.lengths.tolist() == [3, 2, 1]
    assert columns.observations[:, 0].tolist() == [0, 1, 2, 3, 20, 21, 22, 30, 31]
    assert columns.actions[:, 0].tolist() == [1.0, 0.5, 0.0, 2.0, 1.5, 2.5]
    assert columns.actions.dtype == np.float32
    assert columns.rewards.tolist() == [0, 1, 2, 200, 201, 300]
    assert columns.terminated.tolist() == [False, True, False]


def test_actions_do_not_step_over_the_bounds_by_rounding():
    space = gym.spaces.Box(-0.4, 0.4, (1,), np.float32)
    made = make_rollouts([1, 0, 0, 0], [[0, 0, 0]] * 4)._replace(actions=torch.full((4, 3, 1), 1.0000001))
    assert space.contains(_columns(made, space, most=9).actions[0])


@pytest.fixture
def parts():
    """Episodes of 1, 3 and 2 steps in two parts, and one too long for HDF5's headers."""
    long = COMPACT_BYTES // 8
    lengths = [[1, 3], [2, long]]
    made = []
    for number, part in enumerate(lengths):
        steps, generator = sum(part), np.random.default_rng(number)
        made.append(
            EpisodeColumns(
                lengths=np.array(part),
                observations=generator.normal(size=(steps + 2, 2)).astype(np.float32),
                actions=generator.uniform(-1, 1, size=(steps, 1)).astype(np.float32),
                rewards=generator.normal(size=steps).astype(np.float32),
                terminated=np.array([False, True]),
            )
        )
    return made


@pytest.mark.filterwarnings("ignore:.*is set to None", "ignore:env_spec is None")
def test_minari_reads_what_was_written(parts):
    """Minari iterates over the file's episodes, samples and filters them; both ways of storing a column occur."""
    dataset = minari.create_dataset_from_buffers(
        "mine/test-v0",
        [],
        observation_space=gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
        action_space=gym.spaces.Box(-1, 1, (1,), np.float32),
    )
    reported = []
    sizes = write_episodes(dataset.storage.data_path / "main_data.hdf5", iter(parts), reported.append)
    dataset.storage.update_metadata({"total_episodes": sizes[0], "total_steps": sizes[1]})
    assert reported == [4, sizes[1]]
    assert sizes == (4, sum(len(part.rewards) for part in parts))

    dataset = minari.load_dataset("mine/test-v0")
    episodes = list(dataset.iterate_episodes())
    assert [len(episode) for episode in episodes] == [1, 3, 2, COMPACT_BYTES // 8]
    np.testing.assert_array_equal(np.concatenate([e.observations for e in episodes[:2]]), parts[0].observations)
    np.testing.assert_array_equal(np.concatenate([e.actions for e in episodes[2:]]), parts[1].actions)
    np.testing.assert_array_equal(np.concatenate([e.rewards for e in episodes[2:]]), parts[1].rewards)
    assert [episode.terminations.tolist() for episode in episodes[:3]] == [[False], [False, False, True], [False] * 2]
    assert [episode.truncations.tolist() for episode in episodes[:3]] == [[True], [False] * 3, [False, True]]
    assert episodes[0].terminations.dtype == bool
    assert [m["total_steps"] for m in dataset.storage.get_episode_metadata([0, 1])] == [1, 3]
    assert len(dataset.sample_episodes(3)) == 3
    assert dataset.filter_episodes(lambda episode: episode.terminations[-1]).total_steps == 3 + COMPACT_BYTES // 8
