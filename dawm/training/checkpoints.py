"""Checkpoint files: written whole or not at all, of plain values, and read without unpickling anything but tensors."""

import enum
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from os import PathLike
from pathlib import Path, PurePath
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from dawm.errors import UserError, first_line
from dawm.files import whole

__all__ = ["LAYOUT", "ORIGIN", "AtomicCheckpointIO", "plain", "previous_of", "read_checkpoint"]

ORIGIN = "dawm_origin"  # key of a checkpoint under which the data set it was trained on is named
LAYOUT = 3  # of the parameters' names and order; a checkpoint of another one would not load, or mean nothing
AS_THEY_ARE = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype, torch.device, torch.Size)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes plain values to a file that takes its place at once; the checkpoint before is kept beside it.

    The first checkpoint of a run is read back, so that a run whose checkpoints cannot be loaded ends there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._read_back = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | PathLike, storage_options: Any = None) -> None:
        """Saves a checkpoint; a kill at any moment leaves the old file or the new one, never half a file."""
        path = Path(path)
        checkpoint = plain(checkpoint)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path, previous_of(path) if path.stem == "last" else None) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk in its own words
            place = f"a place to write ({getattr(error, 'strerror', None) or error})"
            raise UserError(f"--output_dir: got {path}, expected {place}; free the disk or set --output_dir") from None
        if not self._read_back:
            read_checkpoint(path)
            self._read_back = True

    def load_checkpoint(self, path: str | PathLike, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a checkpoint for Lightning, as `read_checkpoint` does."""
        return read_checkpoint(path)


def plain(value: Any, where: tuple[str, ...] = ()) -> Any:
    """The same value in forms that ``torch.load(..., weights_only=True)`` reads.

    NumPy's scalars become numbers and its arrays tensors, paths become text, enumerations their values, dataclasses
    dicts. What is plain already is returned as it is; what has no plain form is a UserError that says where it is.
    """
    if type(value) in AS_THEY_ARE or isinstance(value, Tensor):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy()) if value.dtype.kind in "biufc" else plain(value.tolist(), where)
    if isinstance(value, enum.Enum):
        return plain(value.value, where)
    if isinstance(value, PurePath):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), (*where, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        keys = [plain(key, where) for key in value]
        parts = [plain(part, (*where, str(key))) for key, part in value.items()]
        same = all(a is b for a, b in zip([*keys, *parts], [*value, *value.values()]))
        return value if same and type(value) in (dict, OrderedDict, Counter) else dict(zip(keys, parts))
    if isinstance(value, (set, frozenset)):
        return {plain(part, where) for part in value}
    if isinstance(value, (Sequence, deque)) and not isinstance(value, (str, bytes)):
        items = [plain(part, (*where, str(index))) for index, part in enumerate(value)]
        same = type(value) in (list, tuple) and all(a is b for a, b in zip(items, value))
        return value if same else tuple(items) if isinstance(value, tuple) else items
    for kind in (bool, int, float, str):
        if isinstance(value, kind):  # a class of its own that derives from a plain one
            return kind(value)
    place = ".".join(where[1:] if where[:1] == ("callbacks",) else where)
    raise UserError(
        f"--stages: got {place} of type {type(value).__name__}, expected what a checkpoint can hold (numbers, text, "
        "tensors, arrays, lists, dicts); convert it where the class saves its state"
    )


def previous_of(path: Path) -> Path:
    """Where the checkpoint before the last one is kept."""
    return path.with_name(f"previous{path.suffix}")


def read_checkpoint(path: str | PathLike) -> dict[str, Any]:
    """A checkpoint's content, on the CPU; a UserError for one missing, damaged, of another layout, or not plain."""
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict):
        raise _refused(path, f"a {type(checkpoint).__name__}", "name one that `fit` wrote")
    layout = checkpoint[ORIGIN].get("layout", 1) if ORIGIN in checkpoint else LAYOUT
    if layout != LAYOUT:
        raise _refused(path, f"parameter layout {layout}, not {LAYOUT}", "train it again with this version of dawm")
    return checkpoint


def _read(path: str | PathLike) -> Any:
    try:
        with ZipFile(path) as archive:  # torch reads the parts without comparing them with their checksums
            if archive.testzip() is not None:
                raise BadZipFile("a checksum does not fit")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        found, remedy = "no file", "check the path, or train that stage first"
    except UnpicklingError as error:
        found, remedy = f"damaged or not a safe checkpoint: {first_line(error)}", "name one that `fit` wrote"
    except (BadZipFile, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        found, remedy = f"damaged: {first_line(error)}", "delete it to train from the start"
    raise _refused(path, found, remedy)


def _refused(path: str | PathLike, found: str, remedy: str) -> UserError:
    return UserError(f"--checkpoint: got {path} ({found}), expected a checkpoint; {remedy}")
