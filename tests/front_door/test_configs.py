"""Every shipped config parses, and its data, modules and callbacks instantiate."""

from pathlib import Path

import pytest

from dawm.cli import main as cli
from dawm.cli.fit import MODULES
from dawm.training.build import build_module

CONFIGS = sorted((Path(__file__).parents[2] / "lightning_configs").glob("*.yaml"))
TASKS = {f"{env}-{kind}" for env in ("hopper", "halfcheetah", "walker2d")
         for kind in ("medium", "medium-replay", "medium-expert")}  # fmt: skip


def test_the_nine_locomotion_tasks_and_the_paper_are_there():
    assert {path.stem for path in CONFIGS} >= TASKS | {"quickstart", "dwm-paper"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_instantiates(path, monkeypatch):
    config = cli.make_parser().parse_args(["fit", "--config", str(path), "--horizon", "5"]).fit
    modules = {key: config.pop(key) for key in MODULES}
    config.pop("config")
    parts = cli.make_fit_parser().instantiate(config)
    assert parts.data.horizon == 5
    assert modules["world_model"].init_args.horizon == 5, "the shared number must reach the world model"
    assert {type(callback).__name__ for callback in parts.stages.agent.callbacks} == {
        "RegenerateRollouts",
        "EvaluateInEnvironment",
    }
    for callback in parts.stages.agent.callbacks:
        assert callback.every_n_steps % parts.data.updates_per_step == 0
    for key, description in modules.items():
        module = build_module(description.as_dict())(11, 3)
        assert module.configure_optimizers(), key


def test_quickstart_runs_with_fewer_updates(hopper, tmp_path):
    path = next(path for path in CONFIGS if path.stem == "quickstart")
    few = [f"--stages.{stage}.max_steps=20" for stage in ("world_model", "inverse_dynamics", "agent")]
    options = ["--output_dir", str(tmp_path), "--data.dataset", hopper, "--final_episodes", "2", *few]
    assert cli.main(["fit", "--config", str(path), *options]) == 0
    assert (tmp_path / "results.json").exists()
