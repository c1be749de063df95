"""Configs with mistakes in random places: each ends in success or in one clear line, never in a traceback.

Everything up to the first update is real: parsing, the data, the modules, the Trainer, the callbacks' checks. Only the
updates themselves and the episodes of the last evaluation are left out.
"""

import copy
import random
from pathlib import Path
from typing import Any

import h5py
import lightning as L
import numpy as np
import pytest
import yaml

import dawm
from dawm.cli import fit as commands
from dawm.cli.main import main
from dawm.data import module
from dawm.data.episodes import load_episodes
from dawm.training.experiment import Experiment, StageResult
from dawm.training.trainer import make_trainer

CONFIGS = sorted((Path(dawm.__file__).parent.parent / "lightning_configs").rglob("*.yaml"))
JUNK: list[Any] = [
    None, True, False, 0, -1, -7.5, 0.5, 10**15, -(10**15), 1e30, float("inf"), float("nan"), "", "junk", "a b: c",
    "${horizon}", "${nothing}", "${", "1,2",
    [], {}, [1], [None], ["x", {}], [[1]], {"a": 1}, {"class_path": "os.path"},
    {"class_path": "Nothing"}, {"class_path": None}, {"class_path": "dawm.nothing.Thing", "init_args": {}},
    {"class_path": "torch.nn.Linear"}, {"init_args": {"a": {"b": [1, {"c": None}]}}},
    "torch.nn.Linear", "dawm.agents.IQL",
    "no.such.Class", "é\u2028", 3.0, "1e-3", "null", "-1", "nan",
]  # fmt: skip
CLASSES = [
    "IQL",
    "Heun",
    "DDIM",
    "TemporalUNet",
    "EDM",
    "LightningModule",
    "..",
    "dawm",
    "dawm.agents",
    "builtins.dict",
]

PIECES = ["{", "]", ": :", "\t", "\n-", '"', "&a", "*b", "!!python/object:os.system ", "%", "\x00", "\n\n  x"]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a nested config."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(value, key), *places(inner)]]


def mutate(config: dict, rng: random.Random) -> None:
    """Makes one mistake, in place."""
    container, key = rng.choice(places(config))
    value = container[key]
    kind = rng.choice(("delete", "rename", "junk", "junk", "junk", "list", "string", "number", "class", "new", "swap"))
    if kind == "delete":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[rng.choice([f"{key}s", str(key)[:-1], str(key).upper(), "", 3, None, "self", "class_path"])] = (
            container.pop(key)
        )
    elif kind == "list":
        container[key] = [value] * rng.randint(1, 3)
    elif kind == "string":
        container[key] = str(value)
    elif kind == "number" and isinstance(value, int | float) and not isinstance(value, bool):
        container[key] = rng.choice([-value, value * 10**13, value + 0.5, value / 3, 0, float(value), 10**400])
    elif kind == "class":
        classes = [place for place in places(config) if place[1] == "class_path"]
        if classes:
            container, key = rng.choice(classes)
            container[key] = rng.choice([*CLASSES, f"{container[key]}x", str(container[key])[::-1]])
    elif kind == "new" and isinstance(value, dict):
        value[rng.choice(["extra", "class_path", "init_args", "help", "config"])] = rng.choice(JUNK)
    elif kind == "swap":
        other, there = rng.choice(places(config))
        container[key] = copy.deepcopy(other[there])
    else:
        container[key] = copy.deepcopy(rng.choice(JUNK))


def broken(text: str, rng: random.Random) -> str:
    """The text with one place that is no YAML any more, mostly."""
    place = rng.randrange(len(text))
    piece = rng.choice(PIECES)
    return rng.choice([text[:place] + piece + text[place:], text[:place], text[:place] + text[place + 5 :]])


def draw(rng: random.Random) -> str:
    """The text of one wrong config."""
    text = rng.choice(CONFIGS).read_text()
    if rng.random() < 0.1:
        return broken(text, rng)
    config = yaml.safe_load(text)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if config:  # of a short overlay nothing may be left
            mutate(config, rng)
    return yaml.safe_dump(config, allow_unicode=True, sort_keys=False)


@pytest.fixture
def no_training(tmp_path, monkeypatch):
    """A small data set in place of any other; no updates and no episodes."""
    path, rng = tmp_path / "small.hdf5", np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        walk = rng.normal(size=(61, 11)).cumsum(axis=0).astype(np.float32)
        file["observations"], file["next_observations"] = walk[:-1], walk[1:]
        file["actions"] = rng.uniform(-1, 1, (60, 3)).astype(np.float32)
        file["rewards"] = rng.normal(size=60).astype(np.float32)
        file["terminals"] = np.zeros(60, bool)
        file["timeouts"] = np.arange(60) % 20 == 19

    def load(dataset: str, env_id: str | None, *rest: Any) -> Any:
        return load_episodes(str(path), "Hopper-v5" if env_id is None else env_id, *rest)

    def train(self: Experiment, stage: Any, built: L.LightningModule, folder: Path) -> StageResult:
        trainer = make_trainer(stage, built, folder, _Nothing(), self.settings, self.loggers, self.console)
        trainer.datamodule = self.data
        for callback in stage.callbacks:
            if type(callback).__name__ == "EvaluateInEnvironment":
                callback.on_train_start(trainer, built)
        return StageResult("", 0, 0.0, False, {})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_episodes", load)
    monkeypatch.setattr(Experiment, "_train", train)
    for name in ("evaluate", "collect_results", "write_files", "log_summary", "show_results"):
        monkeypatch.setattr(commands, name, lambda *args, **options: {})


class _Nothing(L.Callback):
    """Stands for the writing of checkpoints."""


@pytest.mark.parametrize("tries", [60, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.filterwarnings("ignore")
def test_wrong_configs_end_in_one_line(no_training, tmp_path, capsys, tries):
    rng = random.Random(tries)
    path = tmp_path / "config.yaml"
    codes, wrong = [], []
    for number in range(tries):
        path.write_text(draw(rng), encoding="utf-8")
        try:
            code: Any = main(["fit", "--config", str(path)])
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            code = f"{type(error).__name__}: {error}"[:300]
        printed = capsys.readouterr().err
        told = printed.startswith("error: ") and printed.strip().count("\n") == 0
        codes.append(code)
        if code not in (0, 2) or told != (code == 2) or "Traceback" in printed:
            kept = Path(f"{path.parent}-{number}.yaml")
            kept.write_text(path.read_text())
            wrong.append(f"try {number}: {code}, {printed}, config in {kept}")
    assert not wrong, f"{len(wrong)} of {tries}:\n" + "\n".join(wrong)
    assert 0 in codes  # some are harmless, and nothing else is wrong with the rest
    assert codes.count(2) > tries / 2
