"""Data sets beyond the memory limit. Every number names its row, so that a row in a wrong place is seen."""

import errno
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from dawm.data.episodes import load_episodes
from dawm.data.module import TransitionDataModule
from dawm.data.store import cache
from dawm.errors import UserError

LOADERS = ["mixed_loader", "segment_loader", "transition_loader"]
SPACE, ACTIONS = spaces.Box(-np.inf, np.inf, (2,), np.float64), spaces.Box(-2, 2, (1,), np.float32)

pytestmark = pytest.mark.filterwarnings("ignore:.*(set to None|env_spec is None):UserWarning")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of its own; data are read in blocks smaller than an episode."""
    monkeypatch.setattr("dawm.data.sources.d4rl.BLOCK", 4)
    monkeypatch.setattr("dawm.data.sources.minari.BLOCK", 4)
    monkeypatch.setenv("DAWM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def minari_set():
    rows = np.cumsum([0, 3, 9, 1, 6])
    buffers = [
        EpisodeBuffer(
            observations=np.stack([np.arange(start, stop + 1.0), -np.arange(start, stop + 1.0)], axis=1),
            actions=np.arange(start, stop)[:, None] / 20,
            rewards=np.arange(start, stop) + 0.25,
            terminations=np.arange(start, stop) == (stop - 1 if number % 2 else -1),
            truncations=np.arange(start, stop) == (-1 if number % 2 else stop - 1),
        )
        for number, (start, stop) in enumerate(zip(rows, rows[1:]))
    ]
    minari.create_dataset_from_buffers("toy/line-v0", buffers, observation_space=SPACE, action_space=ACTIONS)
    return "toy/line-v0"


def mapped(dataset):
    return load_episodes(dataset, memory_limit=0.0)


def plain(dataset, monkeypatch):
    """The data set as it is in memory, read in one block."""
    with monkeypatch.context() as patch:
        patch.setattr("dawm.data.sources.d4rl.BLOCK", 10**6)
        patch.setattr("dawm.data.sources.minari.BLOCK", 10**6)
        return load_episodes(dataset)


def assert_same(first, second):
    assert first.fingerprint == second.fingerprint
    for key in ("rows", "ends", "terminated", "end_observed", "episode_returns", "low", "high"):
        assert torch.equal(getattr(first, key), getattr(second, key)), key


@pytest.mark.parametrize("kind", ["minari", "d4rl", "without_next", "joined"])
def test_the_cache_changes_nothing(folder, kind, minari_set, write_dataset, monkeypatch):
    """Built, stored, and read by another reader: the rows are those of the plain data set."""
    names = {
        "minari": minari_set,
        "d4rl": write_dataset(),
        "without_next": write_dataset(next_observations=False),
        "joined": f"{write_dataset()}+{write_dataset([9, 2], [True, False], next_observations=False)}",
    }
    expected = plain(names[kind], monkeypatch)
    assert expected.cache is None
    assert not folder.exists()  # what fits into memory is not cached
    for _ in range(2):
        episodes = mapped(names[kind])
        assert_same(episodes, expected)
        assert episodes.cache is not None
    torch.testing.assert_close(episodes.returns_to_go(0.9), expected.returns_to_go(0.9))
    assert [len(list(entry.iterdir())) for entry in folder.iterdir()] == [1]  # nothing staged is left


def test_one_pass_gives_range_and_returns(folder, dataset):
    """26 rows (see conftest): the second episode is rows 5 to 7, which gives 3 * 0.25 + 5 + 6 + 7."""
    episodes = mapped(dataset)
    assert episodes.episode_returns[1] == 18.75
    assert torch.equal(episodes.low, episodes.rows.amin(dim=0))
    assert torch.equal(episodes.high, episodes.rows.amax(dim=0))
    assert episodes.transitions.unpack(episodes.high, *episodes.sizes).observations.tolist() == [25, 5]
    assert episodes.truncated.tolist() == [False, True, False, True, True, False]


def test_statistics_come_from_a_sample_of_a_large_data_set(dataset, monkeypatch):
    """Episodes 1 and 4 are the rows 5 to 7 and 19."""
    episodes, chosen = load_episodes(dataset), torch.tensor([1, 4])
    assert episodes.sample_rows(chosen).tolist() == [5, 6, 7, 19]
    assert episodes.sample_rows().tolist() == list(range(26))
    monkeypatch.setattr("dawm.data.episodes.STATISTICS_ROWS", 3)
    assert set(episodes.sample_rows(chosen).tolist()) <= {5, 6, 7, 19}
    sample = episodes.sample_rows()
    assert len(sample) == 3
    assert sample.tolist() == sorted(episodes.sample_rows().tolist())


@pytest.mark.parametrize("name", LOADERS)
def test_batches_from_the_mapped_file_are_those_from_memory(folder, write_dataset, name):
    path = write_dataset(next_observations=False)
    settings = {"horizon": 3, "batch_size": 10, "segment_batch_size": 6, "updates_per_step": 2, "discount": 0.5}
    first, second = (TransitionDataModule(path, **settings, memory_limit=limit) for limit in (4.0, 0.0))
    first.setup(), second.setup()
    second.to("cpu")
    for one, other in zip(getattr(first, name)(8), getattr(second, name)(8)):
        pairs = list(zip(vars(one).values(), vars(other).values()))
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", LOADERS)
def test_mapped_rows_stay_on_the_cpu_and_batches_go_to_the_device(folder, dataset, name):
    """ "meta" stands in for a GPU that is too small for the rows."""
    data = TransitionDataModule(dataset, horizon=3, memory_limit=0.0)
    data.setup()
    data.to("meta")
    batch = next(iter(getattr(data, name)(4)))
    assert {values.device.type for values in vars(batch).values() if values is not None} == {"meta"}
    assert data.episodes.rows.device.type == data._mixture.real.device.type == "cpu"


def test_a_second_start_does_not_read_the_data_set(folder, dataset, monkeypatch):
    mapped(dataset)
    monkeypatch.setattr("dawm.data.sources.d4rl.D4RLSource.blocks", None)
    assert len(mapped(dataset)) == 26
    moved = Path(dataset).rename(Path(dataset).with_name("moved.hdf5"))
    assert len(mapped(str(moved))) == 26  # the key is the content, not the place


def test_a_changed_data_set_is_read_again(folder, dataset):
    before = mapped(dataset)
    with h5py.File(dataset, "a") as file:
        file["rewards"][3] = 100
    after = mapped(dataset)
    assert after.transitions.rewards[3] == 100
    assert before.transitions.rewards[3] == 3.25  # whoever has it mapped keeps it
    assert len(list(folder.iterdir())) == 1  # and of what is outdated nothing is left


def test_the_same_size_and_time_with_other_content(folder, dataset):
    """As left by tools that set a file's time."""
    mapped(dataset)
    status = os.stat(dataset)
    with h5py.File(dataset, "a") as file:
        file["rewards"][3] = 100
    os.utime(dataset, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(dataset).st_size == status.st_size
    assert mapped(dataset).transitions.rewards[3] == 100


def test_a_change_that_no_sample_sees(folder, dataset, monkeypatch):
    """Of a large file little is sampled, but every writer leaves a new time."""
    monkeypatch.setattr(cache, "_SAMPLES", 1)
    monkeypatch.setattr(cache, "_SAMPLE_BYTES", 8)  # the format's signature
    mapped(dataset)
    with h5py.File(dataset, "a") as file:
        file["rewards"][3] = 100
    assert mapped(dataset).transitions.rewards[3] == 100


@pytest.mark.parametrize("damage", ["truncated", "no_meta", "half_meta", "half_episodes", "deleted"])
def test_a_damaged_cache_is_built_again(folder, dataset, damage, monkeypatch):
    mapped(dataset)
    (data,) = folder.glob("*/data")
    if damage == "truncated":
        os.truncate(data / "rows.f32", (data / "rows.f32").stat().st_size - 4)
    elif damage == "no_meta":
        (data / "meta.json").unlink()
    elif damage == "half_meta":
        os.truncate(data / "meta.json", 40)
    elif damage == "half_episodes":
        os.truncate(data / "episodes.npz", 200)
    else:
        cache.shutil.rmtree(folder)
    assert_same(mapped(dataset), plain(dataset, monkeypatch))


def test_truncated_returns_are_computed_again(folder, dataset):
    expected = mapped(dataset).returns_to_go(0.5).clone()
    (path,) = folder.glob("*/data/returns-*.f32")
    os.truncate(path, 8)
    assert torch.equal(mapped(dataset).returns_to_go(0.5), expected)


@pytest.mark.parametrize("when", ["before", "while_writing"])
def test_a_full_disk(folder, dataset, when, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    if when == "before":
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: cache.shutil._ntuple_diskusage(1, 1, 0))
    else:
        fsync = os.fsync
        monkeypatch.setattr(cache.os, "fsync", lambda descriptor: (_ for _ in ()).throw(full))
    with pytest.raises(UserError, match="^--data.cache_dir: got .*No space left on device.*name a folder") as caught:
        mapped(dataset)
    assert "\n" not in str(caught.value)
    assert not list(folder.glob("*/*"))
    if when == "while_writing":
        monkeypatch.setattr(cache.os, "fsync", fsync)
        assert len(mapped(dataset)) == 26


def test_data_that_cannot_be_used_leave_nothing(folder, dataset):
    with h5py.File(dataset, "a") as file:
        file["rewards"][7] = np.nan
    with pytest.raises(UserError, match="1 NaN or infinite values in rewards, the first in row 7"):
        mapped(dataset)
    assert not list(folder.glob("*/*"))


def test_a_failed_build_leaves_the_lock_to_who_waits_for_it(folder, dataset, monkeypatch):
    """Who comes later must meet the folder that is locked, or it removes what is being written there."""
    fcntl = pytest.importorskip("fcntl")
    waiting: list[int] = []

    def fail(staged, *_):
        waiting.append(os.open(staged.parent, os.O_RDONLY))  # as `lock` does
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(cache, "_write", fail)
    with pytest.raises(UserError, match="broken"):
        mapped(dataset)
    fcntl.flock(waiting[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    (place,) = folder.iterdir()
    with cache.lock(place, patience=0.0) as locked:
        assert not locked
    os.close(waiting[0])


PROCESS = """
import signal, sys, time
from pathlib import Path
from dawm.data.sources import d4rl
from dawm.data.store import cache
from dawm.data.episodes import load_episodes
signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests in the background has it ignored
d4rl.BLOCK = 1
look, blocks = cache._build, d4rl.D4RLSource.blocks

def together(*arguments):  # no process may build before all have found the cache empty
    Path(sys.argv[2], sys.argv[3]).touch()
    while len(list(Path(sys.argv[2]).iterdir())) < 2:
        time.sleep(0.01)
    return look(*arguments)

def slow(self):
    print("reads", flush=True)
    for block in blocks(self):
        time.sleep(float(sys.argv[4]))
        yield block

cache._build, d4rl.D4RLSource.blocks = together, slow
print(load_episodes(sys.argv[1], memory_limit=0.0).fingerprint)
"""


def start(dataset, place, name, pause=0.02):
    arguments = dataset, str(place), name, str(pause)
    return subprocess.Popen([sys.executable, "-c", PROCESS, *arguments], stdout=subprocess.PIPE, text=True)


def test_two_processes_that_start_at_once_build_it_once(folder, dataset, tmp_path, monkeypatch):
    place = tmp_path / "ready"
    place.mkdir()
    outputs = [process.communicate(timeout=120)[0].split() for process in [start(dataset, place, n) for n in "ab"]]
    assert {output[-1] for output in outputs} == {plain(dataset, monkeypatch).fingerprint}
    assert sorted(len(output) for output in outputs) == [1, 2]  # one of them read the data set


def test_a_process_that_waits_for_the_build_and_is_interrupted_leaves_it_alone(folder, dataset, tmp_path):
    (tmp_path / "ready").mkdir()
    processes = [start(dataset, tmp_path / "ready", name, pause=0.2) for name in "ab"]
    reading = select.select([process.stdout for process in processes], [], [], 60)[0]  # says so before it builds
    (waiting,) = (process for process in processes if process.stdout not in reading)
    time.sleep(1)  # until it waits; the other one takes five seconds
    waiting.send_signal(signal.SIGINT)
    assert sorted(len(process.communicate(timeout=120)[0].split()) for process in processes) == [0, 2]


def test_a_killed_build_is_begun_again(folder, dataset, tmp_path):
    place = tmp_path / "ready"
    place.mkdir()
    (place / "other").touch()
    process = start(dataset, place, "a")
    assert process.stdout.readline() == "reads\n"
    while not list(folder.glob("*/.staged-*/.rows.f32.*")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert list(folder.glob("*/.staged-*"))
    assert len(mapped(dataset)) == 26
    assert not list(folder.glob("*/.staged-*"))
