"""Two runs never write over each other: the second of one folder waits or is refused, and so is a stray group."""

import json
import os
import threading
import time

import pytest
from processes import CONTEXT

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
    process = CONTEXT.Process(target=hold, args=(tmp_path, 60))
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
    process = CONTEXT.Process(target=hold, args=(tmp_path, 1))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.05)
    begun = time.monotonic()
    with only_run_in(tmp_path, wait=True):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert time.monotonic() - begun < 60
    process.join()


def test_runs_share_stages_and_wait_for_one_that_another_is_training(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr("dawm.training.ranks.INTERVAL", 0.05)
    options = ["fit", "--config", str(smoke), "--stages_dir", str(tmp_path / "stages"), "--output_dir"]
    assert main([*options, str(tmp_path / "one")]) == 0
    assert not (tmp_path / "one" / "world_model").exists()
    trained = only_run_in(next((tmp_path / "stages" / "world_model").iterdir()), wait=False)
    trained.__enter__()
    timer = threading.Timer(5, trained.__exit__, (None, None, None))
    timer.start()
    begun = time.monotonic()
    assert main([*options, str(tmp_path / "two"), "--data.synthetic_fraction", "1"]) == 0
    timer.join()
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert [results["stages"][stage]["reused"] for stage in ("world_model", "inverse_dynamics", "agent")] == [1, 1, 0]
    assert 0 < results["seconds"]["waiting"] < time.monotonic() - begun


def test_several_devices_share_no_stages(smoke, tmp_path, capsys):
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    assert main(["fit", "--config", str(smoke), "--stages_dir", str(tmp_path / "stages"), *ranks]) == 2
    assert "--stages_dir: got" in capsys.readouterr().err


def test_processes_of_torchrun_that_would_train_apart_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--trainer.devices: got 1, expected the 2 processes"):
        check_launcher({"devices": 1, "num_nodes": 1})
    check_launcher({"devices": 2, "num_nodes": 1})
    check_launcher({"devices": "auto", "num_nodes": 1})
