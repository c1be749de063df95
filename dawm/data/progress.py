"""How far the reading or writing of a data set is, as a bar on a terminal."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["progress_bar"]

quiet = False  # `fit --quiet`: a data set is read far below where that is known


def progress_bar(description: str, total: int) -> Progress:
    """A bar of one task with the time left, on the standard error stream; none without a terminal, or when quiet."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
    bar.add_task(description, total=total)
    return bar
