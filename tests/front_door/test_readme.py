"""The README's own text: its commands parse, its agent trains."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from dawm.cli import main as cli
from dawm.training.build import load_module

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    part.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    for part in line.split("&&")
    if part.strip().startswith("python -m dawm")
]


@pytest.fixture
def my_agent(tmp_path, monkeypatch):
    """The README's agent, saved where the README says, importable as from the current folder."""
    (source,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "OfflineAgent" in block)
    (tmp_path / "my_agent.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield source
    sys.modules.pop("my_agent", None)


def test_the_two_commands_stand_in_the_readme():
    assert (
        "pip install -c constraints.txt -e . && python -m dawm fit --config lightning_configs/quickstart.yaml" in README
    )
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in README


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command, my_agent, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command)[3:]
    if "--help" in arguments:
        with pytest.raises(SystemExit) as exit_:
            cli.make_parser().parse_args(arguments)
        assert exit_.value.code == 0
    else:
        cli.make_parser().parse_args(arguments)


def test_own_agent_trains_and_acts(my_agent, smoke, tmp_path):
    assert 25 <= len(my_agent.strip().splitlines()) <= 50, "some 30 lines"
    config = smoke.read_text().replace("class_path: TD3BC", "class_path: my_agent.FilteredCloning")
    config = re.sub(r"(FilteredCloning\n +init_args:\n) +hidden:\n +- 16\n +- 16\n", r"\1      discount: 0.9\n", config)
    (tmp_path / "own.yaml").write_text(config)
    assert cli.main(["fit", "--config", str(tmp_path / "own.yaml"), "--seeds", "2"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["agent"]["class"] == "my_agent.FilteredCloning"
    assert results["stages"]["agent"]["steps"] == 40
    agent = load_module(Path(results["stages"]["agent"]["checkpoint"]))
    assert agent.discount == 0.9
    assert agent.seeds == 2
    assert [len(returns) for returns in results["agent"]["returns"]] == [2, 2]


PLAIN = """
import lightning as L, torch

class Plain(L.LightningModule):
    def __init__(self, observation_size: int, action_size: int):
        super().__init__()
        self.net = torch.nn.Linear(observation_size, action_size)

    def training_step(self, batch, batch_idx):
        assert batch.observations.shape == (16, self.net.in_features)
        return (self.net(batch.observations) - batch.actions).square().mean()

    def act(self, observations):
        return self.net(observations).tanh()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())
"""


def test_plain_lightning_module_trains_too(smoke, tmp_path, monkeypatch, capsys):
    (tmp_path / "plain_agent.py").write_text(PLAIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = re.sub(r"class_path: TD3BC\n", "class_path: plain_agent.Plain\n", smoke.read_text())
    config = re.sub(r"(plain_agent.Plain\n) +init_args:\n +hidden:\n +- 16\n +- 16\n", r"\1", config)
    (tmp_path / "own.yaml").write_text(config)
    command = ["fit", "--config", str(tmp_path / "own.yaml")]
    assert cli.main(command) == 2
    assert "--data.updates_per_step 1" in capsys.readouterr().err
    assert cli.main([*command, "--data.updates_per_step", "1"]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["stages"]["agent"]["steps"] == 40
