"""Users' mistakes on the command line, reported in one line where jsonargparse lists every type that it tried."""

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
from typing import Any, NoReturn, get_origin

from jsonargparse import ArgumentParser

from dawm.errors import UserError
from dawm.training.build import parameters_of

__all__ = ["Parser", "as_user_error", "check_groups", "check_no_gaps", "disk_errors", "one_line"]

LONGEST = 300
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}

KEY = re.compile(r'Parser key "([^"]+)"')
REASONS = (
    # pattern in jsonargparse's text, and what to say instead
    (r"Problem with given class_path '([^']+)': No module named '([^']+)'",
     r"got class path '\1', which does not import (no module named '\2'), expected module.Class; check its spelling"),
    (r"Expected a dot import path string: (\S+)",
     r"got class '\1', expected a class of dawm by its name, and any other as module.Class; check its spelling"),
    (r"Problem with given class_path '([^']+)': ([^-]+)", r"got class path '\1', expected another (\2); correct it"),
    (r"File does not exist: '?([^']+)'?", r"got the file \1, which does not exist, expected a YAML file; check it"),
    (r"Expected a <class '(\w+)'>\. Got value: (\S+)", r"got \2, expected \1; change it"),
    (r"unrecognized arguments: --model\b.*|Option 'model\b.*' is not accepted",
     r"got --model, expected --agent, the agent's key; rename it"),
    (r"unrecognized arguments: (\S+)", r"got \1, expected an option of this command; see --help"),
    (r"Does not validate against any .*Given value: (.+)", r"got \1, expected a value of another kind; see --help"),
)  # fmt: skip


class Parser(ArgumentParser):
    """An argument parser whose errors are a user's mistakes: one line, no usage text.

    ``elsewhere`` names the settings of the Trainer that are set by another key, and that key.
    """

    def __init__(self, *args: Any, elsewhere: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._elsewhere = elsewhere or {}
        self._class: type | None = None  # of the parsers that jsonargparse makes for a class's arguments

    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, *args: Any, **kwargs: Any) -> list[str]:
        """Adds a class's arguments; remembers the class, for messages."""
        self._class = theclass if nested_key is None and isinstance(theclass, type) else self._class
        return super().add_class_arguments(theclass, nested_key, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises instead of printing."""
        found = re.search(r"trainer(?:\.|' does not accept option ')(\w+)", message)
        if found and found[1] in self._elsewhere:
            place = self._elsewhere[found[1]]
            raise UserError(f"--trainer.{found[1]}: got a value, expected none here; set it by {place}")
        raise UserError(explain(message, self._class))


def one_line(text: str) -> str:
    """A text with its line breaks taken out, and its end if it is long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= LONGEST else flat[: LONGEST - 3] + "..."


def explain(message: str, of_class: type | None = None) -> str:
    """A parser's message as one line: setting and reason."""
    flat = " ".join(message.split())
    keys = dict.fromkeys(KEY.findall(flat))
    unknown = re.search(r"Option '([\w.]+)' is not accepted", flat)
    if unknown and not unknown[1].startswith("model"):
        return one_line(_unknown_option(unknown[1], of_class))
    nested = re.search(r"- --(\S+): (.*?)(?: - Expected a <class 'NoneType'>| Given value type:|$)", flat)
    if nested:  # a part of the value was explained already, by the parser of that part
        return one_line(f"--{'.'.join([*keys, nested[1]])}: {nested[2]}")
    for pattern, replacement in REASONS:
        if found := re.search(pattern, flat):
            return one_line((f"--{'.'.join(keys)}: " if keys else "") + found.expand(replacement))
    return one_line(flat)


def _unknown_option(option: str, of_class: type | None) -> str:
    """Names the class that does not take an option, and the classes that do."""
    name = option.split(".")[-1]
    modules = [module for key, module in sys.modules.items() if key.startswith("dawm.")]
    classes = {c for m in modules for c in vars(m).values() if isinstance(c, type) and c.__module__.startswith("dawm.")}
    owners = ", ".join(sorted(c.__name__ for c in classes if name in parameters_of(c)))
    whose = f" ({name} belongs to {owners})" if owners else ""
    taker = of_class.__name__ if of_class else "this command"
    return f"--{option}: got {name}, expected an argument of {taker}{whose}; see --help"


def check_groups(settings: Mapping[str, Any], groups: tuple[str, ...]) -> None:
    """Raises a UserError where one value is given for a group of settings; a group precedes those inside it."""
    for group in groups:
        value: Any = settings
        for key in group.split("."):
            value = value.get(key)
        if not isinstance(value, Mapping):
            raise UserError(f"--{group}: got {value!r}, expected settings of its own; write {group}.NAME")


def check_no_gaps(settings: Any, function: Callable[..., Any] | None = None, setting: str = "") -> None:
    """Raises a UserError where a setting is empty (``key:`` in YAML) that must have a value.

    Those of a class, ``{"class_path": ..., "init_args": {...}}``, are looked at in any depth; ``function`` takes the
    settings as its arguments, where that is known, and ``setting`` is their key.
    """
    for index, value in enumerate(settings if isinstance(settings, list) else ()):
        check_no_gaps(value, None, f"{setting}[{index}]")
    if not isinstance(settings, Mapping):
        return
    types = {} if function is None else {k: p.annotation for k, p in inspect.signature(function).parameters.items()}
    for key, value in settings.items():
        inside, name = None, f"{setting}.{key}" if setting else str(key)
        kind = get_origin(types.get(key)) or types.get(key)  # of list[int]: list
        if value is None and kind in (int, float, bool, str, list, tuple):
            remedy = "give a value or leave the line out"
            raise UserError(f"--{name}: got an empty line, expected {kind.__name__}; {remedy}")
        if key == "init_args" and isinstance(settings.get("class_path"), str):
            module, _, class_name = settings["class_path"].rpartition(".")
            inside = getattr(sys.modules.get(module), class_name, None)
        elif isinstance(value, Mapping) and is_dataclass(types.get(key)):
            inside = types[key]
        check_no_gaps(value, inside, name)


@contextmanager
def as_user_error(setting: str, only: type[Exception] = Exception) -> Iterator[None]:
    """Turns any exception raised while ``setting`` is used into a one-line UserError."""
    try:
        yield
    except (UserError, OSError):
        raise
    except only as error:
        cause: BaseException | None = error
        while cause is not None:  # a class may have said itself what is wrong with its arguments
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = one_line(str(error).partition("\nException raised from")[0])[:150]
        where = f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
        found = f"settings that fail ({where}: {reason})"
        raise UserError(f"--{setting}: got {found}, expected those in --help; change them") from error


@contextmanager
def disk_errors(output_dir: Path) -> Iterator[None]:
    """Reports a disk that is full or may not be written in one line; whatever wrote to it: loggers, plots, results."""
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
            f"--output_dir: got {error.filename or output_dir}, expected a place to write ({error.strerror}); free the "
            "disk or set --output_dir, then give the same command again to resume"
        ) from None
    finally:
        threading.excepthook = original
