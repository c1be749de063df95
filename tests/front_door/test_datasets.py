"""`datasets` through the front door: what it prints and how it ends."""

import h5py
import numpy as np
import pytest

from dawm.cli.main import main


@pytest.fixture
def file(tmp_path):
    """A D4RL-layout file of two Hopper-shaped episodes."""
    path = tmp_path / "mine.hdf5"
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(41, 11)).astype(np.float32)
    with h5py.File(path, "w") as content:
        content["observations"], content["next_observations"] = observations[:-1], observations[1:]
        content["actions"] = rng.uniform(-1, 1, (40, 3)).astype(np.float32)
        content["rewards"] = rng.normal(size=40).astype(np.float32)
        content["terminals"], content["timeouts"] = np.arange(40) == 19, np.arange(40) == 39
    return path


def test_import_then_check_show_and_list(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    command = ["datasets", "import", str(file), "--env_id", "Hopper-v5", "--output", "mine/hopper/first-v0"]
    assert main(command) == 0
    assert main(["datasets", "check", "mine/hopper/first-v0"]) == 0
    assert main(["datasets", "show", "mine/hopper/first-v0"]) == 0
    assert main(["datasets", "list"]) == 0
    printed = capsys.readouterr().out
    assert "no defects" in printed
    assert "Hopper-v5" in printed


def test_check_counts_as_failure(file, capsys):
    with h5py.File(file, "a") as content:
        content["rewards"][7] = np.nan
    assert main(["datasets", "check", str(file)]) == 1
    assert "rewards" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["show", "embedded/nope"], ["build", "embedded/hoper/medium"], []])
def test_mistakes(arguments, capsys):
    assert main(["datasets", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")
