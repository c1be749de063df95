"""The one exception that stands for a user's mistake, and its grammar.

Every message is one line, ``--key: got VALUE, expected WHAT; DO THIS``: the setting as it is typed, what it holds, what
would be right, and the way out.
"""

from typing import Any

__all__ = ["UserError", "first_line", "require"]


class UserError(Exception):
    """A mistake in the settings or in the data.

    The message is one line that names the setting and says how to mend it. The command line prints it without a
    traceback and ends with exit code 2.
    """


def require(key: str, value: Any, holds: bool, expected: str, remedy: str = "change it") -> None:
    """Raises a UserError where a setting is out of its range.

    Args:
        key: The setting as it is typed on the command line, without the dashes, such as ``agent.tau``.
        value: Its value.
        holds: Whether it is in range.
        expected: The range in words.
        remedy: What to do about it.
    """
    if not holds:
        raise UserError(f"--{key}: got {value!r:.120}, expected {expected}; {remedy}")


def first_line(error: Exception) -> str:
    """What another library's error says, in one line; its type where it says nothing.

    Args:
        error: What was raised.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
