"""Building the three LightningModules from class paths, for a new run and from a checkpoint alone.

A module is described by plain values, ``{"class_path": ..., "init_args": {...}}``. The description travels in the
checkpoint, so that `load_module` needs nothing else; it is also what Lightning keeps as the module's hyper-parameters,
so that ``SomeModule.load_from_checkpoint(path, weights_only=True)`` works.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import instantiate_module
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context

from dawm.errors import UserError
from dawm.training.checkpoints import ORIGIN, read_checkpoint

__all__ = ["SIZES", "build_module", "load_module"]

SIZES = ("observation_size", "action_size")
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


def build_module(description: Mapping[str, Any]) -> Callable[[int, int], L.LightningModule]:
    """A function that builds the module once the sizes are known.

    Args:
        description: ``class_path`` and ``init_args``.
    """

    def build(observation_size: int, action_size: int) -> L.LightningModule:
        class_path: str = description["class_path"]
        init_args = {**(description.get("init_args") or {})}
        arguments = {**init_args, "observation_size": observation_size, "action_size": action_size}
        hyperparameters = {**arguments, "_class_path": class_path}
        with _given_hyperparameters_context(hyperparameters, INSTANTIATOR):
            return instantiate_module(import_class(class_path), arguments)

    return build


def load_module(path: Path) -> L.LightningModule:
    """A trained module from its checkpoint alone.

    Args:
        path: A stage's checkpoint, written by `fit`.
    """
    checkpoint = read_checkpoint(path)
    origin = checkpoint.get(ORIGIN)
    if origin is None:
        raise UserError(f"{path} does not say which class it holds; name a checkpoint that `fit` wrote")
    module = build_module(origin["module"])(origin["observation_size"], origin["action_size"])
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()


def import_class(class_path: str) -> type[L.LightningModule]:
    """The LightningModule behind a class path.

    Args:
        class_path: Module and class name, joined with a dot.
    """
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"class path {class_path!r} does not import ({error})") from None
    if not (isinstance(found, type) and issubclass(found, L.LightningModule)):
        raise UserError(f"class path {class_path!r} is not a LightningModule")
    return found
