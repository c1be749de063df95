"""Two runs never write over each other: the second of one folder waits or is refused, and so is a stray group."""

import json
import multiprocessing
import os
import time

import pytest

from dawm.cli.main import main
from dawm.errors import UserError
from dawm.training.ranks import check_launcher, only_run_in


def hold(folder, seconds):
    with only_run_in(folder, wait=False):
        (folder / "held").touch()
        time.sleep(seconds)


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in the folder."""
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path, 60))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.05)
    yield process
    process.kill()
    process.join()


def test_a_second_fit_in_the_folder_names_the_process_that_has_it(holder, smoke, tmp_path, capsys):
    assert main(["fit", "--config", str(smoke), "--output_dir", str(tmp_path)]) == 2
    assert f"process {holder.pid}" in capsys.readouterr().err
    holder.kill()
    holder.join()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == holder.pid, "stale, as a killed run leaves it"
    with only_run_in(tmp_path, wait=False):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_waiting_takes_the_folder_over(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path, 1))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.05)
    begun = time.monotonic()
    with only_run_in(tmp_path, wait=True):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert time.monotonic() - begun < 60
    process.join()


def test_processes_of_torchrun_that_would_train_apart_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--trainer.devices: got 1, expected the 2 processes"):
        check_launcher({"devices": 1, "num_nodes": 1})
    check_launcher({"devices": 2, "num_nodes": 1})
    check_launcher({"devices": "auto", "num_nodes": 1})
