import multiprocessing
import os
import time
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.resources import files

import minari
import pytest

from dawm.data import progress
from dawm.data.episodes import load_episodes
from dawm.data.sources import behaviour, embedded
from dawm.data.sources.catalog import EMBEDDED
from dawm.data.sources.embedded import build
from dawm.data.store import staging
from dawm.errors import UserError

REPLAY = "embedded/hopper/medium-replay"


@pytest.fixture
def root(tmp_path, monkeypatch):
    path = tmp_path / "minari"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(path))
    return path


def start(steps):
    """Another process that builds the medium data set; forked, so that it need not import everything again."""
    process = multiprocessing.get_context("fork").Process(target=build, args=("embedded/hopper/medium", 0, steps))
    process.start()
    return process


def hidden(root):
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


def test_the_same_seed_gives_the_same_data(tmp_path, monkeypatch):
    prints = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / folder))
        dataset_id = build(REPLAY, seed=seed, steps=300)
        assert dataset_id == f"{REPLAY}-seed{seed}-steps300-v0"
        prints.append(load_episodes(dataset_id).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_a_name_is_enough(root, monkeypatch):
    monkeypatch.setattr(embedded, "STEPS", 400)
    episodes = load_episodes(REPLAY)
    assert episodes.name == REPLAY
    assert 400 <= len(episodes) < 1400
    assert episodes.env_spec.id == "Hopper-v5"
    assert episodes.reference.source == "data set's metadata"
    assert episodes.reference.maximum == pytest.approx(3276.36, abs=0.01)
    assert list(minari.list_local_datasets()) == [f"{REPLAY}-v0"]
    assert minari.load_dataset(f"{REPLAY}-v0").recover_environment().spec.id == "Hopper-v5"
    assert hidden(root) == []
    before = (root / f"{REPLAY}-v0").stat().st_mtime_ns
    assert load_episodes(f"{REPLAY}-v0").fingerprint == episodes.fingerprint
    assert (root / f"{REPLAY}-v0").stat().st_mtime_ns == before  # not built again


def test_the_policies_are_what_they_are_called(root):
    """Guards against weights that were stored transposed, and against the float16 they are stored in."""
    expert = load_episodes(build("embedded/hopper/expert", steps=1)).episode_returns
    medium = load_episodes(build("embedded/hopper/medium", steps=1)).episode_returns
    assert len(expert) == len(medium) == 1
    assert expert[0] > 1300
    assert 500 < medium[0] < 1900


def test_every_policy_of_a_mixture_is_in_the_file():
    assert tuple(behaviour.MIXTURES) == EMBEDDED
    for mixture in behaviour.MIXTURES.values():
        assert sum(mixture.values()) == pytest.approx(1)
    folder = files("dawm.data.sources").joinpath("policies")
    weights = behaviour.load(folder.joinpath("hopper.safetensors").read_bytes())
    assert {key.split(".")[0] for key in weights} == {policy for mix in behaviour.MIXTURES.values() for policy in mix}
    assert sum(values.nbytes for values in weights.values()) < 1_000_000
    assert "Antonin RAFFIN" in folder.joinpath("LICENSE.txt").read_text()


def test_an_interrupted_build_leaves_nothing(root, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(behaviour, "sample_action", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(REPLAY, steps=300)
    assert list(root.iterdir()) == []
    assert os.environ["MINARI_DATASETS_PATH"] == str(root)


def test_a_killed_build_leaves_no_data_set_and_the_next_one_cleans_up(root):
    root.mkdir()
    process = start(steps=1_000_000)
    while not hidden(root):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert minari.list_local_datasets() == {}
    assert hidden(root)
    build("embedded/hopper/medium", steps=300)
    assert hidden(root) == []


def test_two_builds_at_once(root):
    processes = [start(steps=300) for _ in range(2)]
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert list(minari.list_local_datasets()) == ["embedded/hopper/medium-steps300-v0"]
    assert len(load_episodes("embedded/hopper/medium-steps300-v0")) >= 300
    assert hidden(root) == []


def put(folder, text):
    (folder / "mine/set-v0/data").mkdir(parents=True)
    (folder / "mine/set-v0/data/metadata.json").write_text(text)


def test_who_writes_for_hours_holds_up_nobody_and_keeps_the_folder(root):
    began = time.monotonic()
    with staging.staged("mine/set-v0") as folder:
        put(folder, "long")
        os.utime(folder, (0, 0))
        build("embedded/hopper/medium", steps=1)  # sweeps
        assert folder.is_dir()
    assert time.monotonic() - began < 60
    assert (root / "mine/set-v0/data/metadata.json").read_text() == "long"
    assert hidden(root) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_that_write_the_same_data_set_the_second_to_finish_replaces_it_only_if_told_to(root, overwrite):
    with ExitStack() as stack:
        stack.enter_context(nullcontext() if overwrite else pytest.raises(staging.OutputExists))
        put(stack.enter_context(staging.staged("mine/set-v0", overwrite)), "second")
        with staging.staged("mine/set-v0") as folder:
            put(folder, "first")
    assert (root / "mine/set-v0/data/metadata.json").read_text() == ("second" if overwrite else "first")
    assert hidden(root) == []


def test_without_a_lock_the_first_to_finish_wins(root, monkeypatch):
    @contextmanager
    def no_lock(folder):
        yield False

    def overtaken(*settings):
        monkeypatch.setattr(embedded, "play", behaviour.play)
        with monkeypatch.context() as patch:
            patch.setenv("MINARI_DATASETS_PATH", str(root))
            dataset_id = build("embedded/hopper/medium", steps=1)
        (root / dataset_id / "winner").touch()
        yield from behaviour.play(*settings)

    monkeypatch.setattr(staging, "lock", no_lock)
    monkeypatch.setattr(embedded, "play", overtaken)
    dataset_id = build("embedded/hopper/medium", steps=1)
    assert (root / dataset_id / "winner").exists()
    assert len(load_episodes(dataset_id)) > 1
    assert hidden(root) == []


@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (True, True), (False, False)])
def test_the_progress_bar_is_shown_on_a_terminal_unless_it_shall_be_quiet(root, capfd, monkeypatch, terminal, quiet):
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")  # rich takes this for a terminal
    monkeypatch.setattr(progress, "quiet", quiet)
    build("embedded/hopper/medium", steps=1)
    shown = capfd.readouterr()
    assert ("Building embedded/hopper/medium" in shown.err) == (terminal and not quiet)
    assert shown.out == ""


def test_an_unknown_name(root):
    with pytest.raises(UserError, match="nearest names are embedded/hopper/medium"):
        build("embedded/hopper/medum")
