"""The programs in examples/ run, shortened, and the README quotes them word for word."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from dawm.cli.main import main
from dawm.training.build import load_module

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")}
QUOTES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def run(name: str, folder: Path, **replacements: str) -> dict:
    """Runs an example in a folder with smaller numbers, and returns its variables.

    Args:
        name: The example.
        folder: Where it runs.
        replacements: Patterns by a name for them, as ``pattern -> text``; each must occur.
    """
    source = EXAMPLES[name]
    for replacement in replacements.values():
        pattern, _, text = replacement.partition(" -> ")
        source, count = re.subn(pattern, text, source)
        assert count, f"{name} has no {pattern}"
    path = folder / f"{name}.py"
    path.write_text(source)
    return runpy.run_path(str(path))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_each_example_has_a_test():
    assert EXAMPLES.keys() == {"three_stages", "own_agent", "augment_my_data"}


def test_the_readme_quotes_them():
    three_stages, own_agent, own_data = QUOTES
    assert EXAMPLES["three_stages"].endswith(three_stages)
    assert own_agent in EXAMPLES["own_agent"]
    imports, _, code = own_data.partition("\n\n")
    assert code in EXAMPLES["augment_my_data"]
    assert set(imports.splitlines()) <= set(EXAMPLES["augment_my_data"].splitlines())


def test_three_stages(hopper, tmp_path):
    made = run(
        "three_stages",
        tmp_path,
        steps=r"max_steps=\d+ -> max_steps=20",
        data=f"embedded/hopper/medium-replay -> {hopper}",
        every=r"every_n_steps=\d+ -> every_n_steps=20",
        episodes="episodes=10 -> episodes=1",
    )
    assert [made[name].trainer.global_step for name in ("world_model", "inverse_dynamics", "agent")] == [20, 20, 20]
    assert made["agent"].observation_normalizer.mean.abs().max() > 0, "trained on raw numbers"
    assert len(made["data"].synthetic) > 0
    assert [entry["step"] for entry in made["scores"].history] == [20]


def test_own_agent(smoke, tmp_path, monkeypatch):
    (tmp_path / "own_agent.py").write_text(EXAMPLES["own_agent"])
    monkeypatch.syspath_prepend(str(tmp_path))
    own = "class_path: own_agent.FilteredCloning\n"
    config = re.sub(r"class_path: TD3BC\n +init_args:\n( +hidden:\n)( +- 16\n)+", own, smoke.read_text())
    assert "FilteredCloning" in config
    (tmp_path / "own.yaml").write_text(config)
    try:
        assert main(["fit", "--config", str(tmp_path / "own.yaml"), "--discount", "0.9"]) == 0
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert results["agent"]["class"] == "own_agent.FilteredCloning"
        assert results["stages"]["agent"]["steps"] == 40
        assert load_module(Path(results["stages"]["agent"]["checkpoint"])).discount == 0.9
    finally:
        sys.modules.pop("own_agent", None)


def test_augment_my_data(tmp_path):
    made = run(
        "augment_my_data",
        tmp_path,
        steps=r"max_steps=\d+ -> max_steps=20",
        episodes=r"range\(200\) -> range(10)",
        rollouts="10_000 -> 100",
        margin=r"margin=0\.1 -> margin=10.0",  # such a world model imagines nonsense
    )
    columns = np.load(tmp_path / "augmented.npz")
    assert len(made["synthetic"]) > 0
    assert len(columns["rewards"]) == len(made["data"].episodes.transitions) + len(made["synthetic"])
    assert columns["observations"].shape[1] == 11
    assert all(np.isfinite(columns[name]).all() for name in columns)
