"""Users' mistakes on the command line, told in one line.

jsonargparse explains a bad value by every type it tried, over many lines. What helps is the setting and the reason.
"""

import errno
import inspect
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_origin

from dawm.errors import UserError

__all__ = ["check_groups", "check_no_gaps", "explain", "one_line", "told_of_disk", "told_of_settings"]

LONGEST = 300
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}

KEY = re.compile(r'Parser key "([^"]+)"|Problem with given class_path \'[^\']*\'|key="([^"]+)"')
REASONS = (
    # pattern in jsonargparse's text, and what to say instead
    (r"Problem with given class_path '([^']+)': No module named '([^']+)'",
     r"class path '\1' does not import (no module named '\2'); check its spelling, or run from the folder it lies in"),
    (r"Expected a dot import path string: (\S+)",
     r"class '\1' is not known; give a class of dawm by its name, and any other as module.Class"),
    (r"Problem with given class_path '([^']+)': .*?(?:not accepted|Key '([^']+)' is not expected|does not exist)",
     r"class '\1' takes no argument '\2'; see --help"),
    (r"Problem with given class_path '([^']+)': ([^-]+)", r"class path '\1': \2"),
    (r"File does not exist: '?([^']+)'?", r"the file \1 does not exist; check the path"),
    (r"Expected a <class '(\w+)'>\. Got value: (\S+)", r"expected \1, got \2"),
    (r"Does not validate against any .*Given value: (.+)", r"\1 is not among the values it takes; see --help"),
)  # fmt: skip


def one_line(text: str) -> str:
    """A text with its line breaks taken out, and its end if it is long.

    Args:
        text: Any text.
    """
    flat = " ".join(text.split())
    return flat if len(flat) <= LONGEST else flat[: LONGEST - 3] + "..."


def explain(message: str) -> str:
    """A parser's message as one line: setting and reason.

    Args:
        message: What jsonargparse says, over any number of lines.
    """
    flat = " ".join(message.split())
    keys: list[str] = []
    for match in KEY.finditer(flat):
        key = match.group(1)
        if key and key not in keys:
            keys.append(key)
    nested = re.search(r"- --(\S+): (.*?)(?: - Expected a <class 'NoneType'>| Given value type:|$)", flat)
    if nested:  # a part of the value was explained already, by the parser of that part
        return one_line(f"--{'.'.join([*keys, nested.group(1)])}: {nested.group(2)}")
    setting = ".".join(keys)
    for pattern, replacement in REASONS:
        found = re.search(pattern, flat)
        if found:
            reason = found.expand(replacement)
            return one_line(f"--{setting}: {reason}" if setting else reason)
    return one_line(flat)


def check_groups(settings: Mapping[str, Any], groups: tuple[str, ...]) -> None:
    """Raises a UserError where a single value stands in the place of a group of settings.

    Args:
        settings: Plain settings.
        groups: Keys of groups, such as ``stages.agent``; a group before those inside it.
    """
    for group in groups:
        value: Any = settings
        for key in group.split("."):
            value = value.get(key)
        if not isinstance(value, Mapping):
            raise UserError(f"--{group}: expected settings of its own ({group}.NAME), got {value!r}")


def check_no_gaps(settings: Any, function: Callable[..., Any] | None = None, setting: str = "") -> None:
    """Raises a UserError where a setting is empty (``key:`` in YAML) that must have a value.

    Args:
        settings: Plain settings; those of a class, ``{"class_path": ..., "init_args": {...}}``, at any depth.
        function: What takes them as its arguments, where that is known.
        setting: Where they stand, such as ``model.init_args``.
    """
    if isinstance(settings, list):
        for index, value in enumerate(settings):
            check_no_gaps(value, None, f"{setting}[{index}]")
    if not isinstance(settings, Mapping):
        return
    types = {} if function is None else {k: p.annotation for k, p in inspect.signature(function).parameters.items()}
    for key, value in settings.items():
        inside, name = None, f"{setting}.{key}" if setting else str(key)
        kind = get_origin(types.get(key)) or types.get(key)  # of list[int]: list
        if value is None and kind in (int, float, bool, str, list, tuple):
            raise UserError(f"--{name}: is empty, expected {kind.__name__}; give a value or leave the line out")
        if key == "init_args" and isinstance(settings.get("class_path"), str):
            module, _, class_name = settings["class_path"].rpartition(".")
            inside = getattr(sys.modules.get(module), class_name, None)
        elif isinstance(value, Mapping) and is_dataclass(types.get(key)):
            inside = types[key]
        check_no_gaps(value, inside, name)


@contextmanager
def told_of_settings(setting: str) -> Iterator[None]:
    """Tells in one line that something cannot be made of its settings, for reasons that no check foresaw.

    Args:
        setting: The settings' group, such as ``world_model``.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = one_line(str(error).partition("\nException raised from")[0])[:150]
        raise UserError(
            f"--{setting}: these settings do not work ({type(error).__name__} in {Path(frame.filename).name}, "
            f"line {frame.lineno}: {reason}); see --help for what they take"
        ) from error


@contextmanager
def told_of_disk(output_dir: str) -> Iterator[None]:
    """Tells in one line of a disk that is full or may not be written; whatever wrote to it: loggers, plots, results.

    Args:
        output_dir: Folder of the run.
    """
    original = threading.excepthook

    def quiet(failed: threading.ExceptHookArgs) -> None:  # TensorBoard's thread keeps the error for the next write
        if not (isinstance(failed.exc_value, OSError) and failed.exc_value.errno in DISK):
            original(failed)

    threading.excepthook = quiet
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise UserError(
            f"output_dir: cannot write {error.filename or f'in {output_dir}'} ({error.strerror}); free the disk or set "
            "--output_dir, then give the same command again to go on"
        ) from None
    finally:
        threading.excepthook = original
