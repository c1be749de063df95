import json
import shutil
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from minari.cli import app
from minari.data_collector import EpisodeBuffer
from rich.console import Console
from typer.testing import CliRunner

from dawm.cli.check import check_dataset
from dawm.cli.datasets import build_dataset, import_file, list_datasets, show_dataset
from dawm.data.episodes import load_episodes
from dawm.data.sources import embedded
from dawm.data.sources.d4rl import D4RLSource
from dawm.data.store import staging
from dawm.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*(set to None|env_spec is None):UserWarning")


@pytest.fixture
def console():
    return Console(record=True, width=120)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "minari"


def edit(path, **columns):
    """Replaces columns of a file, or removes them."""
    with h5py.File(path, "a") as file:
        for key, values in columns.items():
            del file[key]
            if values is not None:
                file[key] = values


def rows_of(path, key):
    with h5py.File(path) as file:
        return file[key][()]


def hopper_file(path, rows=5):
    generator = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = generator.standard_normal((rows, 11)).astype(np.float32)
        file["actions"] = generator.uniform(-1, 1, (rows, 3)).astype(np.float32)
        file["rewards"] = np.ones((rows, 1))
        file["terminals"] = np.arange(rows) == rows - 1
        file["timeouts"] = np.zeros(rows, bool)
    return path


def hidden(root):
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("next_observations", [True, False])
def test_an_imported_file_loads_as_the_file_does(write_dataset, console, monkeypatch, root, next_observations):
    monkeypatch.setattr("dawm.data.sources.d4rl.BLOCK", 3)  # episodes cross the blocks
    path = write_dataset(next_observations=next_observations)
    import_file(console, Path(path), "mine/rows-v0", reference_minimum=1, reference_maximum=3)
    file, imported = load_episodes(path), load_episodes("mine/rows-v0")
    assert imported.fingerprint == file.fingerprint
    assert torch.equal(imported.ends, file.ends)
    assert torch.equal(imported.end_observed, file.end_observed)
    assert imported.end_observed.all() == next_observations
    assert (imported.reference.minimum, imported.reference.maximum) == (1, 3)
    assert hidden(root) == []
    assert (root / "mine/namespace_metadata.json").is_file()


def test_an_import_keeps_environment_and_d4rls_scores(tmp_path, console):
    import_file(console, hopper_file(tmp_path / "hopper_medium-v2.hdf5"), "mine/hopper/medium-v0")
    dataset = minari.load_dataset("mine/hopper/medium-v0")
    assert dataset.recover_environment().spec.id == "Hopper-v5"
    assert minari.get_normalized_score(dataset, np.array(3234.3)) == 1
    reference = load_episodes("mine/hopper/medium-v0").reference
    assert (reference.minimum, reference.maximum) == (-20.272305, 3234.3)
    assert reference.source == "data set's metadata, D4RL v2 table"
    shown = CliRunner().invoke(app, ["show", "mine/hopper/medium-v0"])
    assert shown.exit_code == 0
    assert "Hopper-v5" in shown.output


def test_an_import_is_cut_where_the_observations_do_not_lead_on(dataset, console):
    nexts = rows_of(dataset, "next_observations")
    nexts[1] += 0.5  # row 1 of the first episode, of five
    nexts[2] += 1e-7  # rounding
    edit(dataset, next_observations=nexts)
    import_file(console, Path(dataset), "mine/rows-v0")
    with pytest.warns(UserWarning, match="another episode begins there"):
        file = load_episodes(dataset)
    imported = load_episodes("mine/rows-v0")
    assert imported.ends.tolist() == file.ends.tolist()
    assert imported.ends[:2].tolist() == [2, 5]
    torch.testing.assert_close(imported.transitions.next_observations, file.transitions.next_observations)
    assert imported.transitions.terminations.equal(file.transitions.terminations)
    assert "next_observations: 1 are not" in console.export_text()


def test_an_interrupted_import_leaves_what_was_there(dataset, console, root, monkeypatch):
    import_file(console, Path(dataset), "mine/rows-v0")
    before = load_episodes("mine/rows-v0").fingerprint
    read = D4RLSource._read

    def interrupt(self, file, key, *place):
        if key == "rewards":
            raise KeyboardInterrupt
        return read(self, file, key, *place)

    with monkeypatch.context() as patch:
        patch.setattr(D4RLSource, "_read", interrupt)
        for output, overwrite in (("mine/rows-v0", True), ("other/rows-v0", False)):
            with pytest.raises(KeyboardInterrupt):
                import_file(console, Path(dataset), output, overwrite=overwrite)
    assert [path.name for path in root.iterdir()] == ["mine"]
    assert load_episodes("mine/rows-v0").fingerprint == before
    edit(dataset, rewards=np.arange(26.0))
    import_file(console, Path(dataset), "mine/rows-v0", overwrite=True)
    assert load_episodes("mine/rows-v0").fingerprint == load_episodes(dataset).fingerprint != before
    assert hidden(root) == []


