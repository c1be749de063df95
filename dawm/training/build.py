"""Building the three LightningModules from plain values, ``{"class_path": ..., "init_args": {...}}``.

This description travels in the checkpoint, so that `load_module` needs nothing else; Lightning keeps it as the module's
hyper-parameters too, so that ``SomeModule.load_from_checkpoint(path, weights_only=True)`` works.
"""

import contextlib
import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import instantiate_module
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context
from lightning.pytorch.loggers import Logger

from dawm.errors import UserError
from dawm.files import hash_of
from dawm.training.checkpoints import ORIGIN, read_checkpoint

__all__ = [
    "SIZES", "build_logger", "build_module", "import_class", "load_module", "parameters_of", "restore_module",
    "sources_of",
]  # fmt: skip

SIZES = ("observation_size", "action_size")
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


def build_module(description: Mapping[str, Any], observation_size: int, action_size: int) -> L.LightningModule:
    """Builds a module; the sizes are handed to it if its constructor has parameters of that name."""
    module_class = import_class(description["class_path"])
    taken, sizes = parameters_of(module_class), zip(SIZES, (observation_size, action_size))
    arguments = (description.get("init_args") or {}) | {name: size for name, size in sizes if name in taken}
    with _given_hyperparameters_context({**arguments, "_class_path": description["class_path"]}, INSTANTIATOR):
        return instantiate_module(module_class, arguments)


def build_logger(description: Mapping[str, Any]) -> Logger:
    """Builds a Lightning logger."""
    return instantiate_module(import_class(description["class_path"], Logger), description.get("init_args") or {})


def load_module(path: Path) -> L.LightningModule:
    """A trained module from its checkpoint alone."""
    return restore_module(path, read_checkpoint(path))


def restore_module(path: Path, checkpoint: Mapping[str, Any]) -> L.LightningModule:
    """A trained module from the content of its checkpoint (``path`` names it in a message)."""
    origin = checkpoint.get(ORIGIN)
    if origin is None:
        raise UserError(f"--checkpoint: got {path}, which names no class, expected one that `fit` wrote; name it")
    module = build_module(origin["module"], origin["observation_size"], origin["action_size"])
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()


def import_class(class_path: str, kind: type = L.LightningModule) -> type[Any]:
    """The class behind a class path."""
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        found = f"class path {class_path!r}"
        raise UserError(f"--agent: got {found}, expected one that imports ({error}); correct it") from None
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise UserError(f"--agent: got class path {class_path!r}, expected a {kind.__name__}; name another class")
    return found


def sources_of(settings: Any) -> dict[str, str]:
    """Hashes of the files that hold the classes in some settings, by class path; of a user's own classes alone."""
    found: dict[str, str] = {}
    for part in settings.values() if isinstance(settings, Mapping) else settings if isinstance(settings, list) else ():
        found |= sources_of(part)
    path = settings.get("class_path") if isinstance(settings, Mapping) else None
    if path is not None and path.partition(".")[0] not in ("dawm", "lightning", "torch"):
        with contextlib.suppress(TypeError):  # of a built-in one there is no file
            if (file := inspect.getsourcefile(import_class(path, object))) and Path(file).exists():
                found[path] = hash_of(Path(file))
    return found


def parameters_of(function: type[Any]) -> set[str]:
    """Names of a constructor's parameters; where it hands ``**kwargs`` on, those of the base class too."""
    names: set[str] = set()
    for base in function.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return names - {"self"}
