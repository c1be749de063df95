"""A rank that dies takes the others with it, and its own error is seen; no process hangs or is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.ddp

DYING = '''
import os, signal, time
import lightning as L

from dawm.errors import UserError


class Die(L.Callback):
    """One rank dies; the other is busy, and not in a collective that would tell it, or goes on."""

    def __init__(self, rank: int, how: str, busy: bool):
        self.rank, self.how, self.busy = rank, how, busy

    def on_train_batch_start(self, trainer, *args):
        with open(os.path.join(os.environ["DYING_FOLDER"], f"rank{trainer.global_rank}"), "w") as file:
            file.write(str(os.getpid()))
        if trainer.global_step < 10:
            return
        if trainer.global_rank == self.rank:
            if self.how == "raise":
                raise ValueError("the error of this rank")
            if self.how == "mistake":
                raise UserError("the error of this rank")
            os.kill(os.getpid(), signal.SIGKILL)
        if self.busy:
            time.sleep(300)
'''
LIGHTNING = [sys.executable, "-m", "dawm"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dawm"]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("launcher", "rank", "how", "busy"),
    [
        (LIGHTNING, 0, "kill", True),
        (TORCHRUN, 1, "raise", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (LIGHTNING, 0, "mistake", True),
                (LIGHTNING, 0, "raise", False),
                (LIGHTNING, 1, "mistake", True),
                (LIGHTNING, 1, "raise", False),
                (LIGHTNING, 1, "kill", True),
                (TORCHRUN, 0, "kill", True),
                (TORCHRUN, 0, "mistake", False),
                (TORCHRUN, 1, "kill", False),
            ]
        ),
    ],
)
def test_the_others_end_within_a_minute(smoke, tmp_path, launcher, rank, how, busy):
    (tmp_path / "dying.py").write_text(DYING)
    config = yaml.safe_load(smoke.read_text())
    die = {"class_path": "dying.Die", "init_args": {"rank": rank, "how": how, "busy": busy}}
    config["stages"]["world_model"] |= {"max_steps": 10**6, "callbacks": [die]}
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    smoke.write_text(yaml.safe_dump(config))
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        "DYING_FOLDER": str(tmp_path),
    }
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            [*launcher, "fit", "--config", str(smoke)], env=environment, stdout=output, stderr=output
        )
    try:
        assert process.wait(timeout=100) != 0
        pids = [int((tmp_path / f"rank{number}").read_text()) for number in (0, 1)]
        left = time.monotonic() + 60
        while any(map(lives, pids)) and time.monotonic() < left:
            time.sleep(0.2)
        assert not any(map(lives, pids)), "a rank was left behind"
    finally:
        for path in (tmp_path / "rank0", tmp_path / "rank1"):
            if path.exists() and lives(int(path.read_text())):
                os.kill(int(path.read_text()), signal.SIGKILL)
        process.kill()
    text = (tmp_path / "output").read_text()
    if how != "kill":
        assert "the error of this rank" in text
    assert "gloo" not in text, "one line about a lost connection is enough"
