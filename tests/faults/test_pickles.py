"""Nothing that is read is unpickled: a file that would run code when loaded is refused, by every command."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dawm.cli.main import main
from dawm.data.episodes import load_episodes


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def owned(tmp_path) -> Path:
    """Where the malicious pickle writes; that it would is seen first."""
    path = tmp_path / "owned"
    pickle.loads(pickle.dumps(Malicious(path))).close()
    path.unlink()
    return path


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A finished run of its own."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


def poison(run: Path, stage: str, owned: Path) -> Path:
    (path,) = (run / stage).glob("*/last.ckpt")
    content = torch.load(path, weights_only=True)
    torch.save(content | {"extra": Malicious(owned)}, path)
    return path


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("agent", ["evaluate", "--episodes", "1"]),
        ("world_model", ["synthesize", "--output", "imagined/poisoned/x-v0", "--transitions", "10"]),
        ("inverse_dynamics", ["synthesize", "--output", "imagined/poisoned/x-v0", "--transitions", "10"]),
    ],
)
def test_commands_refuse_a_checkpoint_that_runs_code(hopper, run, owned, capsys, stage, command):
    path = poison(run, stage, owned)
    assert main([*command, "--run", str(run)]) == 2
    line = capsys.readouterr().err.strip()
    assert str(path) in line
    assert "\n" not in line
    assert not owned.exists()


@pytest.mark.parametrize("stage", ["world_model", "inverse_dynamics", "agent"])
def test_fit_loads_it_neither_where_it_reuses_and_resumes_nor_where_it_is_given_it(
    smoke, tmp_path, owned, capsys, stage
):
    command = ["fit", "--config", str(smoke)]
    assert main(command) == 0
    path = poison(tmp_path / "run", stage, owned)
    capsys.readouterr()
    assert main([*command, f"--stages.{stage}.ckpt_path", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
    for finished in (True, False):  # from the one before
        if not finished:
            poison(tmp_path / "run", stage, owned)
            path.with_name("complete.json").unlink()
        assert main(command) == 0
        assert "not a safe checkpoint" in " ".join(capsys.readouterr().out.split())
    assert not owned.exists()


def npz(path: Path, owned: Path) -> None:
    array = np.empty(1, object)
    array[0] = Malicious(owned)
    with np.load(path) as whole:
        fields = {key: array for key in whole}
    np.savez(path, **fields)


def test_the_cache_holds_plain_arrays(dataset, tmp_path, owned):
    fingerprint = load_episodes(dataset, memory_limit=0.0).fingerprint
    (path,) = (tmp_path / "cache").glob("*/data/episodes.npz")
    npz(path, owned)
    assert load_episodes(dataset, memory_limit=0.0).fingerprint == fingerprint  # built again
    assert not owned.exists()


@pytest.mark.parametrize("name", ["evil.hdf5", "evil.h5"])
def test_a_data_set_that_is_a_pickle_is_refused(smoke, tmp_path, owned, capsys, name):
    (tmp_path / name).write_bytes(pickle.dumps(Malicious(owned)))
    options = ["--data.dataset", str(tmp_path / name), "--data.env_id", "Hopper-v5"]
    assert main(["fit", "--config", str(smoke), *options]) == 2
    assert name in capsys.readouterr().err
    assert main(["datasets", "check", str(tmp_path / name)]) in (1, 2)
    assert not owned.exists()
