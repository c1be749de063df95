"""A disk that is full or may not be written ends a run in one line; what was there stays, and the run resumes later."""

import errno
import json
import os
import subprocess
from pathlib import Path

import processes
import pytest
import yaml

from dawm import files as dawm_files
from dawm.cli.main import main
from dawm.training import checkpoints


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def checkpoints_and_results(folder: Path) -> dict[Path, bytes]:
    return {path: content for path, content in files(folder).items() if path.suffix in (".ckpt", ".json")}


def one_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "logging interval" not in line and line]
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    return lines[0]


def limited(config: Path, folder: Path, size: int) -> subprocess.CompletedProcess:
    """`fit` where no file may grow beyond a size: a true failure of the write itself, also for root."""
    return processes.run(["fit", "--config", str(config)], folder, limit=size)


# The loggers' first files, TensorBoard's thread, a checkpoint. What the process prints goes into a file as well: its
# message has to fit, with a long path in it.
@pytest.mark.parametrize("size", [300, 1000, 20_000])
def test_files_that_may_not_grow(smoke, tmp_path, size):
    done = limited(smoke, tmp_path, size)
    assert done.returncode == 2
    assert str(tmp_path / "run") in one_line(done.stderr)
    assert "output_dir" in done.stderr
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_what_was_there_stays_and_the_run_resumes_once_there_is_room(smoke, tmp_path):
    config = yaml.safe_load(smoke.read_text())
    config["agent"]["init_args"]["hidden"] = [300, 300]  # the agent's checkpoint alone is too large
    smoke.write_text(yaml.safe_dump(config))
    done = limited(smoke, tmp_path, 3_000_000)
    assert done.returncode == 2
    assert "/agent/" in one_line(done.stderr)
    before = checkpoints_and_results(tmp_path / "run")
    assert {path.parts[-3] for path in before} == {"world_model", "inverse_dynamics"}
    assert main(["fit", "--config", str(smoke)]) == 0
    after = files(tmp_path / "run")
    assert all(after[path] == content for path, content in before.items())
    stages = json.loads((tmp_path / "run" / "results.json").read_text())["stages"]
    assert [stage["reused"] for stage in stages.values()] == [True, True, False]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_any_reason_not_to_write_a_checkpoint(smoke, tmp_path, monkeypatch, capsys, number, place):
    """The second checkpoint fails; the first is still the last one, whole."""
    saved = []

    def fail(path, *args):
        if Path(os.readlink(f"/proc/self/fd/{path}") if place == "fsync" else path).name.startswith(".last.ckpt."):
            saved.append(path)
            if len(saved) == 2:
                raise OSError(number, os.strerror(number))
        return original(path, *args)

    original = getattr(os, place)
    monkeypatch.setattr(dawm_files.os, place, fail)
    assert main(["fit", "--config", str(smoke)]) == 2
    line = one_line(capsys.readouterr().err)
    assert os.strerror(number) in line
    assert "output_dir" in line
    left = [path.name for path in (tmp_path / "run" / "world_model").rglob("*") if "ckpt" in path.name]
    assert left in (["last.ckpt"], ["previous.ckpt"])
    monkeypatch.undo()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (path,) = (tmp_path / "run" / "world_model").rglob(left[0])
    assert checkpoints.read_checkpoint(path)["global_step"] == 10


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(smoke, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert main(["fit", "--config", str(smoke), "--output_dir", str(tmp_path / "locked" / "run")]) == 2
    assert "output_dir" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("where", ["a file", "below a file"])
def test_a_folder_that_cannot_be(smoke, tmp_path, capsys, where):
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" if where == "a file" else tmp_path / "file" / "run"
    assert main(["fit", "--config", str(smoke), "--output_dir", str(folder)]) == 2
    assert "output_dir" in one_line(capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "mine"
