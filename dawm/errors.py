"""The one exception that stands for a user's mistake."""

from typing import Any

__all__ = ["UserError", "first_line", "require"]


class UserError(Exception):
    """A mistake in the settings or in the data.

    The message is one line that names the setting and says how to mend it. The command line prints it without a
    traceback and ends with exit code 2.
    """


def require(setting: str, value: Any, holds: bool, wanted: str) -> None:
    """Raises a UserError where a setting is out of its range.

    Args:
        setting: Class and argument, such as ``TD3BC.tau``.
        value: Its value.
        holds: Whether it is in range.
        wanted: The range in words.
    """
    if not holds:
        raise UserError(f"{setting} is {value}, but must be {wanted}; change {setting.partition('.')[2]}")


def first_line(error: Exception) -> str:
    """What another library's error says, in one line; its kind where it says nothing.

    Args:
        error: What was raised.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
