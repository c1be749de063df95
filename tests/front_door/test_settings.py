"""Settings reach whoever takes them, none is inherited by accident, and each that matters is part of a stage's key."""

from copy import deepcopy

import pytest
import yaml

from dawm.cli.settings import parse_fit
from dawm.errors import UserError
from dawm.training.stage import AgentStage, InverseDynamicsStage, WorldModelStage


def write(path, **content) -> str:
    path.write_text(yaml.safe_dump(content))
    return f"--config={path}"


def test_shared_numbers_reach_every_constructor_that_has_them():
    settings = parse_fit(["--horizon=3", "--discount=0.9", "--seeds=2"])
    plain = settings.plain
    assert (plain["data"]["horizon"], plain["world_model"]["init_args"]["horizon"]) == (3, 3)
    assert (plain["data"]["discount"], plain["agent"]["init_args"]["discount"]) == (0.9, 0.9)
    assert plain["agent"]["init_args"]["seeds"] == 2
    assert (settings.parts.data.horizon, settings.parts.data.discount) == (3, 0.9)


def test_shared_numbers_reach_what_data_and_callbacks_hold(tmp_path, monkeypatch):
    own = "import dawm.data.weights as w\n\nclass Own(w.AdvantageWeights):\n"
    (tmp_path / "own_weights.py").write_text(
        f"{own}    def __init__(self, discount: float = 0.5): super().__init__()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine, explicit = ({"class_path": "own_weights.Own"} | extra for extra in ({}, {"init_args": {"discount": 0.7}}))
    callbacks = [{"class_path": "RegenerateRollouts", "init_args": {"starts": part}} for part in (mine, explicit)]
    config = write(tmp_path / "a.yaml", data={"real_weights": mine}, stages={"agent": {"callbacks": callbacks}})
    plain = parse_fit([config, "--discount=0.9"]).plain
    first, second = (callback["init_args"]["starts"] for callback in plain["stages"]["agent"]["callbacks"])
    reached = [part["init_args"]["discount"] for part in (plain["data"]["real_weights"], first, second)]
    assert reached == [0.9, 0.9, 0.7]


def test_an_explicit_argument_wins_even_if_it_equals_the_default(tmp_path):
    config = write(tmp_path / "a.yaml", agent={"class_path": "TD3BC", "init_args": {"discount": 0.99}})
    assert parse_fit([config, "--discount=0.9"]).plain["agent"]["init_args"]["discount"] == 0.99
    plain = parse_fit(["--discount=0.9", "--data.discount=0.5"]).plain
    assert (plain["data"]["discount"], plain["agent"]["init_args"]["discount"]) == (0.5, 0.9)


def test_two_horizons_are_refused():
    with pytest.raises(UserError, match=r"--world_model.horizon: got 7, expected 3, the data's"):
        parse_fit(["--horizon=3", "--world_model.horizon=7"])


def test_interpolation_sees_the_command_line(tmp_path):
    config = write(tmp_path / "a.yaml", horizon=5, data={"batch_size": "${horizon}"})
    assert parse_fit([config, "--horizon=4"]).plain["data"]["batch_size"] == 4


def test_an_agent_named_later_has_its_own_defaults(tmp_path):
    config = write(tmp_path / "a.yaml", agent={"class_path": "TD3BC", "init_args": {"alpha": 1.0}})
    for arguments in (["--agent=IQL"], [config, "--agent=IQL"]):
        arguments_of_iql = parse_fit(arguments).plain["agent"]["init_args"]
        assert arguments_of_iql["decay_actor_learning_rate"] is True, "IQL's default, not TD3BC's"
        assert "alpha" not in arguments_of_iql


@pytest.mark.parametrize("given", ["config", "option"])
def test_a_list_of_callbacks_given_again_forgets_the_old_ones_arguments(tmp_path, given):
    old = {"class_path": "RegenerateRollouts", "init_args": {"every_n_steps": 7, "rollouts": 10}}
    new = {"class_path": "EvaluateInEnvironment", "init_args": {"episodes": 3}}
    first = write(tmp_path / "a.yaml", stages={"agent": {"callbacks": [old]}})
    second = write(tmp_path / "b.yaml", stages={"agent": {"callbacks": [new]}})
    second = second if given == "config" else f"--stages.agent.callbacks={[new]}"
    (callback,) = parse_fit([first, second]).plain["stages"]["agent"]["callbacks"]
    assert callback["init_args"]["episodes"] == 3
    assert callback["init_args"]["every_n_steps"] == 5000, "the default"
    kept = parse_fit([first, "--stages.agent.callbacks+=EvaluateInEnvironment"]).plain["stages"]["agent"]["callbacks"]
    assert [callback["init_args"]["every_n_steps"] for callback in kept] == [7, 5000]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--agent.foo=1"], r"--agent.foo: got foo, expected an argument of TD3BC"),
        (["--agent=IQL", "--agent.alpha=1"], r"of IQL \(alpha belongs to TD3BC\)"),
        (["--model=IQL"], r"got --model, expected --agent"),
        (["--world_model=TD3BC"], r"--world_model: got TD3BC, expected a DiffusionWorldModel"),
        (["--trainer.max_time=00:01:00:00"], r"--trainer.max_time: .* set it by --stages.<stage>.max_steps"),
        (["--trainer.callbacks=[]"], r"--trainer.callbacks: .* set it by --stages.<stage>.callbacks"),
        (["--trainer.gradient_clip_val=1"], r"set it by the module, such as --world_model.max_gradient_norm"),
        (["--trainer.enable_progress_bar=false"], r"set it by --quiet"),
        (["--trainer.logger=true"], r"set it by --logger"),
        (["--stages.agent.callbacks=[lightning.pytorch.callbacks.LearningRateFinder]"], "LearningRateFinder"),
        (["--stages.world_model.max_steps=0"], r"--stages.world_model.max_steps: got 0, expected"),
    ],
)
def test_a_wrong_setting_is_named_with_the_right_place(arguments, line):
    with pytest.raises(UserError, match=line):
        parse_fit(arguments)


def test_settings_of_the_trainer_in_a_config_are_named_with_the_right_place(tmp_path):
    with pytest.raises(UserError, match="set it by --stages.<stage>.max_steps"):
        parse_fit([write(tmp_path / "a.yaml", trainer={"max_time": "00:01:00:00"})])


@pytest.mark.parametrize("stage", [WorldModelStage, InverseDynamicsStage, AgentStage])
def test_a_setting_that_nobody_has_thought_of_is_part_of_the_key(stage):
    settings = parse_fit([]).plain
    before = deepcopy(stage().hashed(settings))
    for group in (
        settings,
        settings["data"],
        settings["trainer"],
        settings["stages"][stage.name],
        settings[stage.name],
    ):
        group["unheard_of"] = 1
        assert stage().hashed(settings) != before
        del group["unheard_of"]
    for key in ("cache_dir", "memory_limit", "updates_per_step"):
        assert key in settings["data"]
        settings["data"][key] = "another"
    settings["stages"][stage.name]["log_every_n_steps"] = 7
    assert stage().hashed(settings) == before
    settings["trainer"]["limit_train_batches"] = 1
    assert stage().hashed(settings) != before


def test_paths_expand_home_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "there")
    plain = parse_fit(["--output_dir=~/$PLACE/run"]).plain
    assert plain["output_dir"] == str(tmp_path / "there" / "run")
