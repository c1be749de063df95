"""The one exception that stands for a user's mistake."""

__all__ = ["UserError"]


class UserError(Exception):
    """A mistake in the settings or in the data.

    The message is one line that names the setting and says how to mend it. The command line prints it without a
    traceback and ends with exit code 2.
    """
