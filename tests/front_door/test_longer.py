"""A stage trains longer, from given weights, and any of its checkpoints is scored."""

import json
import re
from pathlib import Path

import pytest
import torch

from dawm.cli.main import main
from dawm.training.checkpoints import read_checkpoint


def weights(run: Path, stage: str = "agent") -> dict[str, torch.Tensor]:
    checkpoint = json.loads((run / "results.json").read_text())["stages"][stage]["checkpoint"]
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def fit(smoke, tmp_path):
    """Runs `fit` in a folder of a name; the exit code has to be the expected one."""

    def run(name: str, *options: str, code: int = 0) -> Path:
        assert main(["fit", "--config", str(smoke), "--output_dir", str(tmp_path / name), *options]) == code
        return tmp_path / name

    return run


def test_more_updates_follow_a_finished_stage_and_end_where_one_run_would(fit, capsys):
    more = ["--stages.agent.max_steps", "60"]
    short = weights(fit("longer"))
    run = fit("longer", *more)
    assert re.search(r"resuming from \S+, after 40 updates", capsys.readouterr().out)
    assert equal(weights(run), weights(fit("at-once", *more)))
    assert equal(short, weights(fit("longer"))), "the shorter one is still there"
    assert len(list((run / "agent").glob("*/last.ckpt"))) == 2


def test_a_schedule_that_follows_max_steps_starts_again_and_says_so(fit, capsys):
    fit("run")
    fit("run", "--stages.world_model.max_steps", "30")
    assert "learning rate follows max_steps" in " ".join(capsys.readouterr().out.split())
    fit("run", "--agent.decay_actor_learning_rate", "true")
    fit("run", "--agent.decay_actor_learning_rate", "true", "--stages.agent.max_steps", "60")
    assert "agent: training from the start" in " ".join(capsys.readouterr().out.split())


def test_training_starts_from_given_weights(fit, tmp_path):
    first = fit("first")
    checkpoint = json.loads((first / "results.json").read_text())["stages"]["agent"]["checkpoint"]
    start = ["--stages.agent.init_from", checkpoint]
    warm, cold = fit("warm", *start), fit("cold")
    assert not equal(weights(warm), weights(cold))
    assert json.loads((warm / "results.json").read_text())["stages"]["agent"]["steps"] == 40, "trained, not reused"
    assert equal(weights(warm), weights(fit("again", *start)))
    # other widths do not fit
    fit("other", *start, "--agent.hidden", "[8,8]", code=2)


def test_every_checkpoint_of_a_run_is_scored(fit, capsys):
    run = fit("run", "--stages.agent.keep_every_n_steps", "20")
    kept = sorted(path.name for path in (run / "agent").glob("*/*.ckpt"))
    assert kept == ["last.ckpt", "previous.ckpt", "step-20.ckpt", "step-40.ckpt"]
    capsys.readouterr()
    (path,) = (run / "agent").glob("*/step-20.ckpt")
    assert main(["evaluate", "--run", str(run), "--episodes", "2", "--checkpoint", str(path)]) == 0
    alone = float(re.search(r"return (-?[\d.]+)", capsys.readouterr().out).group(1))
    assert main(["evaluate", "--run", str(run), "--episodes", "2", "--every", "true"]) == 0
    curve = json.loads((run / "evaluations.json").read_text())
    assert [entry["step"] for entry in curve] == [20, 20, 40, 40]
    (entry,) = (entry for entry in curve if entry["checkpoint"].endswith("step-20.ckpt"))
    assert round(entry["return"], 1) == alone
    assert (run / "evaluations.png").stat().st_size > 0


def test_a_checkpoint_that_is_kept_does_not_stand_in_for_the_last(fit):
    """The stage ends between two multiples of ``checkpoint_every_n_steps``, at one of ``keep_every_n_steps``."""
    run = fit("run", "--stages.agent.keep_every_n_steps", "20", "--stages.agent.checkpoint_every_n_steps", "30")
    (last,) = (run / "agent").glob("*/last.ckpt")
    assert read_checkpoint(last)["global_step"] == 40
    assert read_checkpoint(last.with_name("step-20.ckpt"))["global_step"] == 20


def test_a_stage_of_a_fast_dev_run_is_not_taken_for_a_whole_one(fit, capsys):
    for option in (["--trainer.fast_dev_run", "true"], ["--trainer.limit_train_batches", "1"]):
        fit("run", *option)
    run = fit("run")
    stages = json.loads((run / "results.json").read_text())["stages"]
    assert [stage["reused"] for stage in stages.values()] == [False, False, False]
    assert [stage["steps"] for stage in stages.values()] == [20, 20, 40]
    fit("no-validation", "--trainer.limit_val_batches", "0")