def test_mistakes_when_importing(dataset, console, root):
    def message(output, file=dataset, **settings):
        with pytest.raises(UserError) as caught:
            import_file(console, Path(file), output, **settings)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "write it as namespace/name-v0" in message("rows")
    assert "write it as namespace/name-v0" in message("../rows-v0")
    assert "expected another namespace" in message("embedded/rows-v0")
    assert "does not exist" in message("mine/rows-v0", file="absent.hdf5")
    assert "give both" in message("mine/rows-v0", reference_minimum=1.0)
    edit(dataset, observations=np.zeros((1, 2)), next_observations=None)
    assert "mend the file" in message("mine/rows-v0")
    edit(dataset, actions=np.zeros((1, 1)), rewards=[0.0], terminals=[False], timeouts=[False])
    assert "expected a complete step" in message("mine/rows-v0")
    assert hidden(root) == []
    edit(dataset, terminals=[True])
    import_file(console, Path(dataset), "mine/rows-v0")
    assert "expected a new id" in message("mine/rows-v0")


def lines_of(console, dataset):
    count = check_dataset(console, dataset)
    lines = console.export_text().splitlines()
    assert len(lines) == max(count, 1)
    return lines


def test_every_defect_of_a_file_has_its_line(dataset, console):
    rows = np.arange(26.0)
    observations, nexts = rows_of(dataset, "observations"), rows_of(dataset, "next_observations")
    observations[[3, 20], 0] = np.nan
    nexts[[2, 6], 0] = np.nan, np.inf  # row 2 is row 3's observation, and already reported
    nexts[9, 1] += 1
    actions = np.stack([rows / 1000, np.where(rows == 4, 1.2, 0.5)], axis=1)
    edit(dataset, observations=observations, next_observations=nexts, actions=actions, rewards=np.full(26, -1.0))
    edit(dataset, timeouts=None)
    assert lines_of(console, dataset) == [
        "timeouts: the file has none; episodes are cut at terminals alone",
        # rows 6 and 9; and 7, 18, 19, where episodes were truncated
        "next_observations: 5 are not the observations of the next row of the same episode, the first in row 6; "
        "another episode begins there",
        "observations[0]: 2 NaN or infinite values, the first in row 3",
        "next_observations[0]: 1 NaN or infinite values, the first in row 6",
        "actions: 1 rows outside the space in columns 1, the first in row 4",
        "rewards: always -1",
    ]


def test_episodes_that_should_not_be(console, root):
    def buffer(observations, terminations):
        steps = len(terminations)
        return EpisodeBuffer(
            observations=np.array(observations, np.float32)[:, None],
            actions=np.linspace(-0.5, 0.5, steps, dtype=np.float32)[:, None],
            rewards=np.arange(steps, dtype=np.float32),
            terminations=np.array(terminations, bool),
            truncations=np.zeros(steps, bool),
        )

    episodes = [buffer([0, 1, 2, 3], [0, 1, 0]), buffer([5, 6, 7], [0, 1]), buffer([5, 6, 8], [0, 1])]
    written = minari.create_dataset_from_buffers(
        "toy/odd-v0", episodes, observation_space=Box(-9, 9, (1,)), action_space=Box(-1, 1, (1,))
    )
    with h5py.File(root / "toy/odd-v0/data/main_data.hdf5", "a") as file:  # Minari itself refuses to write such
        file["episode_3/observations"], file["episode_3/actions"] = np.ones((1, 1)), np.ones((0, 1))
        file["episode_3/rewards"], file["episode_3/terminations"] = np.ones(0), np.ones(0, bool)
    written.storage.update_metadata({"total_episodes": 4})
    assert lines_of(console, "toy/odd-v0") == [
        "episodes: 1 without a step; they are left out",
        "terminations: 1 with further steps after them in the same episode, the first in row 1; "
        "another episode begins there",
        "episodes: 1 the same as an earlier one, the first in row 5, the same as that in row 3",
    ]


def test_episodes_longer_than_the_time_limit(tmp_path, console):
    path = hopper_file(tmp_path / "hopper_medium-v2.hdf5", rows=1005)
    assert lines_of(console, str(path))[-1] == (
        "episodes: 1 longer than the 1000 steps of Hopper-v5, the first in row 0, of 1005 steps"
    )


def test_a_file_without_rows(dataset, console):
    edit(dataset, **{key: rows_of(dataset, key)[:0] for key in ("observations", "next_observations", "actions")})
    edit(dataset, **{key: rows_of(dataset, key)[:0] for key in ("rewards", "terminals", "timeouts")})
    assert lines_of(console, dataset) == ["steps: there are none"]
    show_dataset(console, dataset)
    assert "returns" in console.export_text()


def test_sound_data_have_no_defects(dataset, console):
    actions = np.random.default_rng(0).uniform(-1, 1, (26, 1))
    edit(dataset, actions=actions)
    assert lines_of(console, dataset) == ["no defects"]


