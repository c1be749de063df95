"""The commands in the README, in docs/ and in CONTRIBUTING parse; links and the promised tests exist."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from dawm.cli.main import main, make_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text() for path in PAGES)
CONFIGS = "\n".join(path.read_text() for path in (ROOT / "lightning_configs").rglob("*.yaml"))
FENCED = [line for block in re.findall(r"^ *```bash\n(.*?)```", TEXT, re.S | re.M) for line in block.splitlines()]
IN_CONFIGS = re.findall(r"^# +(python -m dawm (?:.*\\\n)*.*)", CONFIGS, re.M)
COMMANDS = sorted(
    {
        part.strip()
        for line in [*FENCED, *(command.replace("\\\n#", "") for command in IN_CONFIGS)]
        for part in line.split("&&")
        if part.strip().startswith("python -m dawm")
    }
)


def test_the_two_commands_are_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert (
        "pip install -c constraints.txt -e . && python -m dawm fit --config lightning_configs/quickstart.yaml" in readme
    )
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in readme


def test_no_command_is_overlooked():
    assert len(COMMANDS) >= 15
    assert len(re.findall(r"^ *python -m dawm", TEXT, re.M)) == len(
        [line for line in FENCED if line.strip().startswith("python -m dawm")]
    )


@pytest.fixture
def _own_agent(monkeypatch):
    """The agent of examples/, importable as from the current folder."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield
    sys.modules.pop("own_agent", None)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("_own_agent")
def test_command_parses(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command)[3:]
    if "--help" in arguments:
        with pytest.raises(SystemExit) as exit_:
            make_parser().parse_args(arguments)
        assert exit_.value.code == 0
    elif "--" in arguments:  # behind it are options of `fit`
        at = arguments.index("--")
        make_parser().parse_args(arguments[:at])
        base = arguments[arguments.index("--config") + 1]
        make_parser().parse_args(["fit", "--config", base, *arguments[at + 1 :]])
    else:
        make_parser().parse_args(arguments)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_named_files_exist(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link
    for name in re.findall(r"`((?:tests|benchmarks|dawm|callbacks)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


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
    assert main(command) == 2
    assert "--data.updates_per_step" in capsys.readouterr().err
    assert main([*command, "--data.updates_per_step", "1"]) == 0
    assert '"steps": 40' in (tmp_path / "run" / "results.json").read_text()
