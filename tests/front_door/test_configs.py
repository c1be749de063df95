"""Every shipped config, alone or with each overlay, parses, and trains for a few updates."""

from pathlib import Path

import pytest
import yaml

from dawm.cli.main import main, make_parser

FOLDER = Path(__file__).parents[2] / "lightning_configs"
EVIDENCE = FOLDER.parent / "benchmarks" / "evidence"
EXPERIMENTS = sorted(FOLDER.glob("*.yaml"))
OVERLAYS = sorted(FOLDER.glob("methods/*.yaml"))
COMBINATIONS = [(path, overlay) for path in EXPERIMENTS for overlay in (None, *OVERLAYS)]
MODULES = ("world_model", "inverse_dynamics", "agent")


def named(combination: tuple[Path, Path | None]) -> str:
    path, overlay = combination
    return path.stem if overlay is None else f"{path.stem}+{overlay.stem}"


def options(path: Path, overlay: Path | None) -> list[str]:
    return ["--config", str(path)] + ([] if overlay is None else ["--config", str(overlay)])


def test_the_experiments_and_overlays_are_there():
    assert [path.stem for path in EXPERIMENTS] == ["d4rl-locomotion", "quickstart"]
    names = [
        "aw",
        "dawm-plus",
        "dawm",
        "dwm-paper",
        "dwm",
        "ensemble",
        "gta",
        "iql",
        "joint",
        "penalty",
        "real",
        "synther",
    ]
    assert [path.stem for path in OVERLAYS] == names
    assert set(FOLDER.rglob("*.yaml")) == {*EXPERIMENTS, *OVERLAYS}


@pytest.mark.parametrize("combination", COMBINATIONS, ids=named)
def test_it_parses(combination):
    config = make_parser().parse_args(["fit", *options(*combination), "--horizon", "5"]).fit
    assert config.horizon == 5
    for callback in config.stages.agent.callbacks:
        assert callback.init_args.every_n_steps % config.data.updates_per_step == 0
    overlay = combination[1]
    if overlay is not None:  # what the overlay says holds
        for key, value in yaml.safe_load(overlay.read_text()).items():
            if key in MODULES:
                assert config[key].class_path.split(".")[-1] == value["class_path"]
                for name in ("alpha", "expectile", "learning_rate"):
                    if name in value.get("init_args", {}):
                        assert config[key].init_args[name] == value["init_args"][name]
            elif key == "data":
                own = yaml.safe_load(combination[0].read_text())["data"].get("real_weights")  # the experiment's
                weights, chosen = value.pop("real_weights", own), config.data.real_weights
                assert (chosen and chosen.class_path.split(".")[-1]) == (weights and weights["class_path"])
                assert {name: config.data[name] for name in value} == value


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("*.yaml")), ids=lambda path: path.stem)
def test_settings_of_the_evidence_parse(path):
    make_parser().parse_args(["fit", *options(FOLDER / "d4rl-locomotion.yaml", path)])


def test_the_quickstart_mixes():
    data = yaml.safe_load((FOLDER / "quickstart.yaml").read_text())["data"]
    assert 0 < data["synthetic_fraction"] < 1


@pytest.mark.parametrize(
    "combination", [c for c in COMBINATIONS if c[1] is None or c[0].stem == "d4rl-locomotion"], ids=named
)
def test_it_trains(combination, hopper, tmp_path, monkeypatch):
    """Few updates of small networks; all else is the config's own."""
    monkeypatch.setattr("dawm.synthesis.targets.FeasibleReturn.updates", 20)
    callbacks = []
    for path in filter(None, combination):
        stages = yaml.safe_load(path.read_text()).get("stages", {})
        callbacks = stages.get("agent", {}).get("callbacks", callbacks)
    callbacks[0]["init_args"] |= {"rollouts": 100, "margin": 10.0}  # such a world model imagines nonsense
    small = {
        "output_dir": str(tmp_path / "run"),
        "final_episodes": 1,
        "data": {"dataset": hopper, "batch_size": 16, "segment_batch_size": 16},
        "inverse_dynamics": {"init_args": {"hidden": [16]}},
        "world_model": {"init_args": {"network": {"init_args": {"width": 16}}}},
        "stages": {name: {"max_steps": 20} for name in MODULES},
    }
    small["stages"]["agent"]["callbacks"] = callbacks
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    assert main(["fit", *options(*combination), "--config", str(tmp_path / "small.yaml")]) == 0
    assert (tmp_path / "run" / "results.json").exists()