def test_show_gives_what_can_be_known_of_broken_data(write_dataset, console):
    path = write_dataset(lengths=(2, 3, 1), terminated=(True, False, False))
    rewards = np.array([1.0, 2.0, 10.0, 20.0, 30.0, np.nan])
    edit(path, rewards=rewards)
    show_dataset(console, path)
    text = " ".join(console.export_text().split())
    assert "episodes 3 " in text
    assert "steps 6 " in text
    assert "returns mean 31.5, from 3.0 to 60.0" in text
    assert "episode lengths mean 2.0, from 1.0 to 3.0" in text
    assert "terminated 33.3%" in text
    assert "NaN or infinite 1 in rewards" in text
    assert "3.0 to 8.7 ████████████████████████████████████████ 1" in text
    assert "score not known" in text


def test_show_scores_the_data_and_names_the_table(tmp_path, console):
    show_dataset(console, str(hopper_file(tmp_path / "hopper_medium-v2.hdf5", rows=200)))
    # a return of 200 rewards of 1: (200 + 20.27) / (3234.3 + 20.27)
    assert "6.8 (0 is -20.3, 100 is 3,234.3, from: D4RL v2 table)" in console.export_text()


def test_list_shows_what_is_here_and_what_could_be(dataset, console, root):
    import_file(console, Path(dataset), "mujoco/hopper/medium-v0")
    (root / "broken/data").mkdir(parents=True)
    console.export_text()
    list_datasets(console)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]
    table = {row[0]: row[1:] for row in rows if row}
    assert table["mujoco/hopper/medium-v0"][:3] == ["here", "6", "26"]
    assert table["broken"][0] == "here, but not readable"
    assert table["embedded/hopper/medium"] == ["can be built", "", "about 40,000", ""]
    assert table["mujoco/hopper/expert-v0"] == ["Minari's server", "", "", ""]


def test_list_asks_the_server_for_sizes(console, root, monkeypatch):
    metadata = {"total_episodes": 7, "total_steps": 12345, "dataset_size": 1.5}
    monkeypatch.setattr("minari.list_remote_datasets", lambda: {"new/set-v0": metadata})
    list_datasets(console, remote=True)
    (line,) = (line for line in console.export_text().splitlines() if "new/set-v0" in line)
    assert [cell.strip() for cell in line.split("│")[2:-1]] == ["Minari's server", "7", "12,345", "1.5 MB"]

    def unreachable():
        raise ConnectionError("no route")

    monkeypatch.setattr("minari.list_remote_datasets", unreachable)
    with pytest.raises(UserError, match="--remote: .*no route"):
        list_datasets(console, remote=True)


def test_build_again(console, root, monkeypatch):
    monkeypatch.setattr(embedded, "STEPS", 1)
    folder = root / "embedded/hopper/medium-v0"
    births = []
    for overwrite in (False, False, True):
        build_dataset(console, "embedded/hopper/medium", overwrite=overwrite)
        births.append(folder.stat().st_ino)
    assert births[0] == births[1] != births[2]
    assert console.export_text().count("is ready") == 3
    assert hidden(root) == []


def test_a_download_from_the_server(dataset, console, root, monkeypatch, tmp_path, capfd):
    import_file(console, Path(dataset), "mujoco/hopper/medium-v0")
    server = tmp_path / "server"
    shutil.move(root, server)
    capfd.readouterr()

    def download(dataset_id):
        shutil.copytree(server / dataset_id, staging.dataset_folder(dataset_id))

    monkeypatch.setattr(minari, "download_dataset", download)
    assert len(load_episodes("mujoco/hopper/medium-v0")) == 26
    assert "looking for mujoco/hopper/medium-v0 on Minari's server" in capfd.readouterr().err


@pytest.mark.parametrize("error", [ConnectionError("Name or service not known\nand more"), KeyboardInterrupt()])
def test_a_broken_download_leaves_nothing(root, monkeypatch, error):
    def download(dataset_id):
        folder = staging.dataset_folder(dataset_id) / "data"
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text(json.dumps({"total_steps": 1}))
        raise error

    monkeypatch.setattr(minari, "download_dataset", download)
    for _ in range(2):  # the second attempt downloads again
        with pytest.raises((UserError, KeyboardInterrupt)) as caught:
            load_episodes("mujoco/hopper/medium-v0")
        assert isinstance(caught.value, KeyboardInterrupt) or "(Name or service not known)" in str(caught.value)
    assert not list(root.rglob("data"))


def test_jumps_are_named(dataset, console):
    """Two recordings in one episode, as where a reset has no flag."""
    generator = np.random.default_rng(0)
    observations = generator.normal(size=(26, 4)).cumsum(axis=0)
    observations[4:] += 100
    nothing = np.zeros(26, bool)
    edit(dataset, observations=observations, next_observations=None, terminals=nothing, timeouts=nothing)
    edit(dataset, actions=generator.uniform(-1, 1, (26, 1)))
    assert lines_of(console, dataset) == [
        "observations: 1 jumps inside episodes, of 25 times the usual step or more, the first after row 3; perhaps an "
        "episode ends there"
    ]
