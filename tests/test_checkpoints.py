"""What is saved can be loaded again without unpickling anything but tensors, or is refused by name."""

import enum
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from dawm.errors import UserError
from dawm.training.checkpoints import AtomicCheckpointIO, plain, read_checkpoint


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


@dataclass
class Sizes:
    hidden: int
    where: Path


STATE = {
    "best": np.float64(1.5),
    "count": np.int32(3),
    "flag": np.bool_(True),
    "name": np.str_("run"),
    "curve": np.arange(3, dtype=np.float32),
    "words": np.array(["a", "b"]),
    "where": Path("x/y"),
    "colour": Colour.RED,
    "level": Level.LOW,
    "sizes": Sizes(2, Path("z")),
    "queue": deque([np.float32(1), 2]),
    "groups": defaultdict(list, a=[Path("q")]),
    "seen": {np.int64(1)},
}


def test_states_of_every_usual_kind_load_again(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"callbacks": {"Mine": STATE}}, tmp_path / "last.ckpt")
    state = read_checkpoint(tmp_path / "last.ckpt")["callbacks"]["Mine"]
    assert (state["best"], state["count"], state["flag"], state["name"]) == (1.5, 3, True, "run")
    assert torch.equal(state["curve"], torch.arange(3.0))
    assert (state["words"], state["where"], state["colour"], state["level"]) == (["a", "b"], "x/y", "red", 1)
    assert state["sizes"] == {"hidden": 2, "where": "z"}
    assert (state["queue"], state["groups"], state["seen"]) == ([1.0, 2], {"a": ["q"]}, {1})


def test_what_is_plain_stays_the_same_object():
    state = OrderedDict(weight=torch.ones(2), nested={"a": [1, (2.0, None)], "b": Counter(x=1)})
    assert plain(state) is state


def test_what_has_no_plain_form_is_refused_by_class_and_attribute():
    with pytest.raises(UserError, match=r"got Mine\.models\.0 of type Linear"):
        plain({"callbacks": {"Mine": {"models": [torch.nn.Linear(1, 1)]}}})


def test_a_first_checkpoint_that_cannot_be_read_back_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("dawm.training.checkpoints.plain", lambda checkpoint: checkpoint)
    with pytest.raises(UserError, match="not a safe checkpoint"):
        AtomicCheckpointIO().save_checkpoint({"where": Path("x")}, tmp_path / "last.ckpt")


def test_keys_of_numpy_become_plain_ones():
    found = plain({np.int64(1): "one", np.str_("two"): 2})
    assert found == {1: "one", "two": 2}
    assert [type(key) for key in found] == [int, str]
